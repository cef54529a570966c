"""The paged runner against transformers' own `generate`, token for token, in float32."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.cache.pool import KvPool, KvShape
from runtime.execution.attention import AttentionBackend, choose_backend
from runtime.execution.reference import ReferenceAttention
from runtime.execution.runner import Runner
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder, load_original
from runtime.proving.replay import Replay
from tests.runtime.decoders import save_decoder

NUM_NEW = 24
PROMPT_LENGTHS = (45, 1, 7, 30)  # beyond the sliding window, and shorter than a block
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral"]


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_decoder(request.param, path)
    return path


@pytest.fixture(params=["reference", "chosen"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return ReferenceAttention() if request.param == "reference" else choose_backend("cpu")


def make_replay(decoder: HuggingFaceDecoder, backend: AttentionBackend, seed: int = 0) -> Replay:
    shapes = [layer.kv_shape for layer in decoder.layers]
    pool = KvPool(shapes, num_blocks=48, block_size=8, dtype=decoder.dtype)
    return Replay(Runner(decoder, pool, backend), seed)


def make_prompts(vocab_size: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"prompt {n}": torch.randint(3, vocab_size, (n,), generator=generator).tolist()
        for n in PROMPT_LENGTHS
    }


def generate_original(directory: Path, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    model = load_original(directory)
    generated = {}
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_NEW,
                min_new_tokens=NUM_NEW,
                do_sample=False,
            )
        generated[name] = output[0, len(prompt) :].tolist()
    return generated


def generate_paged(replay: Replay, prompts: dict[str, list[int]], chunk: int) -> dict:
    """Prompts in chunks, beside sequences that already decode; each starts a step later."""
    waiting, pending = list(prompts), {name: list(tokens) for name, tokens in prompts.items()}
    generated: dict[str, list[int]] = {name: [] for name in prompts}
    running: list[str] = []
    while waiting or running:
        if waiting:
            running.append(waiting.pop(0))
        work = {}
        for name in running:
            work[name], pending[name] = pending[name][:chunk], pending[name][chunk:]
        for name, logits in replay.step(work).items():
            if pending[name]:
                continue
            # The end token (2) is kept out, as min_new_tokens does.
            generated[name].append(int(logits[-1].index_fill(0, torch.tensor(2), -1e9).argmax()))
            pending[name] = generated[name][-1:]
            if len(generated[name]) == NUM_NEW:
                running.remove(name)
                replay.release(name)
    return generated


@pytest.mark.parametrize("chunk", [11, 64])
def test_greedy_equals_generate_token_for_token(
    directory: Path, backend: AttentionBackend, chunk: int
) -> None:
    decoder = load_decoder(directory)
    prompts = make_prompts(decoder.info.vocab_size)
    expected = generate_original(directory, prompts)
    replay = make_replay(decoder, backend, seed=chunk)
    assert generate_paged(replay, prompts, chunk) == expected


def test_only_sampled_rows_reach_the_output_layer(directory: Path) -> None:
    decoder = load_decoder(directory)
    head = decoder.module.get_output_embeddings()
    assert head is not None
    seen: list[int] = []
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[-2]))
    replay = make_replay(decoder, ReferenceAttention())
    batch = replay.pack({"a": [5] * 12, "b": [7]})
    logits = replay.runner.run(replace(batch, sample_indices=torch.tensor([11, 12])))
    assert seen == [2]
    assert logits.shape == (2, decoder.info.vocab_size)
    assert logits.dtype == torch.float32


def test_runner_refuses_a_pool_of_another_shape(directory: Path) -> None:
    decoder = load_decoder(directory)
    pool = KvPool([KvShape(1, 8)], num_blocks=2, block_size=8, dtype=torch.float32)
    with pytest.raises(AssertionError, match="other layers"):
        Runner(decoder, pool, ReferenceAttention())
