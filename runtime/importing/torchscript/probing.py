"""Finds out by running it which axes of a TorchScript module may vary, and what its outputs are.

An axis that its owner calls dynamic is one only if the module runs with other sizes there: a
traced module may have its example's sizes baked in.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

import msgspec
import sympy
import torch

from runtime.importing.exported import first_line
from runtime.importing.program import ImportFailure
from runtime.importing.signature import WIRE_DTYPES
from runtime.protocol import InputHint

logger = logging.getLogger(__name__)

BATCH = "batch"
BATCH_SIZES = (2, 1)  # a batch of 1 only where no other runs
# Of other dynamic axes, until one runs; examples come first.
COMMON_SIZES = (8, 16, 32, 64, 128, 224, 256, 512, 4, 3, 2, 1)

# Flat tensors in, in the order of the descriptions; names and flat tensors out.
Call = Callable[[list[torch.Tensor]], tuple[list[str], list[torch.Tensor]]]


class OutputAxis(msgspec.Struct, frozen=True):
    """A size of an output: `factor * symbol + offset`, or, without a symbol, `offset`. A symbol
    that no input has stands for a size that only a run knows."""

    symbol: str = ""
    factor: tuple[int, int] = (1, 1)  # numerator and denominator
    offset: int = 0

    def expression(self) -> sympy.Expr:
        """As `Signature` holds it."""
        if not self.symbol:
            return sympy.Integer(self.offset)
        return sympy.Rational(*self.factor) * symbol(self.symbol) + self.offset


class OutputDescription(msgspec.Struct, frozen=True):
    name: str
    dtype: str  # torch's name
    axes: list[OutputAxis]


class Description(msgspec.Struct, frozen=True):
    """What runs have shown: inputs with only those axes named that may vary, `sizes` that all of
    them ran with, and the outputs."""

    inputs: list[InputHint]
    outputs: list[OutputDescription]
    sizes: dict[str, int]
    notes: list[str] = []


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a named axis."""
    return sympy.Symbol(name, integer=True, positive=True)


def probe(
    hints: Sequence[InputHint], call: Call, examples: Sequence[torch.Tensor] | None
) -> Description:
    """Raises `ImportFailure` when no sizes run."""
    prober = _Prober(hints, call, examples)
    sizes, first = prober.find_base()
    results: list[tuple[dict[str, int], list[torch.Tensor]]] = [(sizes, first)]
    fixed: dict[str, int] = {}
    for name in sizes:
        changed = prober.vary(sizes, name)
        if changed and name == BATCH and (rows := _baked_rows([first, *_outputs_of(changed)])):
            return probe([_with_fixed(hint, {BATCH: rows}) for hint in hints], call, examples)
        if changed:
            results += changed
        else:
            fixed[name] = sizes[name]
    inputs = [_with_fixed(hint, fixed) for hint in hints]
    varying = {name: size for name, size in sizes.items() if name not in fixed}
    return Description(
        inputs=inputs,
        outputs=_outputs(prober.output_names, results),
        sizes=varying,
        notes=[_fixed_note(name, size) for name, size in fixed.items() if name != BATCH],
    )


def _outputs_of(
    results: Sequence[tuple[dict[str, int], list[torch.Tensor]]],
) -> list[list[torch.Tensor]]:
    return [outputs for _, outputs in results]


def _baked_rows(results: Sequence[list[torch.Tensor]]) -> int | None:
    """How many rows all outputs have, whatever the batch: a traced `view(1, -1)` does not fail on
    other batches, but lays their rows side by side."""
    rows = {tensor.shape[0] if tensor.dim() else 0 for outputs in results for tensor in outputs}
    return rows.pop() if len(rows) == 1 and rows != {0} else None


