"""Parameters: Stripe's nested form encoding, and their check against the SDK's typed parameters.

The SDK's types are generated from Stripe's description of its API, so they always fit the pinned
version. They leave out what Stripe demands in combination; the handlers check that.
"""

import re
import types
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

from stripe import RequestOptions
from typing_extensions import is_typeddict

from tests.stripe_stand_in.errors import invalid

_FIXED_POINT = re.compile(r"-?\d+(\.\d{1,12})?", re.ASCII)
_INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)
_NO_MATCH = object()


def decode(text: str) -> dict[str, Any]:
    """`a[b][0][c]=x` as {"a": {"b": [{"c": "x"}]}}; the leaves are strings."""
    tree: dict[str, Any] = {}
    for name, value in parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text)):
        head, *rest = re.findall(r"[^\[\]]+|\[\]", name)
        node: dict[str, Any] = tree
        for part in rest:
            node = node.setdefault(head, {})
            head = str(len(node)) if part == "[]" else part
        node[head] = value
    return {name: _lists(value) for name, value in tree.items()}


def _lists(value: Any) -> Any:
    """What has the keys 0, 1, 2 ... is a list."""
    if isinstance(value, str):
        return value
    children = {name: _lists(child) for name, child in value.items()}
    if list(children) == [str(index) for index in range(len(children))]:
        return list(children.values())
    return children


def check(params: dict[str, Any], typed: type | None) -> dict[str, Any]:
    """The parameters in Python's types. Raises a 400 as Stripe does for those that are unknown,
    missing or of the wrong type."""
    if typed is None:
        typed = _NoParams
    return _checked_dict(params, typed, "")


class _NoParams:
    """Of an endpoint that takes none."""


@cache
def _fields(typed: type) -> tuple[dict[str, Any], frozenset[str]]:
    """Types by name, and the names that are required."""
    if not is_typeddict(typed):
        return {}, frozenset()
    # Names that only the module of RequestOptions knows.
    hints = get_type_hints(typed, localns={"StripeContext": object, "Mapping": Mapping})
    options = set(RequestOptions.__annotations__)
    names = {name: hint for name, hint in hints.items() if name not in options}
    required = frozenset(getattr(typed, "__required_keys__", ()))
    return names, required & set(names)


def _checked_dict(params: dict[str, Any], typed: type, path: str) -> dict[str, Any]:
    fields, required = _fields(typed)
    for name in params:
        if name not in fields:
            where = _join(path, name)
            raise invalid(f"Received unknown parameter: {where}", where, "parameter_unknown")
    for name in sorted(required - set(params)):
        where = _join(path, name)
        raise invalid(f"Missing required param: {where}.", where, "parameter_missing")
    return {
        name: _checked(value, fields[name], _join(path, name)) for name, value in params.items()
    }


def _checked(value: Any, hint: Any, path: str) -> Any:
    if value == "" and not _allows_empty(hint):
        message = f"You passed an empty string for '{path}'."
        raise invalid(message, path, "parameter_invalid_empty")
    found = _match(value, hint, path)
    if found is _NO_MATCH:
        raise _mismatch(value, hint, path)
    return found


def _mismatch(value: Any, hint: Any, path: str) -> Exception:
    if hint is int:
        return invalid(f"Invalid integer: {value}", path, "parameter_invalid_integer")
    if hint is Decimal:
        return invalid(f"Invalid decimal: {value}", path, "parameter_invalid_decimal")
    return invalid(f"Invalid {path}: {value!r} is not {hint}", path)


def _match(value: Any, hint: Any, path: str) -> Any:
    """The value in the type's form, or _NO_MATCH."""
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _match_union(value, hint, path)
    if origin is Literal:
        return value if value in get_args(hint) else _NO_MATCH
    if origin is list:
        return _match_list(value, get_args(hint)[0], path)
    if origin is dict:
        return _match_metadata(value, path) if isinstance(value, dict) else _NO_MATCH
    if is_typeddict(hint):
        return _checked_dict(value, hint, path) if isinstance(value, dict) else _NO_MATCH
    return _match_scalar(value, hint)


def _match_scalar(value: Any, hint: Any) -> Any:
    if not isinstance(value, str):
        return _NO_MATCH
    if hint is bool:
        return {"true": True, "false": False}.get(value, _NO_MATCH)
    if hint is int:
        return int(value) if _INTEGER.fullmatch(value) else _NO_MATCH
    if hint is Decimal:
        return Decimal(value) if _FIXED_POINT.fullmatch(value) else _NO_MATCH
    return value if hint is str else _NO_MATCH


def _match_union(value: Any, hint: Any, path: str) -> Any:
    """The SDK writes enumerations as `Literal[...] | str` to be ready for new members; Stripe
    itself takes only those it knows."""
    options = list(get_args(hint))
    literals = [option for option in options if get_origin(option) is Literal]
    if any(set(get_args(literal)) != {""} for literal in literals):
        options = [option for option in options if option is not str]
    for option in options:
        found = _match(value, option, path)
        if found is not _NO_MATCH:
            return found
    return _NO_MATCH


def _match_list(value: Any, hint: Any, path: str) -> Any:
    if not isinstance(value, list):
        return _NO_MATCH
    return [_checked(item, hint, f"{path}[{index}]") for index, item in enumerate(value)]


def _match_metadata(value: dict[str, Any], path: str) -> Any:
    if len(value) > 50:
        raise invalid(f"{path} has more than 50 keys", path)
    for name, text in value.items():
        if not isinstance(text, str) or len(name) > 40 or len(text) > 500:
            where = f"{path}[{name}]"
            raise invalid(f"Keys have up to 40, values up to 500 characters: {where}", where)
    return value


def _allows_empty(hint: Any) -> bool:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return any(get_origin(option) is Literal and "" in get_args(option) for option in options)


def _join(path: str, name: str) -> str:
    return f"{path}[{name}]" if path else name
