"""Reads calls of tools out of an answer's text as it comes.

Owns what is text and what is a call. Does not own the format (tool_format.py).
"""

import secrets
import string
from collections.abc import Callable

from runtime.protocol import ToolCall
from runtime.text.stream import overlap
from runtime.text.tool_format import (
    ID_HOLE,
    ID_LENGTH,
    NAME_CHARACTERS,
    ToolFormat,
    common_prefix,
)

_ALPHANUMERIC = string.ascii_letters + string.digits


def new_call_id() -> str:
    return "call_" + "".join(secrets.choice(_ALPHANUMERIC) for _ in range(ID_LENGTH))


class ToolCallReader:
    """Text goes out as soon as it cannot begin a call; a call when its arguments are complete.
    Of what a format writes around calls nothing goes out; a call that never becomes complete is
    text in the end, as it was written."""

    def __init__(self, form: ToolFormat, trigger: str) -> None:
        """`trigger` as `ToolFormat.trigger` gives it; empty: only the very first character of the
        answer can begin a call."""
        self._form = form
        self._trigger = trigger or form.first[0]
        self._is_bare = not trigger
        # Characters behind a call's arguments that end it, whether or not another call follows.
        closing = "" if form.between is None else common_prefix(form.between, form.last)
        self._num_closing = len(closing) + closing.count(ID_HOLE) * (ID_LENGTH - 1)
        self._held = ""
        self._begun = ""  # what was read of a call that is not complete, before what is held
        self._read: Callable[[], bool] = self._read_text  # whether there may be more to read
        self._name = ""
        self._scan = _ObjectScan()
        self._text: list[str] = []
        self._calls: list[ToolCall] = []
        self.num_calls = 0

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text and the calls that are certain now and were not before."""
        self._held += text
        while self._held and self._read():
            pass
        return self._taken()

    def flush(self) -> str:
        """What is text after all, at the end of the answer."""
        held, self._held = self._held, ""
        if self._read == self._read_between:
            begun = held[self._num_closing :]
            between = self._form.between
            is_call = between is not None and _match(between, held) is None
            return begun if is_call and begun.strip() else ""
        begun, self._begun = self._begun, ""
        return begun + held

    def _taken(self) -> tuple[str, list[ToolCall]]:
        text, calls = "".join(self._text), self._calls
        self._text, self._calls = [], []
        return text, calls

    def _read_text(self) -> bool:
        if self._is_bare:
            if self._held[0] == self._trigger:
                self._read = self._read_first
                return True
            num_held = 0
            self._read = self._read_plain
        else:
            at = self._held.find(self._trigger)
            if at >= 0:
                self._emit(at)
                self._read = self._read_first
                return True
            num_held = overlap(self._held, self._trigger)
        self._emit(len(self._held) - num_held)
        return False

    def _read_plain(self) -> bool:
        self._emit(len(self._held))
        return False

    def _read_first(self) -> bool:
        """What begins the first call; text after all if it goes on in another way."""
        matched = _match(self._form.first, self._held)
        if matched is None:
            return False
        if matched < 0:
            self._emit(len(self._trigger))
            self._read = self._read_plain if self._is_bare else self._read_text
            return True
        return self._skip(matched, self._read_name)

    def _read_name(self) -> bool:
        name = NAME_CHARACTERS.match(self._held)
        if name is None or name.end() == len(self._held):
            return False
        matched = _match(self._form.middle, self._held[name.end() :])
        if matched is None or matched < 0:
            return False
        self._name = name[0]
        self._scan = _ObjectScan()
        return self._skip(name.end() + matched, self._read_arguments)

    def _read_arguments(self) -> bool:
        end = self._scan.find_end(self._held)
        if end is None:
            return False
        arguments = self._held[:end].strip()
        self._calls.append(ToolCall(id=new_call_id(), name=self._name, arguments=arguments))
        self.num_calls += 1
        self._skip(end, self._read_between)
        self._begun = ""
        return True

    def _read_between(self) -> bool:
        matched = None if self._form.between is None else _match(self._form.between, self._held)
        if matched is None or matched < 0:
            return False
        self._skip(matched, self._read_name)
        self._begun = self._begun[self._num_closing :]
        return True

    def _skip(self, num_characters: int, read: Callable[[], bool]) -> bool:
        self._begun += self._held[:num_characters]
        self._held = self._held[num_characters:]
        self._read = read
        return True

    def _emit(self, num_characters: int) -> None:
        self._text.append(self._held[:num_characters])
        self._held = self._held[num_characters:]


class _ObjectScan:
    """Finds the end of a JSON object in a text that grows, looking at each character once."""

    def __init__(self) -> None:
        self._at = 0
        self._depth = 0
        self._is_string = False
        self._is_escaped = False

    def find_end(self, text: str) -> int | None:
        while self._at < len(text):
            character = text[self._at]
            self._at += 1
            if self._is_string:
                self._is_string = character != '"' or self._is_escaped
                self._is_escaped = character == "\\" and not self._is_escaped
            elif character == '"':
                self._is_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return self._at
        return None


def _match(piece: str, text: str) -> int | None:
    """How much of `text` is the piece: -1 when it is not, None when more of it must come."""
    at = 0
    for character in piece:
        for _ in range(ID_LENGTH if character == ID_HOLE else 1):
            if at == len(text):
                return None
            is_same = text[at].isalnum() if character == ID_HOLE else text[at] == character
            if not is_same:
                return -1
            at += 1
    return at
