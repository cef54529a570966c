"""The items of a response as a model's outputs make them: messages and calls of functions.

Owns their order, whether they are streamed or answered at once. The response around them is
`responses.py`'s.
"""

from collections.abc import Callable
from itertools import count
from typing import TypeVar

from app.api.chat import logprobs_of
from app.api.openai_types import ChatLogprob
from app.api.responses_events import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    ItemAdded,
    ItemDone,
    PartAdded,
    PartDone,
    TextDelta,
    TextDone,
)
from app.api.responses_types import OutputCall, OutputItem, OutputMessage, OutputText
from runtime.protocol import FinishReason, SequenceOutput, ToolCall

E = TypeVar("E", bound=Event)


class ResponseItems:
    """`add` takes what was generated and returns the events that tell of it; `items` holds what is
    complete. A message begins with text alone, and ends where a call begins, and at the end."""

    def __init__(self, response_id: str) -> None:
        self.items: list[OutputItem] = []
        self.finish_reason: FinishReason | None = None
        self._base = response_id.partition("_")[2]
        self._numbers = count()
        self._text: list[str] | None = None  # of the message that is open
        self._logprobs: list[ChatLogprob] = []
        self._held: list[ChatLogprob] = []  # of tokens whose text, or call, is still to come

    def event(self, make: Callable[..., E], **fields: object) -> E:
        """The next event of the stream."""
        return make(sequence_number=next(self._numbers), **fields)

    def add(self, output: SequenceOutput) -> list[Event]:
        events: list[Event] = []
        self._held += logprobs_of(output.logprobs or [])
        if output.text:
            events += [*self._open(), self._write(output.text)]
        for call in output.tool_calls:
            events += [*self._close("completed"), *self._call(call)]
            self._held = []  # a call has no place for them
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            if not self.items:
                events += self._open()  # an answer without a word is a message still
            if self._held and self._text is not None:
                events.append(self._write(""))
            is_cut = output.finish_reason == "length"
            events += self._close("incomplete" if is_cut else "completed")
        return events

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._base}_{len(self.items)}"

    def _open(self) -> list[Event]:
        if self._text is not None:
            return []
        self._text, self._logprobs = [], []
        item_id, at = self._id("msg"), len(self.items)
        message = OutputMessage(item_id, "in_progress", [])
        return [
            self.event(ItemAdded, output_index=at, item=message),
            self.event(PartAdded, output_index=at, item_id=item_id, part=OutputText("")),
        ]

    def _write(self, text: str) -> Event:
        assert self._text is not None
        logprobs, self._held = self._held, []
        self._text.append(text)
        self._logprobs += logprobs
        return self.event(
            TextDelta,
            item_id=self._id("msg"),
            output_index=len(self.items),
            delta=text,
            logprobs=logprobs,
        )

    def _close(self, status: str) -> list[Event]:
        if self._text is None:
            return []
        item_id, at = self._id("msg"), len(self.items)
        part = OutputText("".join(self._text), self._logprobs)
        self._text = None
        message = OutputMessage(item_id, status, [part])  # type: ignore[arg-type]
        self.items.append(message)
        where = {"item_id": item_id, "output_index": at}
        return [
            self.event(TextDone, text=part.text, logprobs=part.logprobs, **where),
            self.event(PartDone, part=part, **where),
            self.event(ItemDone, output_index=at, item=message),
        ]

    def _call(self, call: ToolCall) -> list[Event]:
        """A worker's calls come whole."""
        item_id, at = self._id("fc"), len(self.items)
        begun = OutputCall(item_id, call.id, call.name, "", "in_progress")
        done = OutputCall(item_id, call.id, call.name, call.arguments, "completed")
        self.items.append(done)
        where = {"item_id": item_id, "output_index": at}
        return [
            self.event(ItemAdded, output_index=at, item=begun),
            self.event(ArgumentsDelta, delta=call.arguments, **where),
            self.event(ArgumentsDone, name=call.name, arguments=call.arguments, **where),
            self.event(ItemDone, output_index=at, item=done),
        ]
