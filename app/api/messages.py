"""`/v1/messages`: what Anthropic's fields mean to a model, and its answers.

The messages sent are `messages_input.py`'s, the blocks answered `messages_output.py`'s.
"""

from typing import Any, TypeVar

import msgspec
from litestar import Request, Router, post
from litestar.response.base import ASGIResponse

from app.api.answering import json_answer, respond
from app.api.counting import count_prompt_tokens
from app.api.dialect import Dialect
from app.api.errors import MessagesErrorBody, error_body, messages_error_body
from app.api.messages_input import messages_of
from app.api.messages_output import MessageBlocks
from app.api.messages_types import (
    MessageAnswer,
    MessageDelta,
    MessageEnd,
    MessagesRequest,
    MessageStart,
    MessagesTool,
    MessageStop,
    MessagesUsage,
    PromptRequest,
    TokenCount,
)
from app.api.openai_types import (
    JsonSchemaFormat,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    Usage,
)
from app.api.request_ids import exception_handlers
from app.api.sampling import not_supported, sampling_params
from app.api.tools import json_schema_of, schema_text, tool_choice_of
from app.core.errors import AppError, InvalidRequest
from runtime.protocol import DecoderInfo, Generate, SequenceOutput, Tool

P = TypeVar("P", bound=PromptRequest)

# Fields that ask for what there is not, and what that is.
REFUSED = {
    "container": "running code in a container is",
    "inference_geo": "this box answers where it stands; choosing a region is",
    "mcp_servers": "calling servers of tools is",
}
# Anthropic's choices of tools that go by another name in OpenAI's API.
CHOICES = {"any": "required"}


class PromptDialect(Dialect[P]):
    """What counting tokens and creating a message share: the prompt."""

    route = "/v1/messages"
    id_prefix = "msg_"
    end = b""
    has_stream_options = False
    names = {"response_format": "output_config.format"}  # noqa: RUF012 - declared by the base

    def check(self) -> None:
        request = self.request
        for name, meaning in REFUSED.items():
            if getattr(request, name) is not None:
                raise not_supported(name, meaning)
        if request.speed not in (None, "standard"):
            raise not_supported("speed", "a speed other than 'standard' is")
        if self.num_choices != 1:
            raise not_supported("n", "answers of several choices are")
        self._json_schema = json_schema_of(_format_of(request), "output_config.format")
        self._tools = [_tool(tool, at) for at, tool in enumerate(request.tools or [])]
        self._tool_choice = tool_choice_of(_choice_of(request), self._tools)
        self._messages = messages_of(request)
        self._blocks = MessageBlocks()

    def generate(self, decoder: DecoderInfo, cache_salt: bytes) -> Generate:
        request = self.request
        sampling = sampling_params(request, request.max_tokens or 1, None)
        if request.stop_sequences:
            sampling = msgspec.structs.replace(sampling, stop=request.stop_sequences)
        choice = request.tool_choice
        return Generate(
            request_id=self.request_id,
            sampling=sampling,
            cache_salt=cache_salt,
            messages=self._messages,
            json_schema=self._json_schema,
            tools=self._tools,
            tool_choice=self._tool_choice,
            allows_several_calls=not (choice and choice.disable_parallel_tool_use),
            service_class=self.service_class,
            fairness_key=self.principal.organization_id,
        )

    def answer(self, outputs: list[SequenceOutput], usage: Usage) -> MessageAnswer:
        self.events(outputs)
        end = self._end(usage)
        return self._message(usage, end)

    def opening(self, usage: Usage) -> list[msgspec.Struct]:
        return [MessageStart(self._message(usage, MessageEnd(None, None)))]

    def events(self, outputs: list[SequenceOutput]) -> list[msgspec.Struct]:
        return [event for output in outputs for event in self._blocks.add(output)]

    def closing(self, usage: Usage) -> list[msgspec.Struct]:
        return [MessageDelta(self._end(usage), _usage(usage)), MessageStop()]

    def failure(self, error: AppError) -> MessagesErrorBody:
        return messages_error_body(error_body(error).error, error.status)

    def _end(self, usage: Usage) -> MessageEnd:
        blocks, num_tokens = self._blocks, usage.completion_tokens
        reason = blocks.stop_reason(num_tokens, self.request.max_tokens or 1)
        return MessageEnd(reason, blocks.stop_sequence)

    def _message(self, usage: Usage, end: MessageEnd) -> MessageAnswer:
        return MessageAnswer(
            self.id,
            self.request.model,
            list(self._blocks.blocks),
            end.stop_reason,
            end.stop_sequence,
            _usage(usage),
        )


class MessagesDialect(PromptDialect[MessagesRequest]):
    """One request of the messages API."""

    decoder = msgspec.json.Decoder(MessagesRequest)


class TokensDialect(PromptDialect[PromptRequest]):
    """A message's prompt whose tokens are counted."""

    decoder = msgspec.json.Decoder(PromptRequest)


def _usage(usage: Usage) -> MessagesUsage:
    num_cached = usage.prompt_tokens_details.cached_tokens
    return MessagesUsage(usage.prompt_tokens - num_cached, usage.completion_tokens, num_cached)


def _format_of(request: PromptRequest) -> ResponseFormat | None:
    wanted = request.output_config.format if request.output_config else None
    if wanted is None:
        return None
    where = "output_config.format"
    if wanted.type != "json_schema":
        raise not_supported(where, f"the format {wanted.type!r} is")
    if bytes(wanted.schema) == b"null":
        raise InvalidRequest(f"{where}.schema is required.", param=f"{where}.schema")
    return ResponseFormat(wanted.type, JsonSchemaFormat("answer", schema=wanted.schema))


def _choice_of(request: PromptRequest) -> str | NamedToolChoice | None:
    choice = request.tool_choice
    if choice is None:
        return None
    if choice.type == "tool":
        return NamedToolChoice("function", NamedFunction(choice.name or ""))
    return CHOICES.get(choice.type, choice.type)


def _tool(tool: MessagesTool, at: int) -> Tool:
    where = f"tools[{at}]"
    if tool.type not in (None, "custom"):
        raise not_supported(f"{where}.type", f"tools of type {tool.type!r} are")
    schema = schema_text(tool.input_schema, f"{where}.input_schema")
    if schema is None:
        raise InvalidRequest(f"{where}.input_schema is required.", param=f"{where}.input_schema")
    return Tool(name=tool.name, description=tool.description or "", parameters=schema)


@post("/messages", status_code=200, summary="Create a message")
async def create_message(request: Request[Any, Any, Any]) -> ASGIResponse:
    """Anthropic's messages, at once or as a stream; the key may come as `x-api-key`."""
    return await respond(request, MessagesDialect)


@post("/messages/count_tokens", status_code=200, summary="Count a message's tokens")
async def count_tokens(request: Request[Any, Any, Any]) -> ASGIResponse:
    """How many tokens the prompt of a message has. Runs nothing and costs nothing."""
    num_tokens, request_id = await count_prompt_tokens(request, TokensDialect)
    return json_answer(TokenCount(num_tokens), request_id)


router = Router(
    "/v1",
    route_handlers=[create_message, count_tokens],
    exception_handlers=exception_handlers,
    tags=["Anthropic"],
)
