"""Rows of several lengths, with the answers that they get unpadded, and ways to pad them.

Owns what `padding.py` tries, not what follows from it.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence

import msgspec
import sympy
import torch

from runtime.importing.signature import axis_bounds
from runtime.importing.tensor_program import TensorProgram
from runtime.proving.comparing import Outputs
from runtime.proving.inputs import InputMaker
from runtime.proving.reference import Tolerance, find_tolerance

logger = logging.getLogger(__name__)

NUM_ROWS = 2  # of each length
LEAST_RUN_ROWS = 16  # that a run must take, for rows of all lengths to fit into one
MAX_SHORT_ROWS = 32  # of the two shortest, where a maximum over time has least to hide in
MORE = (5, 3)  # lengths beyond the usual one, and padding beyond the longest
MAX_RULES = 16
FAR = 10.0  # times the largest value seen, for inputs that declare no range

Inputs = list[torch.Tensor]


def padded_symbol(model: TensorProgram) -> sympy.Symbol | None:
    """The one symbol, besides the batch, of the inputs' axes, if it is no input's twice and no
    part of a larger expression."""
    symbols: set[sympy.Expr] = set()
    for leaf in (leaf for leaf in model.signature.inputs if leaf.spec):
        dynamic = [axis for axis in leaf.axes[1:] if not axis.is_Integer]
        if len(dynamic) > 1 or any(not axis.is_Symbol for axis in dynamic):
            return None
        symbols |= set(dynamic)
    (symbol,) = symbols if len(symbols) == 1 else (None,)
    return symbol if isinstance(symbol, sympy.Symbol) else None


class Trial(msgspec.Struct):
    """Rows of several lengths, longest last, with their answers."""

    lengths: list[int]
    padded_length: int  # of a run of all of them
    num_short_rows: int  # of the two shortest
    batches: list[Inputs]
    answers: list[Outputs]
    fillings: list[Inputs]  # one row each, of the padded length
    input_axes: list[int | None]
    output_axes: list[int | None]
    tolerance: Tolerance


def draw_trial(
    model: TensorProgram, maker: InputMaker, symbol: sympy.Symbol, max_rows: int, shown: int
) -> Trial | None:
    """Rows whose masks begin with `shown`, as many as make runs of up to `max_rows`. None where
    too few lengths run, or where outputs cannot be cut back along one axis."""
    axes = [
        leaf.axes.index(symbol) if symbol in leaf.axes else None
        for leaf in model.signature.inputs
        if leaf.spec
    ]
    if max_rows < LEAST_RUN_ROWS:
        return None
    num_short_rows = min(MAX_SHORT_ROWS, max_rows // 2)
    first = next(at for at, axis in enumerate(axes) if axis is not None)
    usual = maker.make(1)[first].shape[axes[first] or 0]
    least, most = axis_bounds(symbol, model.signature.ranges)
    limit = math.inf if most is None else most
    wanted = {least, 1, 2, 3, usual // 2, usual, usual + MORE[0]}
    lengths: list[int] = []
    batches: list[Inputs] = []
    answers: list[Outputs] = []
    for length in sorted(size for size in wanted if max(1, least) <= size <= limit):
        rows = num_short_rows if len(lengths) < 2 else NUM_ROWS
        batch = shown_rows(maker.resized(symbol, length).make(rows, seed=length), axes, shown)
        try:
            answers.append(model.run(batch))
        except Exception:  # a kernel, say, that is longer than the row
            logger.info("rows of length %d do not run", length, exc_info=True)
            continue
        lengths.append(length)
        batches.append(batch)
    if len(lengths) < 3:
        return None
    output_axes = _output_axes(lengths, answers)
    if output_axes is None:
        return None
    padded_length = int(min(lengths[-1] + MORE[1], limit))
    longest = maker.resized(symbol, padded_length)
    ranges = [(spec.minimum, spec.maximum) for spec in model.schema.inputs]
    return Trial(
        lengths=lengths,
        padded_length=padded_length,
        num_short_rows=num_short_rows,
        batches=batches,
        answers=answers,
        fillings=list(_fillings(longest.make(1, seed=7), ranges)),
        input_axes=axes,
        output_axes=output_axes,
        tolerance=find_tolerance(model, batches, answers),
    )


def _output_axes(lengths: Sequence[int], answers: Sequence[Outputs]) -> list[int | None] | None:
    """Of each output, the axis as long as the rows; None where one changes in another way."""
    axes: list[int | None] = []
    for outputs in zip(*answers, strict=True):
        if len({output.dim() for output in outputs}) > 1:
            return None
        dynamic = [
            at for at in range(1, outputs[0].dim()) if len({o.shape[at] for o in outputs}) > 1
        ]
        if not dynamic:
            axes.append(None)
            continue
        (axis,) = dynamic if len(dynamic) == 1 else (0,)
        if [output.shape[axis] for output in outputs] != list(lengths):
            return None
        axes.append(axis)
    return axes


# --- values -----------------------------------------------------------------------------


def is_mask_like(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether it holds nothing but zeros and ones."""
    return all(bool(((each == 0) | (each == 1)).all()) for each in tensors)


def shown_rows(batch: Inputs, axes: Sequence[int | None], value: int) -> Inputs:
    """What may be a mask has `value` first: a row that is hidden as a whole has no answer to
    speak of."""
    shown = [tensor.clone() for tensor in batch]
    for tensor, axis in zip(shown, axes, strict=True):
        if axis is not None and is_mask_like([tensor]):
            tensor.select(axis, 0).fill_(value)
    return shown


def _fillings(row: Inputs, ranges: Sequence[tuple[float | None, float | None]]) -> Iterator[Inputs]:
    """Random legal values, then the least and the greatest."""
    yield row
    for pick in (0, 1):
        extremes = []
        for tensor, limits in zip(row, ranges, strict=True):
            declared = limits[pick]
            if declared is not None:
                value = declared
            elif tensor.is_floating_point():
                value = (FAR if pick else -FAR) * float(tensor.abs().max() or 1.0)
            elif tensor.dtype is torch.bool:
                value = bool(pick)
            else:
                value = int(tensor.max() if pick else tensor.min())
            extremes.append(torch.full_like(tensor, value))
        yield extremes


def pad_rules(model: TensorProgram, trial: Trial, hidden: int) -> Iterator[list[float]]:
    """Pad values by input to try: what tables name as padding, then zeros; `hidden` for masks."""
    named = _padding_ids(model)
    choices: list[list[float]] = []
    for at, axis in enumerate(trial.input_axes):
        tensors = [batch[at] for batch in trial.batches]
        if axis is not None and is_mask_like(tensors):
            choices.append([float(hidden)])
        elif axis is None or tensors[0].is_floating_point() or tensors[0].is_complex():
            choices.append([0.0])
        else:
            choices.append([*dict.fromkeys([*named, 0.0])])
    return itertools.islice(map(list, itertools.product(*choices)), MAX_RULES)


def _padding_ids(model: TensorProgram) -> list[float]:
    """The `padding_idx` of the program's embeddings."""
    if model.program is None:
        return []
    found = set()
    for node in model.program.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            index = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx", -1)
            if isinstance(index, int) and index >= 0:
                found.add(float(index))
    return sorted(found)
