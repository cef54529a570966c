"""The grammar of an answer that may or must call tools.

Owns what each `tool_choice` allows. Does not own compiling (grammars.py) nor formats
(tool_format.py).
"""

import json
import re
from typing import Any

from runtime.protocol import Tool
from runtime.text.grammars import (
    ANSWER_LAYOUT,
    ARGUMENTS_LAYOUT,
    GrammarError,
    checked_schema,
    grammar_source,
)
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_format import ID_HOLE, ID_LENGTH, ToolFormat, common_prefix

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 1024
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def check_tools(tools: list[Tool]) -> None:
    """Raises `GrammarError`."""
    if len(tools) > MAX_TOOLS:
        raise GrammarError(f"at most {MAX_TOOLS} tools are supported")
    if sum(len(tool.description) + len(tool.parameters) for tool in tools) > MAX_TOOLS_BYTES:
        raise GrammarError(f"tools may have at most {MAX_TOOLS_BYTES} characters together")
    names = {tool.name for tool in tools}
    if len(names) < len(tools):
        raise GrammarError("two tools have the same name")
    for name in names:
        if not TOOL_NAME.fullmatch(name):
            raise GrammarError("a tool's name must be 1 to 64 of a-z, A-Z, 0-9, _ and -")
    for tool in tools:
        parameters_of(tool)


def parameters_of(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, of an object in any case. Raises `GrammarError`."""
    try:
        schema = checked_schema(tool.parameters) if tool.parameters else {}
    except GrammarError as error:
        raise GrammarError(f"the parameters of {tool.name!r}: {error}") from error
    kind = schema.get("type", "object")
    # Arguments are always an object, whatever else a schema made from a type hint allows.
    if kind == "object" or (isinstance(kind, list) and "object" in kind):
        schema["type"] = "object"
    else:
        raise GrammarError(f"the parameters of {tool.name!r} must have the type 'object'")
    return schema


def tools_source(
    form: ToolFormat,
    tokenizer: Tokenizer,
    tools: list[Tool],
    *,
    is_required: bool,
    allows_several: bool,
    json_schema: str | None = None,
) -> str:
    """The grammar's source. Unless a call `is_required`, the answer may be text, or JSON of the
    schema, instead; text may also come before the calls. Raises `GrammarError`."""
    schemas = {
        f"arguments_{at}": parameters_of(tool) | {"x-guidance": ARGUMENTS_LAYOUT}
        for at, tool in enumerate(tools)
    }
    lark = _Lark(tokenizer)
    # What a further call and the end have in common is written once.
    common = "" if form.between is None else common_prefix(form.between, form.last)
    rules = [
        f'call_{at}: "{tool.name}" {lark.text(form.middle)} @arguments_{at}'
        for at, tool in enumerate(tools)
    ]
    rules.append("call: " + " | ".join(f"call_{at}" for at in range(len(tools))))
    common_text = lark.text(common)
    calls = f"call {common_text}"
    if form.between is not None and allows_several:
        calls += f" ({lark.text(form.between[len(common) :])} call {common_text})*"
    calls += " " + lark.text(form.last[len(common) :])
    rules.append(f"calls: {calls}")
    if is_required:
        start = [f"start: {lark.text(form.first)} calls"]
    elif json_schema is None:
        start = _text_or_calls(form, lark)
    else:
        if not form.trigger(tokenizer.special_texts):
            raise GrammarError("this model cannot choose between tools and JSON in one answer")
        schemas["answer"] = (checked_schema(json_schema) or {"type": "object"}) | {
            "x-guidance": ANSWER_LAYOUT
        }
        start = [f"start: @answer | {lark.text(form.first)} calls"]
    return grammar_source("\n".join(start + rules), schemas)


def _text_or_calls(form: ToolFormat, lark: "_Lark") -> list[str]:
    trigger = form.trigger(lark.special_texts)
    rest = lark.text(form.first[len(trigger) :])
    if not trigger:
        bracket = re.escape(form.first[0])
        return [f"start: TEXT | {rest} calls", rf"TEXT: /([^{bracket}](.|\n)*)?/"]
    if trigger in lark.special_texts:
        return [f"start: TEXT | TEXT {lark.text(trigger)} {rest} calls", r"TEXT: /(.|\n)*/"]
    return [
        f"start: TEXT | text_before {rest} calls",
        f"text_before[lazy]: TEXT {lark.text(trigger)}",
        r"TEXT: /(.|\n)*/",
    ]


class _Lark:
    """Writes pieces of a format as the grammar library's Lark has them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_texts = tokenizer.special_texts
        longest_first = sorted(self.special_texts, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, [*longest_first, ID_HOLE])))

    def text(self, piece: str) -> str:
        """Special tokens by id, holes for ids as an expression, and the rest as it is."""
        items: list[str] = []
        at = 0
        for cut in self._cut.finditer(piece):
            items += _literal(piece[at : cut.start()])
            token_id = self._tokenizer.special_id(cut[0])
            if cut[0] == ID_HOLE:
                items.append(f"/[a-zA-Z0-9]{{{ID_LENGTH}}}/")
            else:
                items.append(f"<[{token_id}]>")
            at = cut.end()
        return " ".join(items + _literal(piece[at:]))


def _literal(text: str) -> list[str]:
    return [json.dumps(text, ensure_ascii=False)] if text else []
