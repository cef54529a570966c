"""Makes inputs that a tensor program accepts, for proof and measurement.

Values lie in the ranges that the schema declares, and follow the example inputs where there are
any, so that token ids stay inside the vocabulary. Owns no judgement of what comes out.
"""

import copy
import logging
from collections.abc import Iterator

import sympy
import torch

from runtime.importing.exported import first_line
from runtime.importing.program import ImportFailure
from runtime.importing.signature import Leaf, axis_bounds
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import TensorSpec

logger = logging.getLogger(__name__)

DEFAULT_SIZE = 8  # of a dynamic axis that nothing else says the size of
MAX_SMALL_INTEGER = 1


class InputMaker:
    """Random inputs of a program, with as many rows as asked for.

    `sizes` fixes the dynamic axes other than the batch; `is_small` keeps integers to 0 and 1,
    for programs whose example inputs do not say what they may be.
    """

    def __init__(
        self, model: TensorProgram, sizes: dict[sympy.Expr, int], *, is_small: bool
    ) -> None:
        self._leaves = [leaf for leaf in model.signature.inputs if leaf.spec]
        self._examples = model.example_inputs
        self._sizes = sizes
        self._batch = model.signature.batch
        self._ranges = model.signature.ranges
        self._is_small = is_small

    def resized(self, symbol: sympy.Expr, size: int) -> "InputMaker":
        """The same with another size of one dynamic axis."""
        other = copy.copy(self)
        other._sizes = self._sizes | {symbol: size}
        return other

    @property
    def has_sizes(self) -> bool:
        """Whether an axis besides the batch is dynamic."""
        return bool(self._sizes.keys() - self._batch)

    def grown(self, size: int) -> "InputMaker":
        """The same with every dynamic axis of that size, as far as its bounds allow; none gets
        smaller. Rows are `make`'s to say."""
        other = copy.copy(self)
        other._sizes = {
            symbol: max(own, _clamp(size, *axis_bounds(symbol, self._ranges)))
            for symbol, own in self._sizes.items()
        }
        return other

    def max_rows(self, most: int) -> int:
        """Up to `most` rows, or as many as the batch may have."""
        bounds = [axis_bounds(symbol, self._ranges)[1] for symbol in self._batch]
        return min([most, *(bound for bound in bounds if bound is not None)]) if bounds else 1

    def make(self, rows: int, seed: int = 0) -> list[torch.Tensor]:
        """Wire tensors in the schema's order; `rows` matters to batched programs only."""
        generator = torch.Generator().manual_seed(seed)
        sizes = self._sizes | dict.fromkeys(self._batch, rows)
        return [
            self._values(index, leaf, [_size(axis, sizes) for axis in leaf.axes], generator)
            for index, leaf in enumerate(self._leaves)
        ]

    def _values(
        self, index: int, leaf: Leaf, shape: list[int], generator: torch.Generator
    ) -> torch.Tensor:
        assert leaf.spec is not None, "constants were left out"
        assert leaf.dtype is not None, "a tensor has a dtype"
        example = self._examples[index] if self._examples else None
        wire_dtype = getattr(torch, leaf.spec.dtype)
        if leaf.dtype is torch.bool:
            return torch.randint(0, 2, shape, generator=generator).bool()
        if not (leaf.dtype.is_floating_point or leaf.dtype.is_complex):
            return self._integers(leaf.spec, example, shape, generator).to(wire_dtype)
        values = torch.randn(shape, generator=generator, dtype=_random_dtype(leaf.dtype))
        if leaf.dtype.is_floating_point:
            if example is not None:
                values = _like(values, example)
            # Rounded to the program's dtype, so that the wire's wider one adds nothing.
            values = _within(values, leaf.spec, example, generator).to(leaf.dtype)
        return values.to(wire_dtype)

    def _integers(
        self,
        spec: TensorSpec,
        example: torch.Tensor | None,
        shape: list[int],
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Of the declared range, ends included; else of the example's; else 0 and 1."""
        is_declared = spec.minimum is not None and spec.maximum is not None
        least, most = 0, MAX_SMALL_INTEGER
        if is_declared:
            least, most = int(spec.minimum or 0), min(int(spec.maximum or 0), 2**63 - 2)
        elif example is not None and example.numel() and not self._is_small:
            least, most = int(example.min()), int(example.max())
        values = torch.randint(least, most + 1, shape, generator=generator)
        return _with_ends(values, least, most) if is_declared else values


def _within(
    values: torch.Tensor,
    spec: TensorSpec,
    example: torch.Tensor | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """Values in the declared range, ends included: evenly spread unless an example says how."""
    if spec.minimum is None or spec.maximum is None:
        return values
    if example is None:
        uniform = torch.rand(values.shape, generator=generator, dtype=values.dtype)
        values = spec.minimum + (spec.maximum - spec.minimum) * uniform
    return _with_ends(values.clamp(spec.minimum, spec.maximum), spec.minimum, spec.maximum)


def _with_ends(values: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """With the least and the greatest value in the first row, and again at the very end."""
    flat = values.reshape(-1)
    row = flat[: values[0].numel()] if values.dim() else flat
    if row.numel() > 1:
        row[0], row[-1] = least, most
    if flat.numel() > row.numel():
        flat[-1] = most
    return values


def find_inputs(model: TensorProgram) -> list[InputMaker]:
    """Makers whose inputs the program runs on, the likeliest kind first; more than one where a
    dynamic axis besides the batch lets sizes vary. Raises `ImportFailure` when none runs."""
    failure: Exception | None = None
    for is_small in (False, True):
        makers = []
        for sizes in _size_choices(model):
            maker = InputMaker(model, sizes, is_small=is_small)
            try:
                model.run(maker.make(2))
            except Exception as error:  # a stranger's graph may raise anything
                logger.info("inputs of sizes %s do not run", sizes, exc_info=True)
                failure = failure or error
                continue
            makers.append(maker)
        if makers:
            return makers
    assert failure is not None, "at least one choice of sizes was tried"
    raise ImportFailure(
        "does_not_run",
        "The program does not run on inputs of the shapes and dtypes that it declares "
        f"({first_line(failure)}). Check that the uploaded file runs.",
    ) from failure


def _size_choices(model: TensorProgram) -> Iterator[dict[sympy.Expr, int]]:
    """Sizes of every dynamic symbol: as in the examples, then larger and smaller ones."""
    bounds = {}
    sizes = {}
    for index, leaf in enumerate(leaf for leaf in model.signature.inputs if leaf.spec):
        for axis, expression in enumerate(leaf.axes):
            for symbol in expression.free_symbols:
                assert isinstance(symbol, sympy.Symbol), "shapes are made of symbols"
                bounds[symbol] = axis_bounds(symbol, model.signature.ranges)
                sizes.setdefault(symbol, _clamp(DEFAULT_SIZE, *bounds[symbol]))
            if expression.is_Symbol and model.example_inputs:
                sizes[expression] = model.example_inputs[index].shape[axis]
    yield sizes
    if sizes.keys() - model.signature.batch:
        for change in (3, -1):
            yield {
                symbol: _clamp(max(1, size + change), *bounds[symbol])
                for symbol, size in sizes.items()
            }


def _clamp(size: int, least: int, most: int | None) -> int:
    return max(least, size if most is None else min(size, most))


def _size(axis: sympy.Expr, sizes: dict[sympy.Expr, int]) -> int:
    return int(axis.subs(sizes))  # type: ignore[arg-type]


def _random_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_complex or dtype is torch.float64 else torch.float32


def _like(values: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """`values`, standard normal, moved to the example's mean and spread."""
    known = example.double()
    known = known[known.isfinite()]
    if known.numel() < 2 or known.std() == 0:
        return values
    return (values * known.std() + known.mean()).to(values.dtype)
