"""Reads a tensor program's wire schema off its graph signature: names, dtypes, dynamic axes.

Owns naming and the question which axis is the batch. Does not load or run programs.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import bound_sympy

from runtime.batching.tensors import show_shape
from runtime.importing.program import ImportFailure
from runtime.protocol import Schema, TensorSpec

# What each torch dtype is on the wire. bfloat16 has no numpy name, so it travels as float32,
# which holds every bfloat16 exactly.
WIRE_DTYPES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "float32",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.uint64: "uint64",
    torch.bool: "bool",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}
# `Dim.DYNAMIC` and `Dim.AUTO` write 2 as their least size, but promise nothing about 0 and 1:
# torch's own check lets smaller sizes pass, and so does this.
UNPROMISED_MIN = 2


class Leaf(msgspec.Struct, frozen=True, kw_only=True):
    """One flattened input or output: a tensor, or a constant that was fixed at export."""

    spec: TensorSpec | None
    dtype: torch.dtype | None = None
    # The expression of each axis: an int, or a symbol (or arithmetic of symbols).
    axes: tuple[sympy.Expr, ...] = ()
    constant: Any = None


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """Flattened inputs and outputs in the order of the program's call, constants included.

    `batch` are the symbols that all stand for the number of rows: an export that was not told
    that two inputs have equal batches gives each its own. Empty: not batched, and `batch_note`
    says why.
    """

    schema: Schema
    inputs: list[Leaf]
    outputs: list[Leaf]
    ranges: Mapping[Any, Any] = {}  # the sizes that each symbol may stand for
    batch: frozenset[sympy.Expr] = frozenset()
    batch_note: str = ""

    @property
    def is_batch_fixed(self) -> bool:
        """Whether all inputs have a first axis, and one of them is of one size."""
        axes = [leaf.axes[:1] for leaf in self.inputs if leaf.spec]
        return all(axes) and any(axis[0].is_Integer for axis in axes)


def read_signature(program: ExportedProgram) -> Signature:
    """Raises `ImportFailure` for inputs and outputs that have no place on the wire."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs = [
        _leaf(spec.arg, name, values, program, "input")
        for spec, name in zip(_user_inputs(program), _input_names(program), strict=True)
    ]
    outputs = [
        _leaf(spec.arg, name, values, program, "output")
        for spec, name in zip(_user_outputs(program), _output_names(program), strict=True)
    ]
    if not any(leaf.spec for leaf in inputs) or not any(leaf.spec for leaf in outputs):
        raise ImportFailure(
            "no_tensors", "The program must take at least one tensor and return at least one."
        )
    lines = _reexport_lines([leaf for leaf in inputs if leaf.spec])
    batch, note = find_batch(inputs, outputs, program.range_constraints, lines)
    schema = Schema(
        inputs=[leaf.spec for leaf in inputs if leaf.spec],
        outputs=[leaf.spec for leaf in outputs if leaf.spec],
        is_batched=bool(batch),
    )
    return Signature(
        schema=schema,
        inputs=inputs,
        outputs=outputs,
        ranges=program.range_constraints,
        batch=frozenset(batch),
        batch_note=note,
    )


def axis_bounds(expression: sympy.Expr, ranges: Mapping[Any, Any]) -> tuple[int, int | None]:
    """The least and greatest size an axis may have, by the ranges of its symbols (as torch.export
    keeps them); None is unbounded."""
    if expression.is_Integer:
        return int(expression), int(expression)  # type: ignore[arg-type]
    bounds = bound_sympy(expression, dict(ranges))
    lower = 0 if bounds.lower in (-int_oo, -sympy.oo) else max(0, int(bounds.lower))  # type: ignore[arg-type]
    upper = None if bounds.upper in (int_oo, sympy.oo) else int(bounds.upper)  # type: ignore[arg-type]
    return (lower if lower > UNPROMISED_MIN else min(lower, 1)), upper


def describe_schema(schema: Schema) -> str:
    """Inputs and outputs in one line, as `image float32 [n, 1, 8, 8] -> logits float32 [n, 10]`."""
    sides = [
        ", ".join(f"{spec.name} {spec.dtype} {show_shape(spec)}" for spec in specs)
        for specs in (schema.inputs, schema.outputs)
    ]
    return " -> ".join(sides)


# --- names ------------------------------------------------------------------------------


def _user_inputs(program: ExportedProgram) -> list[Any]:
    specs = program.graph_signature.input_specs
    return [spec for spec in specs if spec.kind is InputKind.USER_INPUT]


def _user_outputs(program: ExportedProgram) -> list[Any]:
    specs = program.graph_signature.output_specs
    return [spec for spec in specs if spec.kind is OutputKind.USER_OUTPUT]


def _input_names(program: ExportedProgram) -> list[str]:
    """`forward`'s argument names; for nested arguments, the names torch made of their paths."""
    specs = _user_inputs(program)
    entry = program.module_call_graph[0].signature
    names = list(entry.forward_arg_names or []) if entry else []
    if len(names) != len(specs):
        names = [spec.arg.name for spec in specs]
    return names


