"""Proves a tensor program: that it runs, repeats itself, and gives a row the same answer
whatever shares its batch. Owns the checks and the verdict; inputs and tolerance are beside it.
"""

import logging
from collections.abc import Callable

import msgspec
import torch

from runtime.importing.exported import first_line, mutation_failure
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import Check, Schema, Verdict
from runtime.proving.comparing import (
    Outputs,
    compare,
    finite,
    is_logits,
    same_bits,
    take_rows,
)
from runtime.proving.constant_outputs import constant_warnings
from runtime.proving.inputs import InputMaker, find_inputs
from runtime.proving.neighbours import neighbours
from runtime.proving.padding import find_padding
from runtime.proving.reference import Tolerance, find_tolerance

logger = logging.getLogger(__name__)

NUM_ALONE = 4  # rows whose answers alone are what the batched ones are compared with

Report = Callable[[float, str], None]


class TensorProof(msgspec.Struct, frozen=True, kw_only=True):
    """`is_batched` is whether requests may share runs, of up to `max_rows` rows; `schema` the
    program's, which says so too, and where rows may be padded. `makers` gave inputs the program
    ran on. `warnings` say, by output, what looks wrong though nothing failed."""

    verdict: Verdict
    checks: list[Check]
    is_batched: bool
    schema: Schema
    max_rows: int
    makers: list[InputMaker]
    notes: list[str]
    warnings: dict[str, str] = {}


def prove_tensor(
    model: TensorProgram,
    max_batch_rows: int = 64,
    report: Report = lambda *_: None,
    own_inputs: list[torch.Tensor] | None = None,
) -> TensorProof:
    """`report` takes a fraction and a line; `own_inputs` are its owner's. Raises `ImportFailure`
    for a program that does not run, or that changes itself as it runs."""
    versions = _versions(model)
    report(0.0, "finding inputs that the program accepts")
    makers = find_inputs(model)
    _check_state(model, versions)
    checks = [_check_outputs(model, makers), _check_repeat(model, makers[0])]
    is_as_declared, is_repeatable = (check.is_equal for check in checks)
    warnings = constant_warnings(model, makers[0])
    notes: list[str] = []
    if not is_repeatable:
        notes.append(
            "The program gives different answers to the same input (it draws random numbers): "
            "nothing could be proved about it, and requests run one at a time."
        )
    if not is_as_declared:
        notes.append(
            f"The program's outputs are not those that its file declares ({checks[0].detail}): "
            "nothing could be proved about it, and requests run one at a time. Correct what the "
            "file says of its outputs."
        )
    is_batched = model.schema.is_batched and is_repeatable and is_as_declared
    max_rows = 1
    if is_batched:
        limits = [spec.max_shape[0] for spec in model.schema.inputs if spec.max_shape]
        max_rows = min([max_batch_rows, *(limit for limit in limits if limit is not None)])
        report(0.3, f"comparing rows in batches of up to {max_rows} with rows alone")
        batch_checks = _check_batches(model, makers, max_rows, report)
        if own_inputs is not None and (own := check_own_inputs(model, own_inputs, max_rows)):
            batch_checks.append(own)
        checks += batch_checks
        failed = [check for check in batch_checks if not check.is_equal]
        is_batched = not failed
        if failed:
            notes.append(
                f"Batching would change the answers ({failed[0].name}: {failed[0].detail}): "
                "requests run one at a time, exactly as the program was uploaded. A row's output "
                "must depend on that row alone, which batch statistics and sums over axis 0 break."
            )
    schema = msgspec.structs.replace(model.schema, is_batched=is_batched)
    if is_batched and all(spec.padded_axis is None for spec in schema.inputs):
        report(0.9, "looking whether rows of different lengths may be padded to share a run")
        padding, padding_checks = find_padding(model, makers[0], max_rows)
        checks += padding_checks
        schema = schema if padding is None else padding.apply(schema)
    _check_state(model, versions)
    report(1.0, f"{sum(check.is_equal for check in checks)} of {len(checks)} checks hold")
    verdict: Verdict = "equal" if is_repeatable and is_as_declared else "unproved"
    return TensorProof(
        verdict=verdict,
        checks=checks,
        is_batched=is_batched,
        schema=schema,
        max_rows=max_rows if is_batched else 1,
        makers=makers,
        notes=notes,
        warnings=warnings,
    )


