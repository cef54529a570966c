"""Times a decoder's forms as serving runs them, side by side, and chooses one.

What is measured is what was proved before: the choice is between equals.
"""

import statistics
from collections.abc import Callable, Mapping

import torch

from runtime.cache.pool import KvPool
from runtime.compiling.measuring import MARGIN, MAX_RUNS, WARMUP_RUNS, Timing, measure
from runtime.execution.attention import choose_backend
from runtime.execution.runner import Runner
from runtime.execution.whole import WholeModel
from runtime.importing.program import Decoder
from runtime.protocol import CandidateReport
from runtime.proving.replay import Replay

BATCH_SIZES = (1, 8, 32)
BLOCK_SIZE = 32  # tokens
PROMPT_TOKENS = 16
STEP_TOKENS = 1024  # as `Serve.max_batch_tokens`: the longest step that serving makes
DECODE_SECONDS = 1.0  # for each batch size, all forms together

Report = Callable[[float, str], None]
Step = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def measure_decoders(
    forms: Mapping[str, Decoder], report: Report = lambda *_: None
) -> list[CandidateReport]:
    """One report per form, "eager" among them and exactly one chosen: decode steps of several
    sequences, and one full step of a prompt, which is the slowest."""
    context = min(decoder.info.max_context_tokens for decoder in forms.values())
    length = PROMPT_TOKENS + WARMUP_RUNS + MAX_RUNS
    sizes = BATCH_SIZES if context >= length else ()
    decoding: dict[int, dict[str, Timing]] = {}
    for index, size in enumerate(sizes):
        steps = {name: _decode_step(form, size, length) for name, form in forms.items()}
        decoding[size] = measure(steps, [], DECODE_SECONDS)
        report((index + 1) / (len(sizes) + 1), _line(decoding[size], f"{size} sequences"))
    num_tokens = min(STEP_TOKENS, context)
    steps = {name: _prefill_step(form, num_tokens) for name, form in forms.items()}
    prefill = measure(steps, [], budget_seconds=0.0)
    report(1.0, _line(prefill, f"{num_tokens} tokens of a prompt"))
    speedups = {name: _speedup([*decoding.values(), prefill], name) for name in forms}
    best = max(speedups, key=lambda name: speedups[name])
    if speedups[best] < MARGIN:
        best = "eager"
    return [
        CandidateReport(
            name=name,
            is_chosen=name == best,
            reason=_reason(name, best, speedups),
            p50_ms={size: round(times[name].p50_ms, 4) for size, times in decoding.items()},
            prefill_ms=round(prefill[name].p50_ms, 4),
            device_ms_max=max(times[name].max_ms for times in [*decoding.values(), prefill]),
        )
        for name in forms
    ]


def measure_whole(
    name: str,
    model: WholeModel,
    max_context_tokens: int,
    report: Report = lambda *_: None,
    *,
    is_batched: bool = True,
) -> CandidateReport:
    """A decoder without a cache: its tokens cost what the whole sequence costs."""
    num_tokens = min(STEP_TOKENS, max_context_tokens)
    p50_ms: dict[int, float] = {}
    slowest = 0.0
    for index, size in enumerate(BATCH_SIZES if is_batched else BATCH_SIZES[:1]):
        rows = torch.zeros(size, min(PROMPT_TOKENS, max_context_tokens), dtype=torch.int64)
        timing = measure({name: _whole_step(model, rows)}, [], DECODE_SECONDS)[name]
        p50_ms[size], slowest = round(timing.p50_ms, 4), max(slowest, timing.max_ms)
        report((index + 1) / 4, _line({name: timing}, f"{size} sequences"))
    rows = torch.zeros(1, num_tokens, dtype=torch.int64)
    longest = measure({name: _whole_step(model, rows)}, [], budget_seconds=0.0)[name]
    report(1.0, _line({name: longest}, f"a sequence of {num_tokens} tokens"))
    return CandidateReport(
        name=name,
        is_chosen=True,
        reason="without a cache, no other form is tried",
        p50_ms=p50_ms,
        prefill_ms=round(longest.p50_ms, 4),
        device_ms_max=max(slowest, longest.max_ms),
    )


def _speedup(measured: list[dict[str, Timing]], name: str) -> float:
    """How many times as fast as eager: the geometric mean over what was measured."""
    ratios = [times["eager"].p50_ms / times[name].p50_ms for times in measured]
    return statistics.geometric_mean(ratios)


def _reason(name: str, best: str, speedups: Mapping[str, float]) -> str:
    if len(speedups) == 1:
        return "the model as uploaded, and the only form measured"
    if name == "eager":
        return "no form was faster by the margin" if best == name else "the model as uploaded"
    times = f"{speedups[name]:.2f} times as fast as eager"
    return times if name == best else f"{times}; {MARGIN} is asked for"


def _line(times: Mapping[str, Timing], what: str) -> str:
    shown = ", ".join(f"{name} {timing.p50_ms:.2f} ms" for name, timing in times.items())
    return f"{what}: {shown}"


def _decode_step(decoder: Decoder, num_sequences: int, length: int) -> Step:
    replay = _replay(decoder, num_sequences * length)
    names = [str(index) for index in range(num_sequences)]
    replay.step({name: [0] * PROMPT_TOKENS for name in names})

    def step(_: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(replay.step({name: [0] for name in names}).values())

    return step


def _prefill_step(decoder: Decoder, num_tokens: int) -> Step:
    replay = _replay(decoder, num_tokens)

    def step(_: list[torch.Tensor]) -> list[torch.Tensor]:
        logits = replay.step({"prompt": [0] * num_tokens}, is_last_only=True)
        replay.release("prompt")
        return list(logits.values())

    return step


def _whole_step(model: WholeModel, rows: torch.Tensor) -> Step:
    return lambda _: [model.logits(rows)]


def _replay(decoder: Decoder, num_tokens: int) -> Replay:
    pool = KvPool(
        [layer.kv_shape for layer in decoder.layers],
        num_blocks=64 + 2 * num_tokens // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        dtype=decoder.dtype,
        device=decoder.device,
    )
    return Replay(Runner(decoder, pool, choose_backend(decoder.device)))
