"""Replayed decode steps against the same steps run anew, on a tape instead of a GPU."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from runtime.cache.pool import KvPool
from runtime.engine import DecoderEngine
from runtime.execution.attention import AttentionBackend
from runtime.execution.cpu import load_cpu_attention
from runtime.execution.decode_graphs import (
    DecodeGraphs,
    DecodeInputs,
    graph_sizes,
    is_close,
    with_decode_graphs,
)
from runtime.execution.reference import ReferenceAttention
from runtime.execution.runner import Runner
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder
from runtime.proving.replay import Replay
from runtime.scheduling.scheduler import Scheduler
from tests.runtime.decoders import save_decoder
from tests.runtime.execution.tape import TapeCapture, TapedReference
from tests.runtime.test_engine_paged import PROMPTS, generate, token_ids

MAX_SEQUENCES = 6
BLOCK_SIZE = 8
NOWHERE = 2**30  # a block that is in no pool


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def decoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> HuggingFaceDecoder:
    directory: Path = tmp_path_factory.mktemp(request.param)
    save_decoder(request.param, directory)
    return load_decoder(directory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceDecoder:
    directory = tmp_path_factory.mktemp("llama")
    save_decoder("llama", directory)
    return load_decoder(directory)


def make_runner(
    model: Any, backend: AttentionBackend | None = None, num_blocks: int = 48
) -> Runner:
    shapes = [layer.kv_shape for layer in model.layers]
    pool = KvPool(shapes, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=model.dtype)
    return Runner(model, pool, backend or ReferenceAttention())


def make_graphs(runner: Runner, capture: Any) -> DecodeGraphs:
    """With entries of block tables that must not be read, unless a step sets them."""
    graphs = DecodeGraphs(runner, capture, max_sequences=MAX_SEQUENCES, max_context_tokens=64)
    graphs._inputs._block_tables.fill_(NOWHERE)
    return graphs


class GraphedReplay(Replay):
    """Chosen tokens through `DecodeGraphs`."""

    def __init__(self, model: Any, seed: int = 0) -> None:
        self.capture = TapeCapture()
        runner = make_runner(model, TapedReference(self.capture))
        super().__init__(runner, seed)
        self.graphs = make_graphs(runner, self.capture)
        eager = runner.run
        # What the graphs run themselves stays as it is.
        self.graphs._runner = cast(
            Runner, SimpleNamespace(run=eager, compute=runner.compute, move=runner.move)
        )
        runner.run = self.graphs.run  # type: ignore[method-assign]


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def random_schedule(seed: int, num_steps: int) -> list[tuple[dict[str, list[int]], list[str]]]:
    """Per step, what runs and who leaves afterwards. Mostly decoding, by all or by some."""
    rng = random.Random(seed)  # noqa: S311
    alive: dict[str, int] = {}  # name -> length
    steps: list[tuple[dict[str, list[int]], list[str]]] = []
    for at in range(num_steps):
        work: dict[str, list[int]] = {}
        if len(alive) < MAX_SEQUENCES and (not alive or rng.random() < 0.2):
            work[f"s{at}"] = [rng.randrange(3, 96) for _ in range(rng.choice([1, 2, 7, 20]))]
        num_decoding = rng.choice([len(alive), rng.randint(min(1, len(alive)), len(alive))])
        decoding = rng.sample(sorted(alive), num_decoding)
        work |= {name: [rng.randrange(3, 96)] for name in decoding}
        for name, tokens in work.items():
            alive[name] = alive.get(name, 0) + len(tokens)
        leaving = [name for name, length in alive.items() if length > 60 or rng.random() < 0.03]
        for name in leaving:
            del alive[name]
        steps.append((work, leaving))
    return steps


@pytest.mark.parametrize("seed", [0, 1])
def test_any_schedule_gives_the_logits_of_steps_run_anew(
    decoder: HuggingFaceDecoder, seed: int
) -> None:
    """Free blocks are NaN in both, and blocks that no sequence of a step has are in no pool."""
    replay, expected = GraphedReplay(decoder, seed), Replay(make_runner(decoder), seed + 9)
    for work, leaving in random_schedule(seed, 80):
        equal(replay.step(work), expected.step(work))
        for name in leaving:
            replay.release(name)
            expected.release(name)
    assert replay.graphs.captured_sizes == graph_sizes(MAX_SEQUENCES) == [1, 2, 4, 6]
    assert len(replay.capture.replayed) > 40


def test_a_size_is_captured_when_used_again_with_all_used_before(llama: HuggingFaceDecoder) -> None:
    replay = GraphedReplay(llama)
    names = ["a", "b", "c", "d", "e"]
    replay.step({name: [3, 4, 5] for name in names})
    for num_sequences in (2, 5, 1):
        replay.step({name: [7] for name in names[:num_sequences]})
    assert (replay.capture.sizes, replay.capture.replayed) == ([], [])
    replay.step({"a": [8]})
    assert replay.capture.sizes == [6, 2, 1], "the largest first"
    assert replay.capture.replayed == [1]
    replay.step({name: [9] for name in names[:3]})
    assert replay.capture.replayed == [1], "its size is used for the first time"
    replay.step({name: [9] for name in names[:2]})
    replay.step({name: [9] for name in names})
    assert replay.capture.replayed == [1, 2, 6]
    assert replay.capture.sizes == [6, 2, 1]


def test_capturing_touches_no_block(llama: HuggingFaceDecoder) -> None:
    capture = TapeCapture()
    runner = make_runner(llama, TapedReference(capture))
    runner.pool.poison(range(runner.pool.num_blocks))
    graphs = make_graphs(runner, capture)
    graphs._used |= {1, 4}
    graphs._capture_used()
    assert capture.sizes == [4, 1]
    assert runner.pool.storage.isnan().all()


def test_rows_that_a_smaller_step_leaves_become_padding(llama: HuggingFaceDecoder) -> None:
    replay = Replay(make_runner(llama))
    inputs = DecodeInputs(MAX_SEQUENCES, 64, BLOCK_SIZE, torch.device("cpu"))
    for names in ("abcde", "cd"):
        batch = replay.pack({name: [ord(name)] for name in names})
        inputs.fill(batch)
    tokens = torch.stack([batch.token_ids, batch.positions, batch.slots])
    assert torch.equal(inputs._tokens[:, :2], tokens)
    assert bool((inputs._tokens[:, 2:] == torch.tensor([[0], [0], [-1]])).all())
    assert inputs._context_lens.tolist() == [2, 2, *[0] * 14]
    assert torch.equal(inputs._block_tables[:2, :1], batch.block_tables)
    inputs.clear()
    assert bool((inputs._tokens[2] == -1).all())
    assert not inputs._context_lens.any()


def test_only_steps_that_decode_one_token_each_are_replayed(llama: HuggingFaceDecoder) -> None:
    replay = GraphedReplay(llama)
    names = [f"s{at}" for at in range(MAX_SEQUENCES + 1)]
    for _ in range(3):
        replay.step({"s0": [5], "s1": [6]})
    num_replayed = len(replay.capture.replayed)
    assert num_replayed > 0
    replay.step({"s0": [5, 6], "s1": [6]})
    replay.step({"s0": [5], "s1": [6, 7, 8]})
    replay.step({name: [9] for name in names})
    batch = replay.pack({"s0": [5], "s1": [6]})
    unsampled = replace(batch, sample_indices=torch.tensor([1]))
    assert len(replay.runner.run(unsampled)) == 1
    assert len(replay.capture.replayed) == num_replayed
    assert replay.capture.sizes == [2]


def test_a_context_beyond_the_largest_table_is_run_anew(llama: HuggingFaceDecoder) -> None:
    replay, expected = GraphedReplay(llama), Replay(make_runner(llama))
    for _ in range(3):
        equal(replay.step({"a": [5]}), expected.step({"a": [5]}))
    num_replayed = len(replay.capture.replayed)
    equal(replay.step({"a": [7] * 61}), expected.step({"a": [7] * 61}))  # now 64
    equal(replay.step({"a": [5]}), expected.step({"a": [5]}))
    assert len(replay.capture.replayed) == num_replayed


class Altered:
    """A decoder whose logits go through `change` first."""

    def __init__(self, decoder: HuggingFaceDecoder, change: Any) -> None:
        self.layers, self.dtype = decoder.layers, decoder.dtype
        self._decoder, self._change = decoder, change

    def forward(self, *args: Any) -> Tensor:
        return self._change(self._decoder.forward(*args), args[1])


def wait(logits: Tensor, positions: Tensor) -> Tensor:
    return logits + (1 if int(positions.max()) > 1000 else 0)


def test_what_cannot_be_captured_runs_as_before_and_says_so_once(
    llama: HuggingFaceDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    model = Altered(llama, wait)
    replay, expected = GraphedReplay(model), Replay(make_runner(model))
    for _ in range(4):
        for work in ({"a": [5]}, {"a": [6], "b": [7]}):
            equal(replay.step(work), expected.step(work))
    assert replay.graphs.captured_sizes == []
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "decode steps of 2 cannot be captured" in caplog.text
    assert "waits for the device" in caplog.text


def test_a_later_failure_keeps_what_was_captured(
    llama: HuggingFaceDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    replay, expected = GraphedReplay(llama), Replay(make_runner(llama))
    steps = [{"a": [5]}] * 3 + [{"a": [6], "b": [7]}] * 3 + [{"a": [8]}]
    capture = replay.capture.capture
    for at, work in enumerate(steps):
        if at == 3:
            replay.capture.capture = lambda run: capture(lambda: run() / 0 + run().item())
        equal(replay.step(work), expected.step(work))
    assert replay.graphs.captured_sizes == [1]
    assert replay.capture.replayed == [1, 1, 1]
    assert len(caplog.records) == 1


def test_a_graph_that_holds_on_to_old_numbers_is_not_used(
    llama: HuggingFaceDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Replay(make_runner(llama))
    expected = [plain.step({"a": [5]})["a"] for _ in range(4)]
    calls = iter(range(1000))
    model = Altered(llama, lambda logits, _: logits.roll(next(calls), -1))
    replay = GraphedReplay(model)
    found = [replay.step({"a": [5]})["a"] for _ in range(4)]
    # Calls 1 and 2 were the capture; call 3 was held against its replay, and is the answer.
    for step, call in enumerate((0, 3, 4, 5)):
        equal({"a": found[step]}, {"a": expected[step].roll(call, -1)})
    assert replay.graphs.captured_sizes == []
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "replayed decode steps of 1 differ" in caplog.text


def test_an_engine_gives_the_same_tokens_with_and_without(llama: HuggingFaceDecoder) -> None:
    def make_engine(wrap: bool) -> tuple[DecoderEngine, TapeCapture]:
        capture = TapeCapture()
        runner = make_runner(llama, TapedReference(capture), num_blocks=14)
        runner.pool.poison(range(14))
        scheduler = Scheduler(14, BLOCK_SIZE, 16, MAX_SEQUENCES, poisons_blocks=True)
        stepped = make_graphs(runner, capture) if wrap else runner
        return DecoderEngine(stepped, scheduler, None, info=llama.info), capture

    engine, capture = make_engine(wrap=True)
    found = generate(engine, PROMPTS)
    expected = generate(make_engine(wrap=False)[0], PROMPTS)
    assert engine.stats().preemptions > 0
    assert len(capture.replayed) > 20
    for name, outputs in expected.items():
        assert token_ids(found[name]) == token_ids(outputs)


def test_the_compiled_backend_is_not_captured(llama: HuggingFaceDecoder) -> None:
    backend = load_cpu_attention()
    if backend is None:
        pytest.skip("no operator was compiled for this machine")
    with pytest.raises(AssertionError, match="takes no padding"):
        make_graphs(make_runner(llama, backend), TapeCapture())


def test_only_cuda_is_captured_and_only_where_the_model_allows_it(
    llama: HuggingFaceDecoder,
) -> None:
    runner = make_runner(llama)
    assert with_decode_graphs(runner, 4, 64) is runner
    pool = SimpleNamespace(device=torch.device("cuda"))
    refusing = SimpleNamespace(model=SimpleNamespace(is_capturable=False), pool=pool)
    assert with_decode_graphs(cast(Runner, refusing), 4, 64) is refusing


def test_sizes_are_powers_of_two_and_the_most() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(2) == [1, 2]
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert graph_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]


def test_closeness_of_logits() -> None:
    logits = torch.tensor([[1.0, -20.0, 3.0], [4.0, torch.nan, -torch.inf]])
    assert is_close(logits, logits.clone())
    assert is_close(logits + 0.5, logits)
    assert not is_close(logits + 2, logits)
    assert not is_close(logits.nan_to_num(0.0), logits)