# --- single runs ------------------------------------------------------------------------


def _versions(model: TensorProgram) -> dict[str, int]:
    """How often each tensor of the program was written to, by torch's own count."""
    return {name: tensor._version for name, tensor in model.state.items()}


def _check_state(model: TensorProgram, before: dict[str, int]) -> None:
    changed = [name for name, count in _versions(model).items() if count != before[name]]
    if changed:
        raise mutation_failure(changed)


def _check_outputs(model: TensorProgram, makers: list[InputMaker]) -> Check:
    """That outputs have the shapes the schema promises, and are finite for finite inputs."""
    num_not_finite = 0
    for maker in makers:
        outputs = model.run(maker.make(2))
        for output, spec in zip(outputs, model.schema.outputs, strict=True):
            sizes = zip(output.shape, spec.shape, strict=False)
            if output.dim() != len(spec.shape) or any(n not in (size, None) for size, n in sizes):
                return Check(
                    name="outputs",
                    is_equal=False,
                    detail=f"{spec.name!r} has shape {list(output.shape)}, not {spec.shape}",
                )
            if output.dtype is not getattr(torch, spec.dtype):
                dtype = str(output.dtype).removeprefix("torch.")
                detail = f"{spec.name!r} has dtype {dtype}, not {spec.dtype}"
                return Check(name="outputs", is_equal=False, detail=detail)
            num_not_finite += int((~output.isfinite()).sum())
    detail = f"shapes and dtypes as declared, for {len(makers)} choices of sizes"
    if num_not_finite:
        detail += f"; {num_not_finite} values are NaN or infinite on random inputs"
    return Check(name="outputs", is_equal=True, detail=detail)


def _check_repeat(model: TensorProgram, maker: InputMaker) -> Check:
    inputs = maker.make(2)
    first, second = model.run(inputs), model.run(inputs)
    is_same = all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    if is_same:
        return Check(name="repeat", is_equal=True, detail="two runs on one input agree bit for bit")
    tolerance = find_tolerance(model, [inputs], [first], has_reference=False)
    error, is_equal = compare(first, second, tolerance)
    return Check(
        name="repeat",
        is_equal=is_equal,
        detail="two runs on one input; error in multiples of what is allowed",
        error=finite(error),
        tolerance=1.0,
    )


# --- batches ----------------------------------------------------------------------------


def _check_batches(
    model: TensorProgram, makers: list[InputMaker], largest: int, report: Report
) -> list[Check]:
    if largest < 2:
        return [Check(name="batch sizes", is_equal=False, detail="a run takes one row at most")]
    checks: list[Check] = []
    try:
        for index, maker in enumerate(makers[:2]):
            suffix = ", other sizes" if index else ""
            checks += [
                msgspec.structs.replace(check, name=check.name + suffix)
                for check in _check_sizes(model, maker, largest)
            ]
            report(0.6 + 0.3 * index, f"{checks[-1].name}: {checks[-1].detail}")
    except Exception as error:  # a stranger's graph may raise anything
        logger.info("a batch failed", exc_info=True)
        detail = f"the program fails on some batch sizes ({first_line(error)})"
        checks.append(Check(name="batch sizes", is_equal=False, detail=detail))
    return checks


def _check_sizes(model: TensorProgram, maker: InputMaker, largest: int) -> list[Check]:
    rows = maker.make(largest)
    picked = sorted({*range(min(NUM_ALONE, largest)), largest - 1})
    alone = {row: model.run(take_rows(rows, [row])) for row in picked}
    tolerance = find_tolerance(
        model, [take_rows(rows, [row]) for row in picked], [alone[row] for row in picked]
    )
    checks = [_noise_check(tolerance)]
    together: Outputs = []
    for size in sorted({2, 3, largest} & set(range(2, largest + 1))):
        together = model.run([tensor[:size] for tensor in rows])
        compared = {row: answer for row, answer in alone.items() if row < size}
        checks.append(_batch_check(f"batch of {size}", compared, together, tolerance))
    checks.append(_check_neighbours(model, rows, alone[0], tolerance))
    if logits := [index for index, output in enumerate(alone[0]) if is_logits(output)]:
        checks.append(_top_1_check(alone, together, logits, tolerance))
    return checks


