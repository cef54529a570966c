"""Proves that a paged decoder computes what the original does.

Replays prompts on the served form in each way that serving can run them, and compares every
logit with the original's in float64. A verdict is about the paged form: losses of quantised
weights are measured elsewhere.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.cache.pool import KvPool
from runtime.execution.attention import AttentionBackend, choose_backend
from runtime.execution.runner import Runner
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder, load_original
from runtime.protocol import Check, Verdict
from runtime.proving.original import (
    Original,
    PromptPlan,
    Trace,
    choose_plan,
    consult_original,
    largest_error,
)
from runtime.proving.replay import Replay

# Reports (what is being proved, fraction of the proof done).
OnProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class DecoderProof:
    """`equal`: every check held. `different`: one did not. `unproved`: the original could not be
    replayed here; `notes` says why."""

    verdict: Verdict
    checks: list[Check]
    notes: list[str]


@dataclass(frozen=True)
class _Form:
    """A served form under proof. Tokens are judged in float32 only: below, rounding flips them."""

    label: str
    model: HuggingFaceDecoder
    dtype: torch.dtype
    tolerance: float
    judges_tokens: bool


def prove_decoder(
    directory: Path | str,
    decoder: HuggingFaceDecoder,
    *,
    backend: AttentionBackend | None = None,
    block_size: int = 32,
    budget_seconds: float = 30.0,
    on_progress: OnProgress = lambda _phase, _fraction: None,
) -> DecoderProof:
    """Compare a loaded decoder with the directory it came from.

    A decoder in float32 must give the same tokens until the original's top-two gap falls below
    the tolerance. One in bfloat16 or float16 is judged on its logits, by the original's own
    deviation in that dtype; its paged form is judged on tokens as well, once more in float32.
    Prompts are fewer and shorter where the model would outlast `budget_seconds`.
    """
    directory = Path(directory)
    num_parameters = sum(parameter.numel() for parameter in decoder.module.parameters())
    free_bytes = available_bytes()
    if 5 * num_parameters > free_bytes:
        return _unproved(num_parameters, free_bytes)
    on_progress("original", 0.0)
    window = max((layer.attention.sliding_window or 0 for layer in decoder.layers), default=0)
    original_module = load_original(directory, torch.float32)
    plan = choose_plan(
        original_module,
        block_size=block_size,
        window=window or None,
        max_context_tokens=decoder.info.max_context_tokens,
        budget_seconds=budget_seconds,
    )
    has_float64 = 13 * num_parameters <= free_bytes
    original = consult_original(
        directory, original_module, plan, [decoder.dtype], has_float64=has_float64
    )
    del original_module
    notes = _plan_notes(plan, window, original.is_exact)
    checks: list[Check] = []
    forms = _forms(directory, decoder, original)
    for i, form in enumerate(forms):
        on_progress(form.label, 0.5 + 0.5 * i / len(forms))
        checks += _prove_form(form, original, backend or choose_backend(decoder.device), block_size)
    is_equal = all(check.is_equal for check in checks)
    return DecoderProof("equal" if is_equal else "different", checks, notes)


def _forms(directory: Path, decoder: HuggingFaceDecoder, original: Original) -> list[_Form]:
    tolerance_of = original.tolerance_of
    exact = decoder
    forms: list[_Form] = []
    if decoder.dtype != torch.float32:
        exact = load_decoder(directory, decoder.device, torch.float32)
        label = decoder.info.dtype
        forms = [_Form(label, decoder, decoder.dtype, tolerance_of[decoder.dtype], False)]
    return [_Form("float32", exact, torch.float32, tolerance_of[torch.float32], True), *forms]


def _prove_form(
    form: _Form, original: Original, backend: AttentionBackend, block_size: int
) -> list[Check]:
    """Each way of running the traces, on a pool whose unused memory is all NaN."""
    ways: list[tuple[str, str, Callable[[Replay, list[Trace]], list[Tensor]]]] = [
        ("paged", "prompt at once, then token by token", _run_alone),
        ("chunked", "prompt in pieces that end inside blocks", _run_chunked),
        ("batched", "all prompts together, each a step later than the last", _run_batched),
        ("prefix", "continuing on blocks that another sequence computed", _run_on_prefix),
    ]
    shapes = [layer.kv_shape for layer in form.model.layers]
    num_tokens = sum(len(trace.tokens) for trace in original.traces)
    num_blocks = 2 * (num_tokens // block_size + len(original.traces))
    checks: list[Check] = []
    for seed, (name, description, run) in enumerate(ways):
        pool = KvPool(
            shapes,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=form.dtype,
            device=form.model.device,
        )
        logits = run(Replay(Runner(form.model, pool, backend), seed), original.traces)
        found = [of_trace.cpu() for of_trace in logits]
        checks.append(_judge(f"{name} ({form.label})", description, form, found, original))
    return checks


def _judge(
    name: str, description: str, form: _Form, found: list[Tensor], original: Original
) -> Check:
    error = largest_error(found, [trace.reference for trace in original.traces])
    num_wrong = num_judged = 0
    for logits, trace in zip(found, original.traces, strict=True):
        is_clear = trace.gaps() >= form.tolerance
        is_wrong = is_clear & (logits.argmax(-1) != trace.reference.argmax(-1))
        num_judged += int(is_clear.sum())
        num_wrong += int(is_wrong.sum())
    detail = f"{description}; largest difference of a logit (range {original.logit_range:.3g})"
    if form.judges_tokens:
        detail += f"; {num_judged - num_wrong} of {num_judged} clear tokens the same"
    return Check(
        name=name,
        is_equal=error <= form.tolerance and not (form.judges_tokens and num_wrong),
        detail=detail,
        error=error,
        tolerance=form.tolerance,
    )


def _run_alone(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    found = []
    for i, trace in enumerate(traces):
        name = f"sequence {i}"
        steps = [trace.tokens[: trace.num_prompt], *([t] for t in trace.tokens[trace.num_prompt :])]
        found.append(torch.cat([replay.step({name: step})[name] for step in steps]))
        replay.release(name)
    return found


def _run_chunked(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    chunk = replay.runner.pool.block_size // 2 + 1
    found = []
    for i, trace in enumerate(traces):
        name = f"sequence {i}"
        starts = range(0, len(trace.tokens), chunk)
        pieces = [replay.step({name: trace.tokens[at : at + chunk]})[name] for at in starts]
        found.append(torch.cat(pieces))
        replay.release(name)
    return found


def _run_batched(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    """Prefill of one beside decoding of others; what ends is freed and poisoned meanwhile."""
    found: list[list[Tensor]] = [[] for _ in traces]
    num_done = [0] * len(traces)
    num_started = 0
    while any(done < len(trace.tokens) for done, trace in zip(num_done, traces, strict=True)):
        num_started = min(num_started + 1, len(traces))
        work: dict[str, list[int]] = {}
        for i, trace in enumerate(traces[:num_started]):
            end = max(trace.num_prompt, num_done[i] + 1)
            if tokens := trace.tokens[num_done[i] : end]:
                work[str(i)] = tokens
        for name, logits in replay.step(work).items():
            i = int(name)
            found[i].append(logits)
            num_done[i] += len(logits)
            if num_done[i] == len(traces[i].tokens):
                replay.release(name)
    return [torch.cat(pieces) for pieces in found]


def _run_on_prefix(replay: Replay, traces: list[Trace]) -> list[Tensor]:
    """Each trace once to fill its blocks, then again on those of its blocks that are full."""
    found = []
    for i, trace in enumerate(traces):
        first, second = f"first {i}", f"second {i}"
        logits = replay.step({first: trace.tokens[:-1]})[first]
        num_shared = replay.share(first, second)
        rest = replay.step({second: trace.tokens[num_shared:]})[second]
        replay.release(first)
        replay.release(second)
        found.append(torch.cat([logits[:num_shared], rest]))
    return found


def _plan_notes(plan: PromptPlan, window: int, is_exact: bool) -> list[str]:
    notes = []
    longest = max(plan.lengths) + plan.num_new
    if window >= longest:
        notes.append(
            f"The sliding window of {window} tokens was read from the model's own mask but not "
            f"exercised: the longest replayed sequence has {longest} tokens."
        )
    if not is_exact:
        notes.append(
            "The original could not be run in float64 here (memory, or an operation without it); "
            "float32 was the reference, with the smallest tolerance."
        )
    return notes


def _unproved(num_parameters: int, free_bytes: int) -> DecoderProof:
    note = (
        f"Replaying the original in float32 needs about {5 * num_parameters / 1e9:.1f} GB; "
        f"{free_bytes / 1e9:.1f} GB are free. Build on a machine with more memory to prove it."
    )
    return DecoderProof("unproved", [], [note])


def available_bytes() -> int:
    """Memory that this process could still take: what the system has free, within its cgroup."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free
