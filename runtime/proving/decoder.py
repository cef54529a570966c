"""Proves that a served decoder computes what the original does.

Replays prompts on each served form in each way that serving can run them, and compares every
logit with the original's in float64. The ways are in `ways.py`, the original in `original.py`.
A verdict is about forms that claim to be equal: losses of quantised weights are measured
elsewhere.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.protocol import Check, Verdict
from runtime.proving.forms import Form, Run
from runtime.proving.memory import available_bytes
from runtime.proving.original import (
    LoadedOriginal,
    OriginalModel,
    PromptPlan,
    References,
    choose_plan,
    consult_original,
    row_errors,
)
from runtime.proving.row_noise import RowNoise

# Reports (what is being proved, fraction of the proof done).
OnProgress = Callable[[str, float], None]
# Forms that are judged by the same references: is_whole, window, context, dtype.
_Kind = tuple[bool, int, int, torch.dtype]


@dataclass(frozen=True)
class DecoderProof:
    """`equal`: every check held. `different`: one did not. `unproved`: the original could not be
    replayed here; `notes` says why."""

    verdict: Verdict
    checks: list[Check]
    notes: list[str]


@dataclass(frozen=True)
class _Replayed:
    """What came of one run; `errors` [n] are of the rows with the numbers `rows` [n]."""

    run: Run
    rows: Tensor
    errors: Tensor
    num_judged: int | None
    num_same: int | None
    seconds: float


class DecoderProver:
    """Compares any number of forms with one original, which is consulted once for those that the
    same prompts suit."""

    def __init__(
        self, original: OriginalModel, *, block_size: int = 32, budget_seconds: float = 30.0
    ) -> None:
        """Prompts are fewer and shorter where the model would outlast `budget_seconds`."""
        self._original = original
        self._block_size = block_size
        self._budget_seconds = budget_seconds
        self._references: dict[_Kind, References] = {}
        self._noise: dict[tuple[_Kind, torch.dtype], RowNoise] = {}

    def prove(
        self, form: Form, on_progress: OnProgress = lambda _phase, _fraction: None
    ) -> DecoderProof:
        """Compare one form with the original.

        A form in float32 must give the same tokens until the original's top-two gap falls below
        the tolerance. One in bfloat16 or float16 is judged on its logits, by the original's own
        deviations in that dtype (`row_noise.py`); on tokens as well, once more in float32.
        """
        num_parameters = self._original.num_parameters
        free_bytes = available_bytes()
        if 5 * num_parameters > free_bytes:
            return _unproved(num_parameters, free_bytes)
        on_progress("the original", 0.0)
        kind = _kind_of(form)
        if kind not in self._references:
            has_float64 = 13 * num_parameters <= free_bytes
            self._references[kind] = self._consult(form, has_float64=has_float64)
        references = self._references[kind]
        checks: list[Check] = []
        notes = _plan_notes(references, form.window)
        dtypes = list(dict.fromkeys([torch.float32, form.dtype]))
        for i, dtype in enumerate(dtypes):
            label = f"{form.name}, {str(dtype).removeprefix('torch.')}"
            runs = form.runs(dtype, references.traces)
            replayed: list[_Replayed] = []
            for j, run in enumerate(runs):
                done = (i + j / len(runs)) / len(dtypes)
                on_progress(f"{label}: {run.name}", 0.3 + 0.7 * done)
                replayed.append(_replay(run, dtype, references))
            if dtype.itemsize >= 4:
                checks += [_judge(each, label, references) for each in replayed]
                continue
            noise = self._noise_of(form, dtype)
            if all(check.is_equal for check in checks):  # else nothing hangs on this dtype
                noise.sample_for([(each.rows, each.errors) for each in replayed])
            checks += [_judge(each, label, references, noise) for each in replayed]
            notes += _noise_notes(noise, dtype)
        is_equal = all(check.is_equal for check in checks)
        return DecoderProof("equal" if is_equal else "different", checks, notes)

    def _noise_of(self, form: Form, dtype: torch.dtype) -> RowNoise:
        key = kind, _ = _kind_of(form), dtype
        if key not in self._noise:
            self._noise[key] = RowNoise(self._original, dtype, self._references[kind])
        return self._noise[key]

    def _consult(self, form: Form, *, has_float64: bool) -> References:
        def choose(loaded: LoadedOriginal) -> PromptPlan:
            return choose_plan(
                self._original,
                loaded,
                block_size=self._block_size,
                window=form.window or None,
                max_context_tokens=form.max_context_tokens,
                budget_seconds=self._budget_seconds,
                is_whole=form.is_whole,
            )

        return consult_original(
            self._original,
            choose,
            [form.dtype],
            has_float64=has_float64,
            is_whole=form.is_whole,
        )


def _kind_of(form: Form) -> _Kind:
    return form.is_whole, form.window, form.max_context_tokens, form.dtype


def _replay(run: Run, dtype: torch.dtype, references: References) -> _Replayed:
    started = time.perf_counter()
    found = run.run()
    seconds = time.perf_counter() - started
    num_judged = num_same = None
    if dtype == torch.float32:  # below it, rounding flips tokens
        num_judged = num_same = 0
        for logits, reference, _ in found:
            best = reference.topk(2, dim=-1).values
            is_clear = best[:, 0] - best[:, 1] >= references.tolerance
            is_same = is_clear & (logits.argmax(-1) == reference.argmax(-1))
            num_judged += int(is_clear.sum())
            num_same += int(is_same.sum())
    logits, wanted, rows = zip(*found, strict=True)
    errors = row_errors(logits, wanted)
    return _Replayed(run, torch.cat(rows), errors, num_judged, num_same, seconds)


def _judge(
    replayed: _Replayed, label: str, references: References, noise: RowNoise | None = None
) -> Check:
    """By the noise if there is some; the error told is the one that came closest to its limit."""
    errors = replayed.errors.sort(descending=True).values
    allowed = noise.allowed(replayed.rows) if noise else errors.new_tensor(references.tolerance)
    allowed = allowed.expand_as(errors)
    at = int((errors / allowed).argmax())
    detail = f"{replayed.run.description}; in logits, which span {references.logit_range:.3g}"
    if at:
        detail += f"; the {at + 1}th largest of {len(errors)} rows"
    return Check(
        name=replayed.run.name,
        form=label,
        is_equal=bool((errors <= allowed).all()) and replayed.num_same == replayed.num_judged,
        detail=detail,
        error=float(errors[at]),
        tolerance=float(allowed[at]),
        num_judged=replayed.num_judged,
        num_same=replayed.num_same,
        seconds=round(replayed.seconds, 3),
    )


def _noise_notes(noise: RowNoise, dtype: torch.dtype) -> list[str]:
    if not noise.num_samples:
        return []
    return [
        f"Rounding moves some rows of logits far in {str(dtype).removeprefix('torch.')}, as it "
        "does where experts are near a tie: rows were judged by how many of the original's jump, "
        f"and how far, in {noise.num_samples} other roundings of it. In float32 each row was "
        "judged by the strict rule."
    ]


def _plan_notes(references: References, window: int) -> list[str]:
    notes = []
    longest = max(len(trace.tokens) for trace in references.traces)
    if window >= longest:
        notes.append(
            f"The sliding window of {window} tokens was read from the model's own mask but not "
            f"exercised: the longest replayed sequence has {longest} tokens."
        )
    if not references.is_exact:
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
