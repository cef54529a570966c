"""Which JSON schemas are refused before the grammar library sees them.

Owns the bounds on what that library does not bound itself: its stack, the intersection of several
patterns, the automaton of a large `multipleOf`. Its own limits do the rest (grammars.py).
"""

import json
from collections.abc import Iterator
from decimal import Decimal
from math import isfinite
from typing import Any, cast

MAX_SCHEMA_BYTES = 64 * 1024
MAX_NESTING = 1_500  # levels, with every reference followed once
MAX_MERGED_PATTERNS = 4  # every further one can double the states of their intersection
MAX_COUNTED_CHARACTERS = 16_000  # of strings whose length is bounded; see MAX_LEXER_STATES
MAX_MULTIPLES = 2_000  # states of the automaton of `multipleOf`

_MERGING = ("allOf", "anyOf", "oneOf", "$ref")
_ANNOTATIONS = {"title", "description", "default", "examples", "$defs", "definitions", "$schema"}
_PATTERNS = ("pattern", "format", "minLength", "maxLength")


class SchemaError(Exception):
    """The schema cannot be enforced. The message says why."""


def read_schema(text: str) -> dict[str, Any]:
    """The schema as an object. Raises `SchemaError`."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"it is larger than {MAX_SCHEMA_BYTES} bytes")
    try:
        schema: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"it is not valid JSON: {error}") from error
    if not isinstance(schema, dict):
        raise SchemaError("it must be a JSON object")
    return cast(dict[str, Any], schema)


def check_schema(schema: dict[str, Any]) -> None:
    """Raises `SchemaError` for what would take minutes or overflow a stack."""
    levels, references = 0, set[str]()
    num_patterns, is_merging = 0, False
    factors, lengths = set[int](), set[tuple[str, int]]()
    for level, node in _nodes(schema):
        levels = max(levels, level)
        if isinstance(node.get("$ref"), str):
            references.add(node["$ref"])
        num_patterns += sum(key in node for key in _PATTERNS)
        for named in ("patternProperties", "propertyNames"):
            num_patterns += len(node[named]) if isinstance(node.get(named), dict) else 0
        is_merging = is_merging or _merges(node)
        factors |= _factor(node)
        lengths |= _length(node)
    _check_lengths(lengths)
    if (len(references) + 1) * levels > MAX_NESTING:
        raise SchemaError("it is nested too deeply, or through too many references")
    if is_merging and num_patterns > MAX_MERGED_PATTERNS:
        raise SchemaError(
            f"beside allOf, or anyOf, oneOf and $ref with siblings, at most {MAX_MERGED_PATTERNS} "
            f"of {', '.join(_PATTERNS)}, patternProperties and propertyNames are supported"
        )
    states = 1 if is_merging else 0
    for factor in factors:
        states = states * factor if is_merging else states + factor
    if states > MAX_MULTIPLES:
        raise SchemaError(f"multipleOf is supported up to {MAX_MULTIPLES}")


def _check_lengths(lengths: set[tuple[str, int]]) -> None:
    """A grammar counts characters by a few states each, equal bounds once."""
    longest, total = max(lengths, key=lambda each: each[1], default=("", 0)), 0
    for _, length in lengths:
        total += length
    if total > MAX_COUNTED_CHARACTERS:
        keyword, length = longest
        raise SchemaError(
            f"{keyword} is {length}: the different maxLength and minLength of a schema may be "
            f"{MAX_COUNTED_CHARACTERS} together; lower it, or leave it out"
        )


def _length(node: dict[str, Any]) -> set[tuple[str, int]]:
    """What is counted of a string, with the keyword that says so."""
    bounds = [
        (keyword, int(value))
        for keyword in ("maxLength", "minLength")
        if isinstance(value := node.get(keyword), int | float)
        and not isinstance(value, bool)
        and isfinite(value)
    ]
    return {max(bounds, key=lambda each: each[1])} if bounds else set()


def _nodes(schema: object) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every object in the schema with its level. Not recursive: how deep it is, is the question."""
    waiting: list[tuple[int, object]] = [(1, schema)]
    while waiting:
        level, node = waiting.pop()
        if isinstance(node, dict):
            node = cast(dict[str, Any], node)
            yield level, node
            waiting += [(level + 1, each) for each in node.values()]
        elif isinstance(node, list):
            waiting += [(level + 1, each) for each in cast(list[object], node)]


def _merges(node: dict[str, Any]) -> bool:
    """Whether the library intersects several schemas here."""
    present = [key for key in _MERGING if key in node]
    several = isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1
    others = node.keys() - _ANNOTATIONS - set(_MERGING)
    return several or len(present) > 1 or bool(present and others - {"type", "discriminator"})


def _factor(node: dict[str, Any]) -> set[int]:
    value = node.get("multipleOf")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set()
    _, digits, _ = Decimal(str(value)).as_tuple()
    return {int("".join(map(str, digits)))}
