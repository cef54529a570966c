"""Rows that others must not feel: of NaN, infinity, huge and tiny values, and ends of ranges.

Whatever adds rows up, or looks at the largest of all, shows beside one of them. Owns the rows and
which of them the program as uploaded takes, not what is compared.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import TensorSpec
from runtime.proving.comparing import Outputs

logger = logging.getLogger(__name__)

Inputs = list[torch.Tensor]

FACTOR = 1e4
HUGE = 1e30
# Of integers that declare no range, rising, as far as their dtype has them.
INTEGERS = (0, 1, 100, 2**15 - 1, 2**24 + 1, 2**31 - 1, 2**63 - 1)
NEGATIVE = (-1, -100, -(2**31), 1 - 2**63)
SLOWER = 10.0  # times: such an integer is a number of elements, and the next would fill memory
LEAST_SLOW_SECONDS = 0.2


def neighbours(
    model: TensorProgram, row: Inputs, another: Inputs, specs: Sequence[TensorSpec]
) -> Iterator[tuple[str, Inputs, Outputs]]:
    """What may stand beside `row`, one row each, by name, with the answers of both. Each is made
    of `another` row of the program's inputs. NaN (`another` itself, where there are no real
    numbers) is never left out and raises what the program raises; all others only where the
    program takes them."""
    for name, other in _real_rows(another, specs):
        inputs = [torch.cat(pair) for pair in zip(row, other, strict=True)]
        if name in ("NaN", "another row"):
            yield name, other, model.run(inputs)
        elif (outputs := _try(model.run, inputs)) is not None:
            yield name, other, outputs
    if any(tensor.is_cuda for tensor in model.state.values()):
        return  # there a refused index ends the process
    for values in (INTEGERS, NEGATIVE):
        most_seconds = math.inf
        for value in values:
            other = [_integer(*pair, value) for pair in zip(another, specs, strict=True)]
            if all(left is right for left, right in zip(another, other, strict=True)):
                continue
            started = time.monotonic()
            inputs = [torch.cat(pair) for pair in zip(row, other, strict=True)]
            outputs = _try(model.run, inputs)
            seconds = time.monotonic() - started
            if outputs is None or seconds > most_seconds:
                break
            most_seconds = min(most_seconds, SLOWER * seconds + LEAST_SLOW_SECONDS)
            yield f"integers of {value:,}", other, outputs


def _try(run: Callable[[Inputs], Outputs], inputs: Inputs) -> Outputs | None:
    try:
        return run(inputs)
    except Exception:  # a stranger's graph may raise anything
        logger.info("a neighbour is refused", exc_info=True)
        return None


def _real_rows(row: Inputs, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, Inputs]]:
    """Inputs that a kind says nothing of keep their values."""
    if not any(_is_real(tensor) for tensor in row):
        yield "another row", row
    else:
        for name, value in (
            ("NaN", math.nan),
            ("infinity", math.inf),
            ("-infinity", -math.inf),
            (f"values of {HUGE:g}", HUGE),
            ("zeros", 0.0),
        ):
            yield name, [_filled(tensor, value) for tensor in row]
        yield f"{FACTOR:g} times its values", [t * FACTOR if _is_real(t) else t for t in row]
    if any(spec.minimum is not None and spec.maximum is not None for spec in specs):
        for end in ("minimum", "maximum"):
            yield (
                f"each declared {end}",
                [_end(*pair, end) for pair in zip(row, specs, strict=True)],
            )


def _is_real(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _filled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Of real numbers; infinity is what half precision makes of what it cannot hold."""
    if not _is_real(tensor):
        return tensor
    if math.isfinite(value) and value > torch.finfo(tensor.dtype).max:
        value = math.inf
    return torch.full_like(tensor, value)


def _end(
    tensor: torch.Tensor, spec: TensorSpec, end: Literal["minimum", "maximum"]
) -> torch.Tensor:
    value: float | None = getattr(spec, end)
    if spec.minimum is None or spec.maximum is None or value is None:
        return tensor
    if _is_real(tensor):
        return _filled(tensor, value)
    return torch.full_like(tensor, bool(value) if tensor.dtype is torch.bool else int(value))


def _integer(tensor: torch.Tensor, spec: TensorSpec, value: int) -> torch.Tensor:
    if _is_real(tensor) or tensor.dtype is torch.bool or None not in (spec.minimum, spec.maximum):
        return tensor
    limits = torch.iinfo(tensor.dtype)
    return torch.full_like(tensor, value) if limits.min <= value <= limits.max else tensor
