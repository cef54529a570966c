"""Finds out whether rows of different lengths may be padded to share a run of a tensor program.

Harmless is what gives the same answers for every length tried, and goes on doing so when the
padded part of whatever is not itself a mask is filled with random and extreme values: an answer
that is merely right on zeros does not count. Owns the rule and the checks, not the runs.
"""

import logging
import math
from collections.abc import Iterator, Sequence

import msgspec
import sympy
import torch

from runtime.importing.exported import first_line
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import Check, Schema
from runtime.proving.comparing import finite
from runtime.proving.inputs import InputMaker
from runtime.proving.padding_reach import find_reach
from runtime.proving.padding_runs import run_error
from runtime.proving.padding_trial import (
    NUM_ROWS,
    Trial,
    draw_trial,
    is_mask_like,
    pad_rules,
    padded_symbol,
)

logger = logging.getLogger(__name__)


class Padding(msgspec.Struct, frozen=True):
    """Axes by input and by output, None where there is no such axis; values by input. `free` are
    the inputs whose padded part may hold anything; no run of more than `longest` is padded."""

    input_axes: list[int | None]
    output_axes: list[int | None]
    values: list[float]
    free: list[int] = []
    longest: int | None = None

    def apply(self, schema: Schema) -> Schema:
        """The schema with this in it."""
        inputs = [
            msgspec.structs.replace(
                spec,
                padded_axis=axis,
                pad_value=value,
                longest_padded=None if axis is None else self.longest,
            )
            for spec, axis, value in zip(schema.inputs, self.input_axes, self.values, strict=True)
        ]
        outputs = [
            msgspec.structs.replace(spec, padded_axis=axis)
            for spec, axis in zip(schema.outputs, self.output_axes, strict=True)
        ]
        return msgspec.structs.replace(schema, inputs=inputs, outputs=outputs)


def find_padding(
    model: TensorProgram, maker: InputMaker, max_rows: int
) -> tuple[Padding | None, list[Check]]:
    """For a program whose rows may share runs of up to `max_rows`. No checks where it has no axis
    to pad."""
    symbol = padded_symbol(model)
    if symbol is None:
        return None, []
    try:
        return _find(model, maker, symbol, max_rows)
    except Exception as error:  # a stranger's graph may raise anything
        logger.info("padding could not be tried", exc_info=True)
        detail = f"the program fails on padded rows ({first_line(error)})"
        return None, [Check(name="padding", is_equal=False, detail=detail)]


def _find(
    model: TensorProgram, maker: InputMaker, symbol: sympy.Symbol, max_rows: int
) -> tuple[Padding | None, list[Check]]:
    """Masks may show or hide with their ones."""
    found: tuple[Padding | None, list[Check]] = (None, [])
    for shown in (1, 0):
        trial = draw_trial(model, maker, symbol, max_rows, shown)
        if trial is None:
            break
        padding, checks = _judge(model, trial, pad_rules(model, trial, 1 - shown))
        if padding is not None:
            reach = find_reach(model, maker, symbol, trial, padding.values, padding.free, shown)
            padding = msgspec.structs.replace(padding, longest=reach.length)
            checks.append(reach.check())
        if padding is not None or not found[1]:
            found = padding, checks
        if padding is not None or not any(
            axis is not None and is_mask_like([batch[at] for batch in trial.batches])
            for at, axis in enumerate(trial.input_axes)
        ):
            break
    return found


# --- judging ----------------------------------------------------------------------------


def _judge(
    model: TensorProgram, trial: Trial, rules: Iterator[list[float]]
) -> tuple[Padding | None, list[Check]]:
    names = [spec.name for spec in model.schema.inputs]
    best = math.inf
    for values in rules:
        error = _error(model, trial, values, {})
        best = min(best, error)
        if error > 1.0:
            continue
        sensitive, worst = _sensitive(model, trial, values)
        padded = _padded_check(trial, names, values, error)
        strangers = [at for at in sensitive if not _may_mask(trial, at)]
        if strangers or worst > 1.0:
            shows = ", ".join(repr(names[at]) for at in strangers) or "the inputs together"
            return None, [
                padded,
                _filled_check(f"what {shows} has in the padded part shows", worst),
            ]
        masks = ", ".join(repr(names[at]) for at in sensitive)
        filled = f"everything but {masks}" if masks else "every input"
        what = f"random and extreme values in the padded part of {filled}"
        free = [at for at in range(len(names)) if at not in sensitive]
        padding = Padding(trial.input_axes, trial.output_axes, values, free)
        return padding, [padded, _filled_check(what, worst)]
    detail = f"padding changes the answers of rows of {_say(trial.lengths)}"
    return None, [
        Check(name="padding", is_equal=False, detail=detail, error=finite(best), tolerance=1.0)
    ]


def _may_mask(trial: Trial, at: int) -> bool:
    """Integers may say themselves where a row ends; real numbers only as zeros and ones."""
    tensors = [batch[at] for batch in trial.batches]
    return not tensors[0].is_floating_point() or is_mask_like(tensors)


def _sensitive(model: TensorProgram, trial: Trial, values: list[float]) -> tuple[list[int], float]:
    """The inputs whose padded part must have its value; and the error with that of all others
    filled, or, if one may mask nothing, with its own."""
    padded = [at for at, axis in enumerate(trial.input_axes) if axis is not None]
    alone = {
        at: max(_error(model, trial, values, {at: row[at]}) for row in trial.fillings)
        for at in padded
    }
    sensitive = [at for at in padded if alone[at] > 1.0]
    if strangers := [alone[at] for at in sensitive if not _may_mask(trial, at)]:
        return sensitive, max(strangers)
    free = [at for at in padded if at not in sensitive]
    filled = [{at: row[at] for at in free} for row in trial.fillings]
    return sensitive, max(_error(model, trial, values, each) for each in filled)


def _error(
    model: TensorProgram, trial: Trial, values: list[float], filled: dict[int, torch.Tensor]
) -> float:
    """The largest error, as a multiple of what is allowed: of rows of all lengths in one run, and
    of many short ones in another. `filled` has a row by input whose values stand in the padded
    part instead."""
    some = [(at, NUM_ROWS) for at in range(len(trial.lengths))]
    many = [(at, trial.num_short_rows) for at in (0, 1)]
    return max(
        run_error(model, trial, values, filled, some, trial.padded_length),
        run_error(model, trial, values, filled, many, trial.lengths[2]),
    )


# --- checks -----------------------------------------------------------------------------


def _padded_check(
    trial: Trial, names: Sequence[str], values: Sequence[float], error: float
) -> Check:
    rule = ", ".join(
        f"{name!r} with {value:g}"
        for name, axis, value in zip(names, trial.input_axes, values, strict=True)
        if axis is not None
    )
    return Check(
        name="padding",
        is_equal=error <= 1.0,
        detail=f"rows of {_say(trial.lengths)} in one run, padding {rule}, against rows of equal "
        "length; error in multiples of what is allowed",
        error=finite(error),
        tolerance=1.0,
    )


def _filled_check(what: str, error: float) -> Check:
    return Check(
        name="padding, filled",
        is_equal=error <= 1.0,
        detail=what,
        error=finite(error),
        tolerance=1.0,
    )


def _say(lengths: Sequence[int]) -> str:
    return f"lengths {', '.join(map(str, lengths))}"