def _output_names(program: ExportedProgram) -> list[str]:
    """`output` for a single tensor, `output_0`.. for a sequence, keys for a dict; nested ones
    join their path with `_`."""
    specs = _user_outputs(program)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None, "an exported program knows its outputs"
    tree = pytree.tree_unflatten(range(len(specs)), out_spec)
    names = []
    for path, _ in pytree.tree_flatten_with_path(tree)[0]:
        words = [_key_word(key) for key in path]
        is_named = bool(words) and not words[0].isdigit()
        names.append("_".join(words if is_named else ["output", *words]))
    if len(set(names)) != len(names):
        raise ImportFailure(
            "output_names", "Two outputs of the program have the same name; rename one."
        )
    return names


def _key_word(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return str(key.idx)
    if isinstance(key, pytree.MappingKey):
        return str(key.key)
    return str(getattr(key, "name", key)).strip(".[]'\"")


# --- shapes -----------------------------------------------------------------------------


def _leaf(
    argument: Any, name: str, values: dict[str, Any], program: ExportedProgram, what: str
) -> Leaf:
    if isinstance(argument, ConstantArgument):
        return Leaf(spec=None, constant=argument.value)
    value = values.get(getattr(argument, "name", ""))
    if not isinstance(argument, TensorArgument) or not isinstance(value, torch.Tensor):
        raise ImportFailure(
            "non_tensor",
            f"The {what} {name!r} is a Python number whose value may change; only tensors have a "
            f"place in a request. Pass it as a tensor, and export again.",
        )
    if value.dtype not in WIRE_DTYPES or value.layout is not torch.strided:
        raise ImportFailure(
            "dtype",
            f"The {what} {name!r} has dtype {value.dtype} and layout {value.layout}, which no "
            "client can send or read. Convert it inside the model, for example to float32.",
        )
    axes = tuple(_expression(size) for size in value.shape)
    bounds = [axis_bounds(axis, program.range_constraints) for axis in axes]
    is_dynamic = any(not axis.is_Integer for axis in axes)
    spec = TensorSpec(
        name=name,
        dtype=WIRE_DTYPES[value.dtype],
        shape=[int(axis) if axis.is_Integer else None for axis in axes],  # type: ignore[arg-type]
        min_shape=[lower for lower, _ in bounds] if is_dynamic else None,
        max_shape=[upper for _, upper in bounds] if is_dynamic else None,
    )
    return Leaf(spec=spec, dtype=value.dtype, axes=axes)


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


# --- the batch --------------------------------------------------------------------------


def find_batch(
    inputs: list[Leaf], outputs: list[Leaf], ranges: Mapping[Any, Any], lines: str
) -> tuple[set[sympy.Expr], str]:
    """The symbols of the batch, if axis 0 of everything is one of them and no other axis is; if
    not, the note that says why and what to do. `lines` are those that export the program with a
    dynamic batch."""
    tensors = [leaf for leaf in inputs if leaf.spec]
    for leaf in tensors:
        if not leaf.axes:
            return set(), (
                f"The input {_name(leaf)!r} is a scalar, which requests cannot share: they run one "
                "at a time. To allow batching, give it one value per row."
            )
        if not leaf.axes[0].is_Symbol:
            return set(), (
                f"The batch dimension of {_name(leaf)!r} is fixed at {leaf.axes[0]}: requests run "
                f"one at a time. To allow batching, export with a dynamic first axis:\n{lines}"
            )
    batch = {leaf.axes[0] for leaf in tensors}
    for leaf in [*tensors, *(leaf for leaf in outputs if leaf.spec)]:
        if not leaf.axes or leaf.axes[0] not in batch:
            return set(), (
                f"The first axis of {_name(leaf)!r} is not the batch of {_name(tensors[0])!r}: "
                "requests run one at a time. To allow batching, every output must have one row for "
                "each row of the inputs."
            )
        if any(batch & axis.free_symbols for axis in leaf.axes[1:]):
            return set(), (
                f"The shape of {_name(leaf)!r} depends on the batch beyond its first axis, so "
                "that rows depend on each other: requests run one at a time."
            )
    least = max(axis_bounds(symbol, ranges)[0] for symbol in batch)
    if least > 1:
        return set(), (
            f"The program wants a batch of at least {least}, and a request may have one row: "
            "requests run one at a time."
        )
    return batch, ""


def _name(leaf: Leaf) -> str:
    assert leaf.spec is not None, "constants were left out"
    return leaf.spec.name


def _reexport_lines(inputs: list[Leaf]) -> str:
    axes = ", ".join(
        f'"{leaf.spec.name}": {{0: batch}}' if leaf.axes else f'"{leaf.spec.name}": None'
        for leaf in inputs
        if leaf.spec
    )
    return (
        '    batch = torch.export.Dim("batch")  # and example inputs with a batch of 2\n'
        f"    program = torch.export.export(model, example, dynamic_shapes={{{axes}}})\n"
        '    torch.export.save(program, "model.pt2")'
    )
