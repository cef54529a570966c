"""What is known of a tensor program's inputs beyond its file: what its owner says, the examples
that came along, and the tables that it looks up.

Puts all of it into the program's schema and example inputs, where proof and measurement find it.
"""

from collections.abc import Mapping, Sequence

import msgspec
import torch

from runtime.importing.examples import Arrays, match_examples
from runtime.importing.input_ranges import find_ranges
from runtime.importing.program import ImportFailure
from runtime.importing.signature import Leaf, Signature, describe_schema
from runtime.importing.tensor_program import TensorProgram
from runtime.protocol import BuildHints, InputHint, Schema, TensorSpec


def inform(model: TensorProgram, hints: BuildHints, examples: Arrays | None) -> None:
    """Changes `model` to know what `hints` and `examples` tell. Raises `ImportFailure` for what
    contradicts the program, unless it was said of an earlier version."""
    note = ""
    said: Sequence[InputHint] = hints.inputs
    try:
        _check_hints(said, model.schema)
    except ImportFailure as failure:
        if not hints.is_remembered:
            raise
        said = []
        note = (
            "What was said of an earlier version's inputs does not fit this one and was left "
            f"aside. {failure.error.message}"
        )
    ranges = _table_ranges(model)
    for hint in said:
        if hint.minimum is not None and hint.maximum is not None:
            ranges[hint.name] = (hint.minimum, hint.maximum)
    set_schema(model, with_ranges(model.schema, ranges))
    if examples is not None:
        model.example_inputs = match_examples(examples, model.schema.inputs)
        _check_values(model.example_inputs, model.schema.inputs)
    if note:
        model.notes = [*model.notes, note]


def with_ranges(schema: Schema, ranges: Mapping[str, tuple[float, float]]) -> Schema:
    """The schema with the least and greatest values of its inputs by name."""
    inputs = [
        msgspec.structs.replace(spec, minimum=ranges[spec.name][0], maximum=ranges[spec.name][1])
        if spec.name in ranges
        else spec
        for spec in schema.inputs
    ]
    return msgspec.structs.replace(schema, inputs=inputs)


def set_schema(model: TensorProgram, schema: Schema) -> None:
    """Gives a program's inputs and outputs, in their order, the specs of `schema`."""
    signature = model.signature
    model.signature = Signature(
        schema=schema,
        inputs=_with_specs(signature.inputs, schema.inputs),
        outputs=_with_specs(signature.outputs, schema.outputs),
        ranges=signature.ranges,
        batch=signature.batch,
        batch_note=signature.batch_note,
    )
    model.schema = schema


def _with_specs(leaves: Sequence[Leaf], specs: Sequence[TensorSpec]) -> list[Leaf]:
    remaining = iter(specs)
    return [
        msgspec.structs.replace(leaf, spec=next(remaining)) if leaf.spec else leaf
        for leaf in leaves
    ]


def _table_ranges(model: TensorProgram) -> dict[str, tuple[float, float]]:
    if model.program is None:
        return {}
    found = find_ranges(model.program)
    names = model.program.graph_signature.user_inputs
    pairs = zip(names, model.signature.inputs, strict=True)
    return {leaf.spec.name: found[str(name)] for name, leaf in pairs if leaf.spec and name in found}


def _check_hints(hints: Sequence[InputHint], schema: Schema) -> None:
    specs = {spec.name: spec for spec in schema.inputs}
    for hint in hints:
        spec = specs.get(hint.name)
        if spec is None:
            raise _unfit(hint, f"is no input of the model, which is {describe_schema(schema)}.")
        # A program's bfloat16 travels as float32.
        if hint.dtype != spec.dtype and (hint.dtype, spec.dtype) != ("bfloat16", "float32"):
            raise _unfit(hint, f"has another dtype in the model: {spec.dtype}.")
        sizes = zip(hint.axes, spec.shape, strict=False)
        if len(hint.axes) != len(spec.shape) or any(
            isinstance(said, int) and size is not None and said != size for said, size in sizes
        ):
            raise _unfit(hint, f"has other axes in the model: {describe_schema(schema)}.")


def _check_values(tensors: Sequence[torch.Tensor], specs: Sequence[TensorSpec]) -> None:
    """That example integers are among the values that the input is known to take."""
    for tensor, spec in zip(tensors, specs, strict=True):
        if spec.minimum is None or spec.maximum is None or not tensor.numel():
            continue
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            continue
        least, most = int(tensor.min()), int(tensor.max())
        if least < spec.minimum or most > spec.maximum:
            raise ImportFailure(
                "examples",
                f"examples.npz gives {spec.name!r} values from {least:,} to {most:,}; the model "
                f"takes {int(spec.minimum):,} to {int(spec.maximum):,}.",
            )


def _unfit(hint: InputHint, reason: str) -> ImportFailure:
    return ImportFailure(
        "inputs", f"The input {hint.name!r}, said to be `{hint.text}`, {reason}", param="inputs"
    )
