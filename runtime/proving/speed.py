"""Times a decoder's steps as serving runs them. What the numbers are for is the build's affair."""

from collections.abc import Callable

import torch

from runtime.cache.pool import KvPool
from runtime.compiling.measuring import MAX_RUNS, WARMUP_RUNS, measure
from runtime.execution.attention import choose_backend
from runtime.execution.runner import Runner
from runtime.importing.huggingface import HuggingFaceDecoder
from runtime.protocol import CandidateReport
from runtime.proving.replay import Replay

BATCH_SIZES = (1, 8, 32)
BLOCK_SIZE = 32  # tokens
PROMPT_TOKENS = 16
STEP_TOKENS = 1024  # as `Serve.max_batch_tokens`: the longest step that serving makes

Report = Callable[[float, str], None]


def measure_decoder(
    decoder: HuggingFaceDecoder, report: Report = lambda *_: None
) -> list[CandidateReport]:
    """Decode steps of several sequences, and one full step of prefill, which is the slowest."""
    sizes = BATCH_SIZES
    length = PROMPT_TOKENS + WARMUP_RUNS + MAX_RUNS
    if decoder.info.max_context_tokens < length:
        sizes = ()
    p50_ms: dict[int, float] = {}
    for index, size in enumerate(sizes):
        p50_ms[size] = round(_decode_ms(decoder, size, length), 4)
        line = f"eager, {size} sequences: {p50_ms[size]:.2f} ms a token"
        report((index + 1) / (len(sizes) + 1), line)
    num_tokens = min(STEP_TOKENS, decoder.info.max_context_tokens)
    prefill_ms = _prefill_ms(decoder, num_tokens)
    report(1.0, f"eager, {num_tokens} tokens of a prompt: {prefill_ms:.1f} ms")
    return [
        CandidateReport(
            name="eager",
            is_chosen=True,
            reason="the model as uploaded, and the only form measured",
            p50_ms=p50_ms,
            device_ms_max=max(prefill_ms, *p50_ms.values(), 0.0),
        )
    ]


def _decode_ms(decoder: HuggingFaceDecoder, num_sequences: int, length: int) -> float:
    replay = _replay(decoder, num_sequences * length)
    names = [str(index) for index in range(num_sequences)]
    replay.step({name: [0] * PROMPT_TOKENS for name in names})

    def step(_: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(replay.step({name: [0] for name in names}).values())

    return measure({"eager": step}, [], budget_seconds=1.0)["eager"].p50_ms


def _prefill_ms(decoder: HuggingFaceDecoder, num_tokens: int) -> float:
    replay = _replay(decoder, num_tokens)

    def step(_: list[torch.Tensor]) -> list[torch.Tensor]:
        logits = replay.step({"prompt": [0] * num_tokens})
        replay.release("prompt")
        return list(logits.values())

    return measure({"eager": step}, [], budget_seconds=0.0)["eager"].max_ms


def _replay(decoder: HuggingFaceDecoder, num_tokens: int) -> Replay:
    shapes = [layer.kv_shape for layer in decoder.layers]
    num_blocks = 64 + 2 * num_tokens // BLOCK_SIZE
    pool = KvPool(shapes, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=decoder.dtype)
    return Replay(Runner(decoder, pool, choose_backend("cpu")))