class _Prober:
    """Runs the module on inputs of chosen sizes."""

    def __init__(
        self, hints: Sequence[InputHint], call: Call, examples: Sequence[torch.Tensor] | None
    ) -> None:
        self._hints, self._call, self._examples = hints, call, examples
        self.bounds: dict[str, tuple[int, int | None]] = {}
        for hint in hints:
            for axis in hint.axes:
                if isinstance(axis, str):
                    self.bounds.setdefault(axis, (1, None))
            self.bounds.update(hint.bounds)
        self.output_names: list[str] = []

    def find_base(self) -> tuple[dict[str, int], list[torch.Tensor]]:
        """The first sizes that run, and their outputs."""
        failure: Exception | None = None
        for sizes in self._candidates():
            try:
                return sizes, self.run(sizes)
            except ImportFailure:
                raise
            except Exception as error:  # a stranger's module may raise anything
                logger.info("sizes %s do not run", sizes, exc_info=True)
                failure = failure or error
        assert failure is not None, "there is always one candidate"
        shown = "\n".join(f"    {hint.text}" for hint in self._hints)
        raise ImportFailure(
            "does_not_run",
            f"The model does not run on inputs as described ({first_line(failure)}). They were "
            f"described as:\n{shown}\nSay them as the model takes them, and build again.",
            param="inputs",
        ) from failure

    def vary(
        self, sizes: Mapping[str, int], name: str
    ) -> list[tuple[dict[str, int], list[torch.Tensor]]]:
        """Runs with other sizes of one axis; empty where the module takes but the one. A batch
        must be able to have any size."""
        size = sizes[name]
        wanted = (size + 1, size + 3) if name == BATCH else (size + 1, 2 * size, 3 * size, size - 1)
        found = []
        for other in wanted:
            least, most = self.bounds[name]
            if other < least or (most is not None and other > most):
                continue
            changed = {**sizes, name: other}
            try:
                found.append((changed, self.run(changed)))
            except ImportFailure:
                raise
            except Exception:  # as above
                logger.info("%s does not run with %s of %d", name, name, other, exc_info=True)
                if name == BATCH:
                    return []
        return found

    def run(self, sizes: Mapping[str, int]) -> list[torch.Tensor]:
        tensors = [self._tensor(index, sizes) for index in range(len(self._hints))]
        self.output_names, outputs = self._call(tensors)
        return outputs

    def _tensor(self, index: int, sizes: Mapping[str, int]) -> torch.Tensor:
        hint = self._hints[index]
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in hint.axes]
        dtype: torch.dtype = getattr(torch, hint.dtype)
        generator = torch.Generator().manual_seed(index)
        least = hint.minimum if hint.minimum is not None else 0.0
        most = hint.maximum if hint.maximum is not None else 1.0
        if dtype.is_complex:
            return torch.randn(shape, dtype=dtype, generator=generator)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        values = least + (most - least) * uniform
        example = self._examples[index] if self._examples is not None else None
        if not dtype.is_floating_point and hint.minimum is None and example is not None:
            values = _repeat(example.double(), shape)
        elif not dtype.is_floating_point:
            values = values.round()
        return values.to(dtype)

    def _candidates(self) -> Iterator[dict[str, int]]:
        known: dict[str, int] = {}
        for hint, example in zip(self._hints, self._examples or [], strict=False):
            known |= {
                axis: size
                for axis, size in zip(hint.axes, example.shape, strict=False)
                if isinstance(axis, str)
            }
        others = [name for name in self.bounds if name != BATCH]
        batches = [*BATCH_SIZES, known.get(BATCH, 1)]
        for batch in batches:
            tried = [{name: known[name] for name in others}] if known.keys() >= {*others} else []
            tried += [{name: self._clamp(name, size) for name in others} for size in COMMON_SIZES]
            for sizes in tried if others else [{}]:
                yield sizes | ({BATCH: batch} if BATCH in self.bounds else {})

    def _clamp(self, name: str, size: int) -> int:
        least, most = self.bounds[name]
        return max(least, size if most is None else min(size, most))


def _repeat(example: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The example's values in another shape."""
    flat = example.reshape(-1)
    num_elements = int(torch.tensor(list(shape)).prod()) if shape else 1
    if not flat.numel():
        return torch.zeros(list(shape))
    return flat.repeat(-(-num_elements // flat.numel()))[:num_elements].reshape(list(shape))


def _with_fixed(hint: InputHint, fixed: Mapping[str, int]) -> InputHint:
    axes = [fixed.get(axis, axis) if isinstance(axis, str) else axis for axis in hint.axes]
    bounds = {name: sizes for name, sizes in hint.bounds.items() if name not in fixed}
    return msgspec.structs.replace(hint, axes=axes, bounds=bounds)


def _fixed_note(name: str, size: int) -> str:
    return (
        f"The axis {name!r} does not vary in this model: it runs with a size of {size} alone, as "
        "a traced module does whose example had it."
    )


# --- outputs ----------------------------------------------------------------------------


def _outputs(
    names: Sequence[str], results: Sequence[tuple[dict[str, int], list[torch.Tensor]]]
) -> list[OutputDescription]:
    first = results[0][1]
    described = []
    for index, (name, output) in enumerate(zip(names, first, strict=True)):
        seen = [outputs[index] for _, outputs in results if len(outputs) == len(first)]
        if len(seen) != len(results) or any(
            other.dim() != output.dim() or other.dtype != output.dtype for other in seen
        ):
            raise ImportFailure(
                "output_varies",
                f"The output {name!r} has another number of axes or another dtype for other input "
                "sizes, which no schema can say. Give it one form.",
            )
        if output.dtype not in WIRE_DTYPES or output.layout is not torch.strided:
            raise ImportFailure(
                "dtype",
                f"The output {name!r} has dtype {output.dtype} and layout {output.layout}, which "
                "no client can read. Convert it inside the model, for example to float32.",
            )
        axes = [
            _output_axis(name, axis, [(sizes, outputs[index]) for sizes, outputs in results])
            for axis in range(output.dim())
        ]
        dtype = str(output.dtype).removeprefix("torch.")
        described.append(OutputDescription(name, dtype, axes))
    return described


def _output_axis(
    name: str, axis: int, seen: Sequence[tuple[Mapping[str, int], torch.Tensor]]
) -> OutputAxis:
    """How the size follows from one symbol, as far as runs show it."""
    base_sizes, base = seen[0]
    size = base.shape[axis]
    if all(other.shape[axis] == size for _, other in seen):
        return OutputAxis(offset=size)
    causes = {
        changed
        for sizes, other in seen
        if other.shape[axis] != size
        for changed in sizes
        if sizes[changed] != base_sizes[changed]
    }
    if len(causes) == 1:
        (cause,) = causes
        points = [(sizes[cause], other.shape[axis]) for sizes, other in seen]
        if (line := _line(points)) is not None:
            factor, offset = line
            return OutputAxis(cause, (factor.numerator, factor.denominator), offset)
    return OutputAxis(symbol=f"{name}.{axis}")


def _line(points: Sequence[tuple[int, int]]) -> tuple[Fraction, int] | None:
    """Factor and offset of the line through all points; None where there is none."""
    (x, y), (other_x, other_y) = points[0], next(p for p in points if p[0] != points[0][0])
    factor = Fraction(other_y - y, other_x - x)
    offset = y - factor * x
    if offset.denominator != 1 or any(factor * x + offset != y for x, y in points):
        return None
    return factor, int(offset)
