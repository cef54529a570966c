"""Proves the graph of a model with a head: that its logits are those of transformers' own forward.

The original runs each row alone, without padding; the graph runs them alone, side by side, and
padded among longer ones. Owns the tolerance and what of rows may be compared.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.importing.exported import ExportedProgramModel, first_line
from runtime.importing.heads import TOKENS, HeadInput, HeadModel, load_head_module
from runtime.importing.heads_layout import HeadLayout
from runtime.protocol import Check
from runtime.proving.memory import available_bytes
from runtime.proving.original import TOLERANCE_FACTOR, TOLERANCE_FLOOR

logger = logging.getLogger(__name__)

# Lengths of the rows that are compared: several of one length, and all mixed.
LENGTHS = (1, 2, 5, 5, 17, 17, 33, 64)
LONGER = (128, 256, 512, 1024)  # one row each, padded beside the next one
LONGEST = 2048  # beyond it a row of full length is not run: attention's memory is its square
MOST_UNENDING = 512  # of LONGER, where the full length is not run either
NUM_FIXED = 4  # rows, where nothing about a row's shape varies

Row = dict[str, Tensor]  # inputs by name, without the batch axis
Logits = list[Tensor]  # of one row, in the order of the outputs


@dataclass(frozen=True)
class HeadProof:
    """`is_equal`: the graph computes what the model does. `pads_harmlessly`: also for rows that
    are padded."""

    checks: list[Check]
    is_equal: bool
    pads_harmlessly: bool
    longest_padded: int  # of the rows that were padded, or that others were padded to
    notes: list[str]


@dataclass(frozen=True)
class _Reference:
    """Exact logits of each row, and per output how much a result may differ from them."""

    rows: list[Row]
    logits: list[Logits]
    tolerances: list[float]
    is_exact: bool  # computed in float64


def prove_head(layout: HeadLayout, model: HeadModel, program: ExportedProgramModel) -> HeadProof:
    """`program` is the export of `model`, loaded again from its file."""
    rows = _rows(model)
    reference = _consult(layout, model, program, rows)
    indices = list(range(len(rows)))
    checks = [
        _check("alone", "each row by itself", model, program, reference, [[i] for i in indices])
    ]
    groups = _groups(rows)
    if program.schema.is_batched and groups:
        what = "beside other rows of its size"
        checks.append(_check("rows", what, model, program, reference, groups))
    is_equal = all(check.is_equal for check in checks)
    pads_harmlessly = False
    if is_equal and model.bounds and program.schema.is_batched:
        what = "padded beside rows of other lengths, in two orders"
        few = indices[: len(LENGTHS)]
        batches = [few, few[::-1], indices[:3]]
        # Longer ones by pairs, with a short one: each may be the first that is treated otherwise.
        batches += [[0, index - 1, index] for index in indices[len(LENGTHS) :]]
        checks.append(_check("padded", what, model, program, reference, batches))
        pads_harmlessly = checks[-1].is_equal
    notes = []
    if model.bounds and not pads_harmlessly:
        notes.append(
            "Rows of different lengths do not share runs or requests: padded, their answers would "
            "not be those that they get alone."
        )
    if not reference.is_exact:
        notes.append(
            "The original could not be run in float64 here (memory, or an operation without it); "
            "its own dtype was the reference, with the smallest tolerance."
        )
    longest = max(next(iter(row.values())).shape[0] for row in rows)
    return HeadProof(checks, is_equal, pads_harmlessly, longest, notes)


# --- rows -------------------------------------------------------------------------------


def _rows(model: HeadModel) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    if not model.bounds:
        return [_row(model.inputs, {}, generator) for _ in range(NUM_FIXED)]
    ((axis, (least, most, example)),) = model.bounds.items()
    lengths = list(LENGTHS) if axis == TOKENS else [least, example, example, example + least]
    lengths = [length if most is None else min(length, most) for length in lengths]
    if axis == TOKENS:
        end = most if most is not None and most <= LONGEST else MOST_UNENDING + 1
        lengths += [length for length in LONGER if lengths[-1] < length < end]
    if most is not None and lengths[-1] < most <= LONGEST:
        lengths.append(most)  # positions that the tables lack show only here
    return [_row(model.inputs, {axis: length}, generator) for length in lengths]


def _row(inputs: list[HeadInput], sizes: dict[str, int], generator: torch.Generator) -> Row:
    row: Row = {}
    for each in inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in each.axes[1:]]
        if each.most is None:
            row[each.name] = torch.randn(shape, generator=generator)
        elif each.name == "attention_mask":
            row[each.name] = torch.ones(shape, dtype=torch.long)
        else:
            row[each.name] = torch.randint(each.most + 1, shape, generator=generator)
            if each.pad and each.name == "input_ids":  # inside a row it means something else
                row[each.name][row[each.name] == each.pad] = 0
    return row


def _groups(rows: list[Row]) -> list[list[int]]:
    """Rows of equal sizes, where there are several."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        size = tuple(next(iter(row.values())).shape)
        by_size.setdefault(size, []).append(index)
    return [group for group in by_size.values() if len(group) > 1]


