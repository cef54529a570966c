"""OpenAI's requests and answers for `/v1/responses`, as structs; its stream's events are in
`responses_events.py`.

Fields we do not know are ignored; ranges are checked while decoding. What fields mean to a model
is in `responses.py`.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.api.openai_types import (
    MAX_MESSAGES,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    ChatLogprob,
    FunctionName,
    SamplingRequest,
    Tokens,
)

CallId = Annotated[str, Meta(min_length=1, max_length=200)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16),
]
Status = Literal["in_progress", "completed", "incomplete"]


def _null() -> msgspec.Raw:
    return msgspec.Raw(b"null")


# --- what is sent -----------------------------------------------------------------------


class InputPart(msgspec.Struct, frozen=True):
    """A part of a message's content, or of a function's output."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """A message, a call that an earlier answer made, or what it gave."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    call_id: CallId | None = None
    name: FunctionName | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class ResponsesTool(msgspec.Struct, frozen=True, kw_only=True):
    """`parameters` is a JSON schema, kept as it was sent. `strict` is always so."""

    type: str
    name: FunctionName | None = None
    description: str | None = None
    parameters: msgspec.Raw = msgspec.field(default_factory=_null)
    strict: bool | None = None


class ResponsesToolChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    type: str
    name: str | None = None


class PlainFormat(msgspec.Struct, frozen=True):
    """Of an answer that is free, or any object."""

    type: str = "text"


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """`strict` or not, the answer keeps to the schema."""

    type: str
    name: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    description: str | None = None
    schema: msgspec.Raw = msgspec.field(default_factory=_null)
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True):
    format: TextFormat | None = None


class ResponsesRequest(SamplingRequest, frozen=True, kw_only=True):
    """`POST /v1/responses`."""

    input: str | Annotated[list[InputItem], Meta(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    metadata: Metadata | None = None
    # Refused: see `responses.py`.
    access_programs: Any = None
    background: bool | None = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    moderation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None


# --- what is answered -------------------------------------------------------------------


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    text: str
    logprobs: list[ChatLogprob] = []
    annotations: list[Any] = []


class OutputMessage(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    status: Status
    content: list[OutputText]
    role: str = "assistant"


class OutputCall(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """`arguments` is JSON as text."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: str


class TextAnswer(msgspec.Struct, frozen=True):
    format: Any  # `PlainFormat`, or `TextFormat` as it was sent


class ResponseAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, also inside the first and last events of a stream. Nothing is kept: `store` is
    false whatever was asked."""

    id: str
    created_at: int
    status: Status
    model: str
    output: list[OutputItem]
    instructions: str | None
    max_output_tokens: int | None
    metadata: Metadata
    parallel_tool_calls: bool
    service_tier: str
    temperature: float
    text: TextAnswer
    tool_choice: str | ResponsesToolChoice
    tools: list[ResponsesTool]
    top_logprobs: int
    top_p: float
    usage: ResponseUsage | None
    incomplete_details: IncompleteDetails | None = None
    object: str = "response"
    error: None = None
    background: bool = False
    previous_response_id: None = None
    store: bool = False
    truncation: str = "disabled"
