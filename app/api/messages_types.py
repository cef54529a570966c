"""Anthropic's requests, answers and stream events for `/v1/messages`, as structs.

Fields we do not know are ignored; ranges are checked while decoding. What fields mean to a model
is in `messages.py`.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.api.openai_types import (
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOOLS,
    FunctionName,
    SamplingRequest,
    Stop,
    Tokens,
)


def _null() -> msgspec.Raw:
    return msgspec.Raw(b"null")


# --- what is sent -----------------------------------------------------------------------


class InputBlock(msgspec.Struct, frozen=True):
    """A block of what is sent: text, a call that an earlier answer made, or what it gave.
    `input` is JSON, kept as it was sent."""

    type: str
    text: str | None = None
    id: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    name: FunctionName | None = None
    input: msgspec.Raw = msgspec.field(default_factory=_null)
    tool_use_id: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    is_error: bool | None = None
    content: "str | list[InputBlock] | None" = None


class InputMessage(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[InputBlock]


class MessagesTool(msgspec.Struct, frozen=True):
    """`input_schema` is a JSON schema, kept as it was sent, and always held to."""

    name: FunctionName
    description: str | None = None
    input_schema: msgspec.Raw = msgspec.field(default_factory=_null)
    type: str | None = None


class MessagesToolChoice(msgspec.Struct, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(msgspec.Struct, frozen=True):
    type: str
    schema: msgspec.Raw = msgspec.field(default_factory=_null)


class OutputConfig(msgspec.Struct, frozen=True):
    format: OutputFormat | None = None


class PromptRequest(SamplingRequest, frozen=True, kw_only=True):
    """`POST /v1/messages/count_tokens`, and what a message's prompt is made of."""

    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Tokens | None = None
    system: str | list[InputBlock] | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    output_config: OutputConfig | None = None
    stop_sequences: Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    # Refused: see `messages.py`.
    container: Any = None
    inference_geo: str | None = None
    mcp_servers: Any = None
    speed: str | None = None


class MessagesRequest(PromptRequest, frozen=True, kw_only=True):
    """`POST /v1/messages`."""

    max_tokens: Tokens  # type: ignore[assignment] - which a message must have


# --- what is answered -------------------------------------------------------------------


class TextBlock(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    """`input` is an object's JSON, as the model wrote it."""

    id: str
    name: str
    input: Annotated[msgspec.Raw, Meta(extra_json_schema={"type": "object"})]


OutputBlock = TextBlock | ToolUseBlock


class MessagesUsage(msgspec.Struct, frozen=True):
    """`input_tokens` leaves out those that came from the cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class MessageAnswer(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    model: str
    content: list[OutputBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage
    role: str = "assistant"


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


# --- a stream's events ------------------------------------------------------------------


class MessageStart(msgspec.Struct, frozen=True, tag_field="type", tag="message_start"):
    message: MessageAnswer


class BlockStart(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_start"):
    index: int
    content_block: OutputBlock


class TextDelta(msgspec.Struct, frozen=True, tag_field="type", tag="text_delta"):
    text: str


class InputDelta(msgspec.Struct, frozen=True, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | InputDelta


class BlockStop(msgspec.Struct, frozen=True, tag_field="type", tag="content_block_stop"):
    index: int


class MessageEnd(msgspec.Struct, frozen=True):
    stop_reason: str | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag_field="type", tag="message_delta"):
    delta: MessageEnd
    usage: MessagesUsage


class MessageStop(msgspec.Struct, frozen=True, tag_field="type", tag="message_stop"):
    pass