def check_own_inputs(
    model: TensorProgram, inputs: list[torch.Tensor], largest: int
) -> Check | None:
    """The owner's rows together against themselves alone; None of a single row."""
    num_rows = min(inputs[0].shape[0], largest)
    if num_rows < 2:
        return None
    picked = sorted({*range(min(NUM_ALONE, num_rows)), num_rows - 1})
    rows = [take_rows(inputs, [row]) for row in picked]
    alone = [model.run(row) for row in rows]
    together = model.run([tensor[:num_rows] for tensor in inputs])
    tolerance = find_tolerance(model, rows, alone)
    return _batch_check(
        f"your inputs, batch of {num_rows}",
        dict(zip(picked, alone, strict=True)),
        together,
        tolerance,
    )


def _noise_check(tolerance: Tolerance) -> Check:
    known = [deviation for deviation in tolerance.deviations if deviation is not None]
    what = "largest absolute difference of an output from the program in float64"
    if not known:
        what = "the program does not run in float64; the tolerance is a share of the output range"
    return Check(
        name="float64",
        is_equal=True,
        detail=what,
        error=max(known) if known else None,
        tolerance=max(tolerance.allowed),
    )


def _batch_check(
    name: str, alone: dict[int, Outputs], together: Outputs, tolerance: Tolerance
) -> Check:
    pairs = [
        compare(answer, take_rows(together, [row]), tolerance) for row, answer in alone.items()
    ]
    return Check(
        name=name,
        is_equal=all(is_equal for _, is_equal in pairs),
        detail=f"{len(pairs)} rows against themselves alone; error in multiples of what is allowed",
        error=finite(max(error for error, _ in pairs)),
        tolerance=1.0,
    )


def _check_neighbours(
    model: TensorProgram, rows: list[torch.Tensor], alone: Outputs, tolerance: Tolerance
) -> Check:
    """A row beside rows that show whatever adds rows up, however faintly, or is opened by what
    another row holds."""
    row, other = take_rows(rows, [0]), take_rows(rows, [1])
    worst, worst_name = 0.0, ""
    names: list[str] = []
    for name, _, answers in neighbours(model, row, other, model.schema.inputs):
        error, _ = compare(alone, take_rows(answers, [0]), tolerance)
        names.append(name)
        if error > worst:
            worst, worst_name = error, name
    detail = f"a row beside rows of {len(names)} kinds ({', '.join(names)}), against it alone"
    if worst > 1.0:
        detail = f"a row beside a row of {worst_name}, against it alone"
    return Check(
        name="neighbours",
        is_equal=worst <= 1.0,
        detail=detail,
        error=finite(worst),
        tolerance=1.0,
    )


def _top_1_check(
    alone: dict[int, Outputs], together: Outputs, logits: list[int], tolerance: Tolerance
) -> Check:
    """Agreement of the largest value along the last axis, ties within the tolerance aside."""
    num_agreed = num_clear = 0
    for index in logits:
        for row, answer in alone.items():
            expected, actual = answer[index], together[index][row : row + 1]
            top = expected.double().topk(2, dim=-1).values
            is_clear = (top[..., 0] - top[..., 1]) > 2 * tolerance.allowed[index]
            is_agreed = expected.argmax(-1) == actual.argmax(-1)
            num_clear += int(is_clear.sum())
            num_agreed += int((is_clear & is_agreed).sum())
    return Check(
        name="top-1",
        is_equal=num_agreed == num_clear,
        detail=f"{num_agreed} of {num_clear} clear largest values agree",
    )
