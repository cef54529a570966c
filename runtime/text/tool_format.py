"""How a model writes its calls of tools, found by evaluating its chat template.

Owns `ToolFormat` and its discovery. Does not own the grammar of calls (tool_grammar.py), nor how
they are read (tool_calls.py).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from runtime.protocol import ChatMessage, Tool, ToolCall

ID_HOLE = "\0"  # in a piece of a format: where the template writes the id of a call
ID_LENGTH = 9
NAME_CHARACTERS = re.compile(r"[a-zA-Z0-9_.-]+")
MIN_TRIGGER_CHARACTERS = 3

_TOOL = Tool(name="listed_tool", description="listed description", parameters='{"type": "object"}')
_NAMES = ("called_tool_a", "called_tool_b")
_IDS = ("Aq1Aq1Aq1", "Bz2Bz2Bz2")
_ARGUMENTS = re.compile(r'\{\s*"argument_q"\s*:\s*"value q"\s*\}')
_TEXT = "spoken-text"
_RESULT = "returned-text"
_ASKED = ChatMessage(role="user", content="asked-text")

# Renders messages with tools, up to the answer (True) or without it (False); None: it refuses.
Render = Callable[[list[ChatMessage], list[Tool], bool], str | None]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """An answer that calls is `first`, then for each call its name, `middle` and its arguments as
    JSON, with `between` from one call to the next and `last` at the end. Without `between` only
    one call can be made."""

    first: str
    middle: str
    last: str
    between: str | None = None

    def trigger(self, special_texts: list[str]) -> str:
        """The beginning of `first` that tells a call from text; empty when only a bracket does,
        at the beginning of the answer."""
        specials = [text for text in special_texts if self.first.startswith(text)]
        if specials:
            return max(specials, key=len)
        word = re.match(r"[^\s{]*", self.first)
        assert word is not None
        if len(word[0]) < MIN_TRIGGER_CHARACTERS or (word[0][0] == "[" and "]" not in word[0]):
            return ""
        return word[0].split(ID_HOLE)[0]


# What the instruction of `tool_prompt.py` asks for.
PLAIN_FORMAT = ToolFormat(
    first='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    last="}\n</tool_call>",
)


def find_tool_format(render: Render) -> ToolFormat | None:
    """The format in which a template writes calls that were made. None when it does not show the
    model its tools, their results, or calls with their arguments as JSON."""
    called = _rendered(render, [_call(0)])
    prompt = render([_ASKED], [_TOOL], True)
    if called is None or prompt is None or _TOOL.description not in prompt:
        return None
    result = ChatMessage(role="tool", content=_RESULT, tool_call_id=_IDS[0], name=_NAMES[0])
    answered = render([_ASKED, _message([_call(0)]), result], [_TOOL], True)
    if answered is None or _RESULT not in answered:
        return None
    parts = _split(called.removeprefix(prompt), _NAMES[:1])
    if parts is None:
        return None
    before, (middle,), after = parts
    first = _first(render, before, called.startswith(prompt))
    if not first or not middle or NAME_CHARACTERS.match(middle):
        return None
    return ToolFormat(first, middle, _last(render, after), _between(render, middle))


def _first(render: Render, before: str, is_answer: bool) -> str:
    """What begins a call, without what a template puts at the beginning of every answer.
    `is_answer`: nothing of the prompt is in `before`."""
    spoken = _rendered(render, [_call(0)], _TEXT)
    if spoken is not None and _TEXT in spoken:
        parts = _split(spoken.rpartition(_TEXT)[2], _NAMES[:1])
        if parts is not None:
            return common_prefix(before[::-1], parts[0][::-1])[::-1].lstrip()
    return before.lstrip() if is_answer else ""


def _last(render: Render, after: str) -> str:
    """What ends the last call, without what ends every answer."""
    spoken = render([_ASKED, ChatMessage(role="assistant", content=_TEXT)], [_TOOL], False)
    if spoken is None or _TEXT not in spoken:
        return after.rstrip()
    end = spoken.rpartition(_TEXT)[2]
    # A template may end an answer that calls in another way: then by a token, in angle brackets.
    if not after.endswith(end):
        return re.split(r"<[|/\uff5c]", after)[0].rstrip()
    return after[: len(after) - len(end)].rstrip()


def _between(render: Render, middle: str) -> str | None:
    """What stands between two calls, where the template can write two."""
    called = _rendered(render, [_call(0), _call(1)])
    parts = None if called is None else _split(called, _NAMES)
    if parts is None or parts[1][0] != middle or parts[1][2] != middle:
        return None
    return parts[1][1]


def common_prefix(one: str, other: str) -> str:
    """What both begin with."""
    num_same = 0
    while num_same < min(len(one), len(other)) and one[num_same] == other[num_same]:
        num_same += 1
    return one[:num_same]


def _call(number: int) -> ToolCall:
    return ToolCall(
        id=_IDS[number], name=_NAMES[number], arguments=json.dumps({"argument_q": "value q"})
    )


def _message(calls: list[ToolCall], text: str = "") -> ChatMessage:
    return ChatMessage(role="assistant", content=text, tool_calls=calls)


def _rendered(render: Render, calls: list[ToolCall], text: str = "") -> str | None:
    rendered = render([_ASKED, _message(calls, text)], [_TOOL], False)
    if rendered is not None:
        for call_id in _IDS:
            rendered = rendered.replace(call_id, ID_HOLE)
    return rendered


def _split(text: str, names: tuple[str, ...]) -> tuple[str, list[str], str] | None:
    """What is before the first of the names, what is between names and arguments, and what is
    after the last arguments. None unless each name is there once, with its arguments behind."""
    pieces: list[str] = []
    for name in names:
        if text.count(name) != 1:
            return None
        head, _, text = text.partition(name)
        arguments = _ARGUMENTS.search(text)
        if arguments is None:
            return None
        pieces += [head, text[: arguments.start()]]
        text = text[arguments.end() :]
    return pieces[0], pieces[1:], text
