"""Writes the targets and arguments of a graph's nodes as plain values, and reads them.

Numbers, text and None are themselves; everything else is a map with one key that says what it is.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from runtime.compiling.plans.plan import PlanUnusable
from runtime.execution import ops

# Where the functions that a graph calls are found, by how their names begin.
_ROOTS: dict[str, Any] = {"torch.ops": torch.ops, "operator": operator, "ops": ops, "torch": torch}
_KINDS: dict[type, str] = {
    torch.dtype: "dtype",
    torch.memory_format: "memory_format",
    torch.layout: "layout",
}


def name_function(function: Any) -> str:
    """Raises `PlanUnusable` for what is not found by a name."""
    if isinstance(function, torch._ops.OpOverload):
        namespace, _, name = function._schema.name.partition("::")
        return f"torch.ops.{namespace}.{name}.{function._overloadname}"
    name = getattr(function, "__name__", "")
    for root, owner in _ROOTS.items():
        if name and getattr(owner, name, None) is function:
            return f"{root}.{name}"
    raise PlanUnusable(f"the graph calls {function}, which has no name of its own")


def find_function(name: str) -> Callable[..., Any]:
    """Raises `PlanUnusable` for a name that this release does not know."""
    for root, owner in _ROOTS.items():
        if name.startswith(f"{root}."):
            try:
                return operator.attrgetter(name.removeprefix(f"{root}."))(owner)
            except (AttributeError, RuntimeError) as error:
                raise PlanUnusable(f"there is no {name}") from error
    raise PlanUnusable(f"there is no {name}")


def write_argument(value: Any) -> Any:
    """Raises `PlanUnusable` for a value of a kind that graphs do not have."""
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if kind := _KINDS.get(type(value)):
        return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [write_argument(each) for each in value]}
    if isinstance(value, Mapping):
        return {"map": {str(key): write_argument(each) for key, each in value.items()}}
    raise PlanUnusable(f"the graph holds a {type(value).__name__}")


def read_argument(value: Any, nodes: dict[str, fx.Node]) -> Any:
    """What `write_argument` wrote."""
    if not isinstance(value, dict):
        return value
    (kind, content), *rest = value.items()
    assert not rest, "one key says what it is"
    if kind == "node":
        return nodes[content]
    if kind == "device":
        return torch.device(content)
    if kind == "map":
        return {key: read_argument(each, nodes) for key, each in content.items()}
    if kind in ("list", "tuple"):
        values = [read_argument(each, nodes) for each in content]
        return values if kind == "list" else tuple(values)
    assert kind in _KINDS.values(), kind
    return getattr(torch, content)
