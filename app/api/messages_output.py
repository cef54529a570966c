"""The blocks of a message as a model's outputs make them: text and uses of tools.

Owns their order, whether they are streamed or answered at once, and why the message ended.
"""

from typing import Any

import msgspec

from app.api.messages_types import (
    BlockDelta,
    BlockStart,
    BlockStop,
    InputDelta,
    OutputBlock,
    TextBlock,
    TextDelta,
    ToolUseBlock,
)
from runtime.protocol import FinishReason, SequenceOutput, ToolCall

BlockEvent = BlockStart | BlockDelta | BlockStop
NOTHING = msgspec.Raw(b"{}")


class MessageBlocks:
    """`add` takes what was generated and returns the events that tell of it; `blocks` holds what
    is complete. A text ends where a use of a tool begins, and at the end."""

    def __init__(self) -> None:
        self.blocks: list[OutputBlock] = []
        self.finish_reason: FinishReason | None = None
        self.stop_sequence: str | None = None
        self._text: list[str] | None = None  # of the block that is open

    def add(self, output: SequenceOutput) -> list[BlockEvent]:
        events: list[BlockEvent] = []
        at = len(self.blocks)
        if output.text:
            if self._text is None:
                self._text = []
                events.append(BlockStart(at, TextBlock("")))
            self._text.append(output.text)
            events.append(BlockDelta(at, TextDelta(output.text)))
        for call in output.tool_calls:
            events += [*self._close(), *self._use(call)]
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.stop_sequence = output.stop_string
            events += self._close()
        return events

    def stop_reason(self, num_tokens: int, max_tokens: int) -> str | None:
        """In Anthropic's words, of an answer of so many tokens."""
        if self.finish_reason == "length":
            is_full = num_tokens < max_tokens
            return "model_context_window_exceeded" if is_full else "max_tokens"
        if self.finish_reason == "tool_calls":
            return "tool_use"
        return "end_turn" if self.stop_sequence is None else "stop_sequence"

    def _close(self) -> list[BlockEvent]:
        if self._text is None:
            return []
        self.blocks.append(TextBlock("".join(self._text)))
        self._text = None
        return [BlockStop(len(self.blocks) - 1)]

    def _use(self, call: ToolCall) -> list[BlockEvent]:
        """A worker's calls come whole."""
        at = len(self.blocks)
        self.blocks.append(ToolUseBlock(call.id, call.name, _object(call.arguments)))
        return [
            BlockStart(at, ToolUseBlock(call.id, call.name, NOTHING)),
            BlockDelta(at, InputDelta(call.arguments)),
            BlockStop(at),
        ]


def _object(arguments: str) -> msgspec.Raw:
    """As the model wrote it. One that was held to no schema may write any text, and JSON that is
    nested deeper than can be read: that is told as text."""
    try:
        value: Any = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        value = None
    if isinstance(value, dict):
        return msgspec.Raw(arguments.encode())
    return msgspec.Raw(msgspec.json.encode({"arguments": arguments}))
