"""The characters that a grammar cannot do without.

Owns finding them in a grammar's source. Does not own whether a vocabulary has them (spelling.py).
"""

import json
import re
from collections.abc import Iterator
from typing import Any, cast

JSON_CHARACTERS = '{}[]",:-.0123456789truefalsn '
_LARK_STRING_OR_REGEX = re.compile(r'"(?:[^"\\]|\\.)*"|/(?:[^/\\]|\\.)*/')


def literal_characters(source: str) -> str:
    """Those of JSON itself, of the names and values that schemas fix, and of the rules' texts;
    sorted. `source` is of `grammar_source`."""
    characters = set(JSON_CHARACTERS)
    for grammar in json.loads(source)["grammars"]:
        for found in _LARK_STRING_OR_REGEX.findall(grammar.get("lark_grammar", "")):
            characters |= set(json.loads(found) if found[0] == '"' else "")
        for text in _fixed(grammar.get("json_schema")):
            # As JSON writes it: a quote takes a backslash.
            characters |= set(json.dumps(text, ensure_ascii=False)[1:-1])
    return "".join(sorted(characters))


def _fixed(schema: object) -> Iterator[str]:
    """The names of properties, and the strings of `enum` and `const`."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += cast(list[object], each)
        elif isinstance(each, dict):
            for key, value in cast(dict[str, Any], each).items():
                if key in ("enum", "const"):
                    yield from _strings(value)
                elif key == "properties" and isinstance(value, dict):
                    yield from cast(dict[str, Any], value)
                waiting.append(value)


def _strings(value: object) -> Iterator[str]:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, list):
            waiting += cast(list[object], each)
        elif isinstance(each, dict):
            members = cast(dict[str, object], each)
            yield from members
            waiting += members.values()
