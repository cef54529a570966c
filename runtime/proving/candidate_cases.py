"""What candidates are asked to prove that they are the program: inputs, and its own answers.

Drawn once for all candidates of a program, since the float64 reference costs more than they do.
"""

import logging
from collections.abc import Callable, Sequence

import msgspec

from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import Schema
from runtime.proving.candidate_case import Case, Inputs
from runtime.proving.comparing import take_rows
from runtime.proving.inputs import InputMaker
from runtime.proving.neighbours import neighbours
from runtime.proving.reference import find_tolerance
from runtime.proving.unusual_cases import draw_unusual

logger = logging.getLogger(__name__)

MAX_MAKERS = 3  # choices of sizes of dynamic axes other than the batch
SMALL_SIZES = (1, 2, 3, 7)  # batch sizes: one, few, and an odd number
NUM_SEEDS = 2
MAX_EXAMPLES = 8
WIDE_FACTOR = 4.0

Report = Callable[[float, str], None]
Neighbours = Sequence[tuple[str, Inputs]]


class Cases(msgspec.Struct, frozen=True):
    """`is_batched`: rows of different requests share runs, so rows are compared one by one."""

    generated: list[Case]
    examples: list[Case]  # of the owner
    is_batched: bool
    unusual: list[Case] = []
    neighbours: Neighbours = []  # one row each, that rows must not feel

    @property
    def rows(self) -> Case:
        """The one whose rows are also run alone and beside others."""
        return max((case for case in self.generated if case.name == "small"), key=_num_elements)


def draw_cases(
    program: TensorProgram,
    makers: Sequence[InputMaker],
    schema: Schema,
    max_rows: int,
    examples: Sequence[Inputs],
    report: Report = lambda *_: None,
) -> Cases:
    """`schema` is the manifest's: it knows whether rows may share a run, and be padded. Examples
    that the program as uploaded does not take are left out."""
    generated: list[Case] = []
    for index, maker in enumerate(makers[:MAX_MAKERS]):
        report(index / MAX_MAKERS, "asking the program as uploaded, and its float64 form")
        generated += _draw(program, maker, schema, max_rows, is_first=index == 0)
    known: list[Case] = []
    for inputs in examples[:MAX_EXAMPLES]:
        try:
            known += _cases(program, [("example", inputs)], ())
        except Exception:  # an example is a stranger's as well
            logger.info("an example does not run", exc_info=True)
    is_batched = schema.is_batched and max_rows > 1
    cases = Cases(generated, known, is_batched)
    most = max_rows if is_batched else max(SMALL_SIZES)
    unusual = draw_unusual(program, schema.inputs, cases.rows.inputs, most)
    cases = msgspec.structs.replace(cases, unusual=unusual)
    if not cases.is_batched:
        return cases
    row, another = (take_rows(cases.rows.inputs, [at]) for at in (0, -1))
    beside = [(name, other) for name, other, _ in neighbours(program, row, another, schema.inputs)]
    return msgspec.structs.replace(cases, neighbours=beside)


def _draw(
    program: TensorProgram, maker: InputMaker, schema: Schema, max_rows: int, *, is_first: bool
) -> list[Case]:
    has_rows = bool(program.signature.batch)
    limit = max_rows if schema.is_batched else max(SMALL_SIZES)
    sizes = [size for size in SMALL_SIZES if size <= limit] if has_rows else [1]
    seeds = range(NUM_SEEDS if is_first else 1)
    small = [("small", maker.make(size, 1 + seed)) for seed in seeds for size in sizes]
    if padded := _pad(small[-1][1], schema):
        small.append(("padded", padded))
    full = []
    if is_first and schema.is_batched and max_rows > max(sizes):
        full = [("full", maker.make(max_rows, 1 + NUM_SEEDS))]
    cases = _cases(program, small, full)
    if is_first and (wide := _widen(small[-1][1], schema)):
        cases += _cases(program, [("wide", wide)], ())
    return cases


def _cases(
    program: TensorProgram, small: Sequence[tuple[str, Inputs]], full: Sequence[tuple[str, Inputs]]
) -> list[Case]:
    """The tolerance is found on the small batches: in float64 a full one would take long."""
    batches = [inputs for _, inputs in small]
    results = [program.run(inputs) for inputs in batches]
    tolerance = find_tolerance(program, batches, results, is_strict=True)
    cases = [
        Case(name, inputs, result, tolerance)
        for (name, inputs), result in zip(small, results, strict=True)
    ]
    return cases + [Case(name, inputs, program.run(inputs), tolerance) for name, inputs in full]


def _pad(inputs: Inputs, schema: Schema) -> Inputs | None:
    """The batch with the end of its last row as padding, where runs may hold such rows."""
    if not any(spec.padded_axis is not None for spec in schema.inputs):
        return None
    padded = []
    for tensor, spec in zip(inputs, schema.inputs, strict=True):
        copy = tensor.clone()
        if spec.padded_axis is not None:
            length = tensor.shape[spec.padded_axis]
            tail = copy[-1:].narrow(spec.padded_axis, (length + 1) // 2, length // 2)
            tail.fill_(spec.pad_value)
        padded.append(copy)
    return padded


def _widen(inputs: Inputs, schema: Schema) -> Inputs | None:
    """The batch with larger values, of floating inputs whose range is not known; None: of none."""
    is_wide = [
        tensor.is_floating_point() and spec.minimum is None and spec.maximum is None
        for tensor, spec in zip(inputs, schema.inputs, strict=True)
    ]
    if not any(is_wide):
        return None
    pairs = zip(inputs, is_wide, strict=True)
    return [tensor * WIDE_FACTOR if wide else tensor for tensor, wide in pairs]


def _num_elements(case: Case) -> int:
    return sum(tensor.numel() for tensor in case.inputs)
