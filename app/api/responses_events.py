"""The events of a streamed response, in the words of OpenAI's `/v1/responses`.

`sequence_number` counts the events of one stream from 0.
"""

import msgspec

from app.api.errors import ErrorDetail
from app.api.openai_types import ChatLogprob
from app.api.responses_types import OutputItem, OutputText, ResponseAnswer


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """One event; its tag is its name."""

    sequence_number: int


class ResponseCreated(Event, frozen=True, tag="response.created"):
    response: ResponseAnswer


class ResponseInProgress(Event, frozen=True, tag="response.in_progress"):
    response: ResponseAnswer


class ResponseCompleted(Event, frozen=True, tag="response.completed"):
    response: ResponseAnswer


class ResponseIncomplete(Event, frozen=True, tag="response.incomplete"):
    response: ResponseAnswer


class ItemAdded(Event, frozen=True, tag="response.output_item.added"):
    output_index: int
    item: OutputItem


class ItemDone(Event, frozen=True, tag="response.output_item.done"):
    output_index: int
    item: OutputItem


class PartAdded(Event, frozen=True, tag="response.content_part.added"):
    item_id: str
    output_index: int
    part: OutputText
    content_index: int = 0


class PartDone(Event, frozen=True, tag="response.content_part.done"):
    item_id: str
    output_index: int
    part: OutputText
    content_index: int = 0


class TextDelta(Event, frozen=True, tag="response.output_text.delta"):
    item_id: str
    output_index: int
    delta: str
    logprobs: list[ChatLogprob]
    content_index: int = 0


class TextDone(Event, frozen=True, tag="response.output_text.done"):
    item_id: str
    output_index: int
    text: str
    logprobs: list[ChatLogprob]
    content_index: int = 0


class ArgumentsDelta(Event, frozen=True, tag="response.function_call_arguments.delta"):
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Event, frozen=True, tag="response.function_call_arguments.done"):
    item_id: str
    output_index: int
    name: str
    arguments: str


class StreamFailed(Event, frozen=True, tag="error"):
    """`error` says it again, for clients that raise only what is named so."""

    message: str
    code: str | None
    param: str | None
    error: ErrorDetail
