"""Catches programs that load and run, but cannot be what their owner meant to upload: weights
that are not numbers, and outputs that no input can change.

What shows only in runs (outputs that never change though they could) is the proof's to find.
"""

from collections.abc import Mapping

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from runtime.importing.program import ImportFailure

CHUNK_ELEMENTS = 1 << 22  # looked at together, so that large weights take little memory


def check_weights(state: Mapping[str, torch.Tensor]) -> None:
    """Raises `ImportFailure` naming the tensors that hold NaN. Infinities are left alone: masks
    have them."""
    damaged = [name for name, tensor in state.items() if _has_nan(tensor)]
    if damaged:
        shown = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if damaged[5:] else "")
        raise ImportFailure(
            "nan_weights",
            f"The model's weights are not all numbers: {shown} hold NaN, as after a training that "
            "diverged, so its answers would be NaN too. Save a checkpoint from before that.",
        )


def _has_nan(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return False
    flat = tensor.detach().reshape(-1)
    return any(bool(chunk.isnan().any()) for chunk in flat.split(CHUNK_ELEMENTS))


def check_outputs(program: ExportedProgram, names: list[str]) -> list[str]:
    """Which of the outputs `names` (the tensors, in order) no input can change. Raises
    `ImportFailure` if that is all of them."""
    constant = [name for name, is_tied in zip(names, _ties(program), strict=True) if not is_tied]
    if constant and len(constant) == len(names):
        raise constant_failure(constant)
    return constant


def unread_inputs(program: ExportedProgram, names: list[str]) -> list[str]:
    """Which of the inputs `names` (the tensors, in order) nothing reads."""
    user_inputs = set(program.graph_signature.user_inputs)
    nodes = [
        node
        for node in program.graph.nodes
        if node.op == "placeholder"
        and node.name in user_inputs
        and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    return [name for name, node in zip(names, nodes, strict=True) if not node.users]


def constant_failure(names: list[str]) -> ImportFailure:
    """The refusal of a program whose answers are always the same."""
    return ImportFailure(
        "constant_output",
        f"The model's answer is always the same: {', '.join(names[:5])} cannot depend on any "
        "input. Values were probably fixed while exporting, for example by .item(), numpy, or a "
        "tensor made outside of forward(). Compute them from the inputs inside forward() and "
        "export again.",
    )


def _ties(program: ExportedProgram) -> list[bool]:
    """Of every tensor output, whether something of the inputs reaches it."""
    groups = _Aliases()
    user_inputs = set(program.graph_signature.user_inputs)
    result: list[bool] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in user_inputs:
                groups.tie(node)
        elif node.op == "output":
            values = [value for value in _flat(node.args[0]) if isinstance(value, Node)]
            specs = program.graph_signature.output_specs
            kinds = [spec.kind.name for spec in specs if hasattr(spec.arg, "name")]
            pairs = zip(values, kinds, strict=False)
            result = [
                groups.is_tied(value)
                for value, kind in pairs
                if kind == "USER_OUTPUT" and isinstance(value.meta.get("val"), torch.Tensor)
            ]
        else:
            _follow(node, groups)
    return result


def _follow(node: Node, groups: "_Aliases") -> None:
    """Ties what an operator gives, and what it writes to, if anything that it reads is."""
    aliased = _aliased_arguments(node)
    for argument, _ in aliased:
        groups.join(node, argument)
    if any(groups.is_tied(argument) for argument in node.all_input_nodes):
        groups.tie(node)
        for argument, is_written in aliased:
            if is_written:
                groups.tie(argument)


def _aliased_arguments(node: Node) -> list[tuple[Node, bool]]:
    """The arguments that the result shares memory with, and whether they are written to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    found: list[tuple[Node, bool]] = []
    for position, argument in enumerate(schema.arguments):
        given = node.kwargs.get(argument.name)
        if position < len(node.args):
            given = node.args[position]
        if argument.alias_info is not None:
            nodes = [value for value in _flat(given) if isinstance(value, Node)]
            found += [(value, argument.alias_info.is_write) for value in nodes]
    return found


def _flat(value: object) -> list[object]:
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


class _Aliases:
    """Nodes that may share memory, as groups; a group is tied once one of it is."""

    def __init__(self) -> None:
        self._parents: dict[Node, Node] = {}
        self._tied: set[Node] = set()

    def _root(self, node: Node) -> Node:
        while (parent := self._parents.get(node)) is not None:
            node = parent
        return node

    def join(self, one: Node, other: Node) -> None:
        left, right = self._root(one), self._root(other)
        if left is right:
            return
        self._parents[left] = right
        if left in self._tied:
            self._tied.add(right)

    def tie(self, node: Node) -> None:
        self._tied.add(self._root(node))

    def is_tied(self, node: Node) -> bool:
        return self._root(node) in self._tied
