"""The engine over a real model and a real pool: copies, swaps and poison change no token."""

from pathlib import Path

import pytest
import torch

from runtime.cache.pool import KvPool
from runtime.engine import DecoderEngine
from runtime.execution.attention import choose_backend
from runtime.execution.runner import Runner
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder
from runtime.protocol import Generate, SamplingParams, SequenceOutput
from runtime.scheduling.scheduler import Scheduler
from tests.runtime.decoders import save_decoder
from tests.runtime.engine_bench import plant_stale_blocks

BLOCK_SIZE = 8
NUM_NEW = 24
SHARED = [3 + at * 7 % 90 for at in range(29)]  # ends inside a block
PROMPTS = [
    SHARED,
    [*SHARED, 5, 6],
    [*SHARED, 7],
    [*SHARED[:20], 11, 12, 13],
    [4, 5, 6, 7],
    [*SHARED, 5, 6, 9, 10, 11, 12, 13, 14],
    SHARED[:24],
    [90],
]


@pytest.fixture(scope="module", params=["llama", "mistral"])
def decoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> HuggingFaceDecoder:
    directory: Path = tmp_path_factory.mktemp(request.param)
    save_decoder(request.param, directory)
    return load_decoder(directory)


def make_engine(
    decoder: HuggingFaceDecoder, num_blocks: int, num_swap_blocks: int = 0, max_sequences: int = 8
) -> DecoderEngine:
    shapes = [layer.kv_shape for layer in decoder.layers]
    sizes = {"block_size": BLOCK_SIZE, "dtype": decoder.dtype}
    pool = KvPool(shapes, num_blocks=num_blocks, **sizes)
    swap = KvPool(shapes, num_blocks=num_swap_blocks, **sizes) if num_swap_blocks else None
    scheduler = Scheduler(
        num_blocks,
        BLOCK_SIZE,
        16,
        max_sequences,
        num_swap_blocks=num_swap_blocks,
        poisons_blocks=True,
    )
    pool.poison(list(range(num_blocks)))
    runner = Runner(decoder, pool, choose_backend("cpu"), swap)
    return DecoderEngine(runner, scheduler, None, info=decoder.info)


def generate(
    engine: DecoderEngine, prompts: list[list[int]], arrivals: int = 1
) -> dict[str, list[SequenceOutput]]:
    """All prompts, `arrivals` of them between two steps."""
    outputs: dict[str, list[SequenceOutput]] = {str(at): [] for at in range(len(prompts))}
    waiting = list(enumerate(prompts))
    while waiting or engine.has_work:
        for at, prompt in waiting[:arrivals]:
            request = Generate(
                request_id=str(at),
                sampling=SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True),
                cache_salt=b"",
                token_ids=prompt,
            )
            engine.add(engine.prepare(request))
        del waiting[:arrivals]
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return outputs


def token_ids(outputs: list[SequenceOutput]) -> list[int]:
    assert outputs[-1].finish_reason == "length"
    return [id_ for output in outputs for id_ in output.token_ids]


@pytest.fixture(scope="module")
def alone(decoder: HuggingFaceDecoder) -> list[list[int]]:
    """What each prompt gets by itself, in a cache of its own."""
    return [token_ids(generate(make_engine(decoder, 16), [p])["0"]) for p in PROMPTS]


@pytest.mark.parametrize("num_swap_blocks", [0, 40])
@pytest.mark.parametrize("num_blocks", [10, 80])
@pytest.mark.parametrize("arrivals", [1, len(PROMPTS)])
def test_every_prompt_gets_the_tokens_it_gets_alone(
    decoder: HuggingFaceDecoder,
    alone: list[list[int]],
    num_blocks: int,
    num_swap_blocks: int,
    arrivals: int,
) -> None:
    engine = make_engine(decoder, num_blocks, num_swap_blocks)
    outputs = generate(engine, PROMPTS, arrivals)
    assert [token_ids(outputs[str(at)]) for at in range(len(PROMPTS))] == alone
    stats = engine.stats()
    assert (stats.preemptions > 0) == (num_blocks == 10)
    assert (stats.swapped_blocks > 0) == (num_blocks == 10 and num_swap_blocks > 0)
    assert stats.cached_tokens > 0


def test_a_chat_goes_on_where_it_stopped(
    decoder: HuggingFaceDecoder, alone: list[list[int]]
) -> None:
    engine = make_engine(decoder, 80)
    generate(engine, [SHARED])
    turn = [*SHARED, *alone[0], 8, 9]
    again = generate(engine, [turn])["0"]
    assert again[0].num_cached_tokens == len(SHARED) + NUM_NEW - 1
    assert token_ids(again) == token_ids(generate(make_engine(decoder, 80), [turn])["0"])


def test_a_stale_block_shows(decoder: HuggingFaceDecoder) -> None:
    """An index that does not forget serves a block that was given up, and poisoned: its reader
    ends with an error instead of somebody else's tokens."""
    engine = make_engine(decoder, 80)
    scheduler = engine.scheduler
    assert isinstance(scheduler, Scheduler)
    plant_stale_blocks(scheduler)
    failed, reader = (
        Generate(
            request_id=name,
            sampling=SamplingParams(max_tokens=NUM_NEW, temperature=0.0),
            cache_salt=b"",
            token_ids=prompt,
        )
        for name, prompt in (("failed", SHARED), ("reader", [*SHARED, 5]))
    )
    engine.add(engine.prepare(failed))
    for _ in range(3):
        engine.step()
    scheduler.finish(engine._requests["failed"][0].sequence, "error")
    engine = DecoderEngine(engine._runner, scheduler, None, info=decoder.info)
    engine.add(engine.prepare(reader))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[-1].num_cached_tokens > 0
    assert outputs[-1].finish_reason == "error"


def test_moving_blocks_moves_every_layer(decoder: HuggingFaceDecoder) -> None:
    shapes = [layer.kv_shape for layer in decoder.layers]
    pool = KvPool(shapes, num_blocks=4, block_size=2, dtype=decoder.dtype)
    swap = KvPool(shapes, num_blocks=2, block_size=2, dtype=decoder.dtype)
    pool.storage.copy_(torch.rand_like(pool.storage))
    before = pool.storage.clone()
    pool.copy_blocks_to(swap, [(3, 0), (1, 1)])
    swap.copy_blocks_to(pool, [(0, 0)])
    assert torch.equal(swap.storage, before[[3, 1]])
    assert torch.equal(pool.storage, before[[3, 1, 2, 3]])
