"""What a candidate must answer as well beyond usual values: real numbers of other sizes, ties, and
integers anywhere in their dtype, where an input declares no range.

Each batch has its own tolerance. Real numbers are compared only where the program as uploaded is
finite and its float64 form agrees that the number can be written down; NaN inputs are never drawn.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import TensorSpec
from runtime.proving.candidate_case import Case, Inputs
from runtime.proving.comparing import Outputs
from runtime.proving.neighbours import LEAST_SLOW_SECONDS, SLOWER
from runtime.proving.reference import RANGE_FLOOR, Tolerance

logger = logging.getLogger(__name__)

FACTORS = (16.0, 64.0, 1e3, 1e-3)
NUM_ROWS = 2
STEP = 0.5  # that values are rounded to, for equal ones among them
NOISE_FACTOR = 16.0  # far out, two ways to round may differ more than each from float64
BLIND_SHARE = 1e-3  # of the range, where there is no float64 form


def draw_unusual(
    program: TensorProgram, specs: Sequence[TensorSpec], rows: Inputs, max_rows: int
) -> list[Case]:
    """`rows` are usual ones, at least `NUM_ROWS` where axis 0 is the batch. What the program
    refuses is left out."""
    has_rows = bool(program.signature.batch)
    few = [tensor[:NUM_ROWS] for tensor in rows] if has_rows else rows
    real = [*_scaled(few, specs), *_ties(few, specs, has_rows=has_rows)]
    cases = _answered(program, real)
    if not any(tensor.is_cuda for tensor in program.state.values()):
        # On a GPU an index that is refused ends the process.
        cases += _answered(program, _integers(rows, specs, max_rows if has_rows else 0))
    return cases


# --- real numbers -----------------------------------------------------------------------


def _scaled(rows: Inputs, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, Inputs]]:
    free = [t.is_floating_point() and not _is_ranged(s) for t, s in zip(rows, specs, strict=True)]
    for factor in FACTORS if any(free) else ():
        yield "scaled", [t * factor if own else t for t, own in zip(rows, free, strict=True)]


def _ties(
    rows: Inputs, specs: Sequence[TensorSpec], *, has_rows: bool
) -> Iterator[tuple[str, Inputs]]:
    """Rounded values, rows that are one value throughout, and zeros."""

    def constant(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.reshape(tensor.shape[0] if has_rows and tensor.dim() else 1, -1)
        return flat[:, -1:].expand_as(flat).reshape(tensor.shape).clone() if flat.numel() else flat

    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda tensor: (tensor / STEP).round() * STEP,
        constant,
        torch.zeros_like,
    ]
    if not any(tensor.is_floating_point() for tensor in rows):
        return
    for change in changes:
        pairs = zip(rows, specs, strict=True)
        yield (
            "ties",
            [
                change(t).clamp(s.minimum, s.maximum)
                if _is_bounded(t, s)
                else change(t)
                if t.is_floating_point()
                else t
                for t, s in pairs
            ],
        )


def _is_bounded(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    return tensor.is_floating_point() and (spec.minimum is not None or spec.maximum is not None)


def _is_ranged(spec: TensorSpec) -> bool:
    return spec.minimum is not None and spec.maximum is not None


# --- integers ---------------------------------------------------------------------------


def _values(dtype: torch.dtype) -> list[list[int]]:
    """Sets of values, rising, as far as the dtype has them. Its least is left out where dividing
    it by -1 would end the process."""
    limits = torch.iinfo(dtype)
    if limits.bits <= 16:
        step = 1 if limits.bits == 8 else 251
        return [[*range(limits.min, limits.max + 1, step), limits.max]]
    around = [[n + d for n in (base, -base) for d in (-1, 0, 1)] for base in (2**24, 2**31)]
    sets = [
        [-8, -7, -3, -1, 0, 1, 2, 7, 8],
        [-256, -255, -128, -100, 100, 127, 128, 255, 256],
        [*around[0], 2**24 + 3],
        [*around[1], 4_000_000_000],
        [limits.min + 1, limits.min + 2, limits.max, limits.max - 1, limits.max // 3],
    ]
    fitting = [[v for v in each if limits.min < v <= limits.max] for each in sets]
    return [each for each in fitting if each]


def _integers(
    rows: Inputs, specs: Sequence[TensorSpec], max_rows: int
) -> Iterator[tuple[str, Inputs]]:
    """`max_rows`: 0 where axis 0 is no batch."""
    free = [
        at
        for at, (tensor, spec) in enumerate(zip(rows, specs, strict=True))
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
        and not _is_ranged(spec)
        and tensor.numel()
    ]
    generator = torch.Generator().manual_seed(0)
    sets = {at: _values(rows[at].dtype) for at in free}
    for index in range(max((len(each) for each in sets.values()), default=0)):
        for is_signed in (True, False):
            picked = {at: each[min(index, len(each) - 1)] for at, each in sets.items()}
            if not is_signed:
                picked = {at: [abs(v) for v in each] for at, each in picked.items()}
                picked = {
                    at: [min(v, torch.iinfo(rows[at].dtype).max) for v in each]
                    for at, each in picked.items()
                }
            yield "integers", _filled(rows, picked, max_rows, generator)


def _filled(
    rows: Inputs, values: dict[int, list[int]], max_rows: int, generator: torch.Generator
) -> Inputs:
    """As many rows as hold each of the values once, if there may be so many."""
    inputs = rows
    if max_rows:
        sizes = [
            math.ceil(len(v) * rows[at].shape[0] / rows[at].numel()) for at, v in values.items()
        ]
        num_rows = min(max_rows, max([NUM_ROWS, *sizes]))
        picked = torch.arange(num_rows) % rows[0].shape[0]
        inputs = [tensor[picked] for tensor in rows]
    inputs = list(inputs)
    for at, each in values.items():
        size = inputs[at].numel()
        order = torch.randperm(size, generator=generator) % len(each)
        inputs[at] = torch.tensor(each, dtype=inputs[at].dtype)[order].reshape(inputs[at].shape)
    return inputs


# --- answers ----------------------------------------------------------------------------


def _answered(program: TensorProgram, batches: Iterable[tuple[str, Inputs]]) -> list[Case]:
    """With what the program answers, and what of it is compared."""
    taken: list[tuple[str, Inputs, Outputs]] = []
    most_seconds = math.inf
    for name, inputs in batches:
        started = time.monotonic()
        try:
            taken.append((name, inputs, program.run(inputs)))
        except Exception:  # a stranger's graph may raise anything
            logger.info("%s are refused", name, exc_info=True)
            continue
        seconds = time.monotonic() - started
        if seconds > most_seconds:
            break  # an integer that is a number of elements: the next would fill memory
        most_seconds = min(most_seconds, SLOWER * seconds + LEAST_SLOW_SECONDS)
    references = program.run_float64([inputs for _, inputs, _ in taken]) if taken else None
    cases = []
    for index, (name, inputs, outputs) in enumerate(taken):
        known: Sequence[torch.Tensor | None] = [None] * len(outputs)
        if references is not None:
            known = references[index]
        parts = [_compared(name, *pair) for pair in zip(outputs, known, strict=True)]
        tolerance = Tolerance([d for _, d, _ in parts], [allowed for _, _, allowed in parts])
        cases.append(Case(name, inputs, outputs, tolerance, [mask for mask, _, _ in parts]))
    return cases


def _compared(
    name: str, output: torch.Tensor, reference: torch.Tensor | None
) -> tuple[torch.Tensor, float | None, float]:
    """Where an output is compared, how far it is from its float64 form there, and how far that of
    a candidate may be off. Integers are compared everywhere, but not those that rounding far out
    decides, such as the place of the largest of many zeros."""
    if reference is not None and reference.shape != output.shape:
        reference = None
    if not output.is_floating_point():
        mask = torch.ones_like(output, dtype=torch.bool)
        if name != "ties" and reference is not None:
            mask = output == reference
        return mask, None, 0.0
    mask = output.isfinite()
    if reference is not None:
        mask &= reference.isfinite() & (reference.abs() <= torch.finfo(output.dtype).max)
    values = output[mask].double()
    if not values.numel():
        return mask, None, 0.0
    span = float(values.max() - values.min()) or float(values.abs().max())
    if reference is None or reference.dtype is not torch.float64:
        return mask, None, BLIND_SHARE * span
    deviation = float((values - reference[mask]).abs().max())
    return mask, deviation, max(RANGE_FLOOR * span, NOISE_FACTOR * deviation)