def _batch(model: HeadModel, rows: Sequence[Row]) -> list[Tensor]:
    """Padded on the right to the longest, as requests are."""
    tensors = []
    for each in model.inputs:
        values = [row[each.name] for row in rows]
        longest = max(value.shape[0] for value in values)
        padded = [_padded(value, longest, each.pad) for value in values]
        tensors.append(torch.stack(padded))
    return tensors


def _padded(value: Tensor, longest: int, pad: int) -> Tensor:
    missing = value.new_full((longest - value.shape[0], *value.shape[1:]), pad)
    return torch.cat([value, missing])


# --- the original -----------------------------------------------------------------------


def _consult(
    layout: HeadLayout, model: HeadModel, program: ExportedProgramModel, rows: list[Row]
) -> _Reference:
    names = [spec.name for spec in program.schema.outputs]
    original = load_head_module(layout)
    own = [_original_logits(original, row, names) for row in rows]
    exact, is_exact = own, False
    num_parameters = sum(parameter.numel() for parameter in original.parameters())
    if 9 * num_parameters <= available_bytes():
        try:
            wide = original.double()
            exact, is_exact = [_original_logits(wide, row, names) for row in rows], True
        except Exception:  # an operation without float64; whatever it raises
            logger.info("the original does not run in float64", exc_info=True)
    dtype = next(iter(model.module.parameters())).dtype
    floor = TOLERANCE_FLOOR if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    tolerances = []
    for at in range(len(names)):
        values = torch.cat([logits[at].flatten().double() for logits in exact])
        pairs = zip(own, exact, strict=True)
        noise = max(_difference(left[at], right[at]) for left, right in pairs)
        span = float(values.max() - values.min()) or float(values.abs().max())
        tolerances.append(max(TOLERANCE_FACTOR * noise, floor * span))
    return _Reference(rows, exact, tolerances, is_exact)


@torch.inference_mode()
def _original_logits(original: torch.nn.Module, row: Row, names: list[str]) -> Logits:
    dtype = next(original.parameters()).dtype
    options = {
        name: (value.to(dtype) if value.is_floating_point() else value)[None]
        for name, value in row.items()
    }
    output = original(**options, return_dict=True)
    return [output[name][0] for name in names]


# --- the comparisons --------------------------------------------------------------------


def _check(
    name: str,
    what: str,
    model: HeadModel,
    program: ExportedProgramModel,
    reference: _Reference,
    batches: Sequence[list[int]],
) -> Check:
    """The error is a multiple of what is allowed."""
    detail = f"{what}, against transformers' own forward of each row alone in " + (
        "float64" if reference.is_exact else "its own dtype"
    )
    worst = 0.0
    try:
        for batch in batches:
            outputs = program.run(_batch(model, [reference.rows[index] for index in batch]))
            worst = max(worst, _worst(outputs, batch, reference))
    except Exception as error:  # what a stranger's model raises is an answer too
        logger.info("%s failed", name, exc_info=True)
        detail, worst = f"{what}: the graph fails ({first_line(error)})", math.inf
    return Check(
        name=f"head, {name}",
        is_equal=worst <= 1.0,
        detail=detail,
        error=worst if math.isfinite(worst) else None,
        tolerance=1.0,
    )


def _worst(outputs: list[Tensor], batch: list[int], reference: _Reference) -> float:
    """What padding gave an output beyond a row's own length is not looked at."""
    worst = 0.0
    for at, allowed in enumerate(reference.tolerances):
        for found, index in zip(outputs[at], batch, strict=True):
            expected = reference.logits[index][at]
            own = found[: expected.shape[0]] if expected.dim() else found
            if difference := _difference(own, expected):
                worst = max(worst, difference / allowed if allowed else math.inf)
    return worst


def _difference(left: Tensor, right: Tensor) -> float:
    """Infinite where one of them is not a number."""
    if left.shape != right.shape:
        return math.inf
    difference = (left.double() - right.double()).abs().nan_to_num(nan=math.inf)
    return float(difference.max()) if difference.numel() else 0.0
