"""What a TorchScript module's forward takes and gives, as flat lists of named tensors.

A tuple, list or dict of tensors becomes one input per tensor, named `name_0` or `name_key`.
Numbers and texts keep their defaults; without one, they have no place in a request.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import torch
from torch.utils import _pytree as pytree

from runtime.importing.program import ImportFailure

Kind = Literal["tensor", "optional", "tuple", "list", "dict", "constant"]


class Argument(msgspec.Struct, frozen=True):
    """`size` is how many tensors a tuple has; `default` is what a constant is called with."""

    name: str
    kind: Kind
    size: int = 0
    default: Any = None

    def owns(self, name: str) -> bool:
        """Whether an input of this name would be of this argument."""
        if self.kind in ("tensor", "optional"):
            return name == self.name
        if self.kind == "constant" or not name.startswith(f"{self.name}_"):
            return False
        key = name.removeprefix(f"{self.name}_")
        if self.kind == "tuple":
            return key.isdecimal() and int(key) < self.size
        return bool(key) if self.kind == "dict" else key.isdecimal()

    @property
    def least_names(self) -> list[str]:
        """The inputs that it needs; of a list or dict, as an example."""
        if self.kind == "tuple":
            return [f"{self.name}_{index}" for index in range(self.size)]
        return {
            "tensor": [self.name],
            "list": [f"{self.name}_0"],
            "dict": [f"{self.name}_key"],
        }.get(self.kind, [])


def read_arguments(module: torch.jit.ScriptModule) -> list[Argument]:
    """In the order of forward's call. Raises `ImportFailure` for what no request can hold."""
    forward = getattr(module, "forward", None)
    if forward is None or not hasattr(forward, "schema"):
        raise ImportFailure(
            "torchscript_forward", "The TorchScript module has no forward method to call."
        )
    return [_argument(each) for each in forward.schema.arguments[1:]]


def _argument(each: Any) -> Argument:
    kind, name = each.type.kind(), each.name
    inner = [part.kind() for part in _parts(each.type)]
    if kind == "TensorType":
        return Argument(name, "tensor")
    if kind == "OptionalType" and inner == ["TensorType"]:
        return Argument(name, "optional")
    if kind == "TupleType" and inner and set(inner) == {"TensorType"}:
        return Argument(name, "tuple", size=len(inner))
    if kind == "ListType" and inner == ["TensorType"]:
        return Argument(name, "list")
    if kind == "DictType" and inner == ["StringType", "TensorType"]:
        return Argument(name, "dict")
    if each.has_default_value():
        return Argument(name, "constant", default=each.default_value)
    if kind == "OptionalType":
        return Argument(name, "constant")
    raise ImportFailure(
        "non_tensor",
        f"The input {name!r} is {each.type.annotation_str}, and only tensors have a place in a "
        "request (also in a tuple, list or dict). Give it a default value, or pass it as a "
        "tensor, and save the module again.",
        param=name,
    )


def _parts(kind: Any) -> list[Any]:
    """The types that a container's type is made of."""
    name = kind.kind()
    if name == "TupleType":
        return list(kind.elements())
    if name == "DictType":
        return [kind.getKeyType(), kind.getValueType()]
    return [kind.getElementType()] if name in ("OptionalType", "ListType") else []


def order_names(arguments: Sequence[Argument], names: Sequence[str]) -> list[str]:
    """`names`, in the order of the call. Raises `ImportFailure` for one that is none of the
    module's."""
    for name in names:
        if not any(argument.owns(name) for argument in arguments):
            known = ", ".join(name for argument in arguments for name in _shown_names(argument))
            raise ImportFailure(
                "inputs",
                f"The model has no input {name!r}; its inputs are {known}.",
                param="inputs",
            )
    ordered = []
    for argument in arguments:
        own = [name for name in names if argument.owns(name)]
        if argument.kind in ("list", "tuple"):
            own.sort(key=lambda name: int(name.rpartition("_")[2]))
        ordered += own
    return ordered


def missing_names(arguments: Sequence[Argument], names: Sequence[str]) -> list[str]:
    """Inputs without which forward cannot be called."""
    missing: list[str] = []
    for argument in arguments:
        own = [name for name in names if argument.owns(name)]
        if argument.kind == "list":
            wanted = [f"{argument.name}_{index}" for index in range(max(1, len(own)))]
        else:
            wanted = [] if argument.kind == "dict" and own else argument.least_names
        missing += [name for name in wanted if name not in own]
    return missing


def _shown_names(argument: Argument) -> list[str]:
    if argument.kind == "optional":
        return [f"{argument.name} (may be left out)"]
    return argument.least_names


def make_call(
    arguments: Sequence[Argument], names: Sequence[str], tensors: Sequence[torch.Tensor]
) -> tuple[Any, ...]:
    """Positional arguments of forward from flat tensors, named and ordered by `order_names`."""
    waiting = deque(zip(names, tensors, strict=True))
    call: list[Any] = []
    for argument in arguments:
        own: list[tuple[str, torch.Tensor]] = []
        while waiting and argument.owns(waiting[0][0]):
            own.append(waiting.popleft())
        values = [tensor for _, tensor in own]
        match argument.kind:
            case "tensor" | "optional":
                call.append(values[0] if values else None)
            case "tuple":
                call.append(tuple(values))
            case "list":
                call.append(values)
            case "dict":
                call.append({name[len(argument.name) + 1 :]: value for name, value in own})
            case "constant":
                call.append(argument.default)
    return tuple(call)


def flatten_result(result: Any) -> tuple[list[str], list[torch.Tensor]]:
    """Names and tensors of what forward gave: `output` for a tensor, `output_0`... for a
    sequence, keys for a dict. Raises `ImportFailure` for anything else in it."""
    # Each module defines named tuples of its own, which no registry knows.
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    for path, value in _leaves(result, ()):
        if value is None:
            continue
        name = "_".join(path if path and not path[0].isdigit() else ("output", *path))
        if not isinstance(value, torch.Tensor):
            raise ImportFailure(
                "non_tensor",
                f"The output {name!r} is a {type(value).__name__}; only tensors (in tuples, lists "
                "and dicts) have a place in an answer. Return it as a tensor, and save the module "
                "again.",
            )
        names.append(name)
        tensors.append(value)
    if len(set(names)) != len(names):
        raise ImportFailure(
            "output_names", "Two outputs of the program have the same name; rename one."
        )
    if not names:
        raise ImportFailure("no_tensors", "The program must return at least one tensor.")
    return names, tensors


def _leaves(value: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    fields: Sequence[str] | None = getattr(value, "_fields", None)
    if isinstance(value, tuple) and fields is not None:
        items = zip(fields, value, strict=True)
    elif isinstance(value, dict):
        items = ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        items = ((str(index), item) for index, item in enumerate(value))
    else:
        return [(path, value)]
    return [leaf for key, item in items for leaf in _leaves(item, (*path, key))]


def flatten_call(call: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors of positional arguments, in the order of the names they came from."""
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
