"""`/v1/responses`: what its fields mean to a model, and its answers. Nothing of them is kept.

The items sent are `responses_input.py`'s, those answered `responses_output.py`'s.
"""

from typing import Any

import msgspec
from litestar import Request, post
from litestar.response.base import ASGIResponse

from app.api.answering import json_answer, respond
from app.api.counting import count_prompt_tokens
from app.api.dialect import Dialect
from app.api.errors import error_body
from app.api.openai_types import (
    JsonSchemaFormat,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    Usage,
)
from app.api.responses_events import (
    Event,
    ResponseCompleted,
    ResponseCreated,
    ResponseIncomplete,
    ResponseInProgress,
    StreamFailed,
)
from app.api.responses_input import messages_of
from app.api.responses_output import ResponseItems
from app.api.responses_types import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    PlainFormat,
    ResponseAnswer,
    ResponsesRequest,
    ResponsesTool,
    ResponseUsage,
    TextAnswer,
)
from app.api.sampling import TIER_OF_CLASS, not_supported, sampling_params
from app.api.tools import json_schema_of, schema_text, tool_choice_of
from app.core.errors import AppError, InvalidRequest
from runtime.protocol import DecoderInfo, Generate, SequenceOutput, Tool

# Fields that ask for what there is not, and what that is.
REFUSED = {
    "access_programs": "programs of access are",
    "background": "answering in the background is",
    "background_options": "answering in the background is",
    "context_management": "compacting what is sent is",
    "conversation": "no conversation is kept here; send its items as input. Conversations are",
    "image": "answers that are images are",
    "moderation": "judging what is asked and answered is",
    "previous_response_id": "no answer is kept here; send its items as input. This field is",
    "prompt": "prompts that are kept elsewhere are",
}
LOGPROBS = "message.output_text.logprobs"


class ResponsesDialect(Dialect[ResponsesRequest]):
    """One request of the responses API."""

    decoder = msgspec.json.Decoder(ResponsesRequest)
    route = "/v1/responses"
    id_prefix = "resp_"
    end = b""
    has_stream_options = False
    names = {  # noqa: RUF012 - declared by the base
        "messages": "input",
        "response_format": "text.format",
        "max_tokens": "max_output_tokens",
    }

    def check(self) -> None:
        request = self.request
        for name, meaning in REFUSED.items():
            if getattr(request, name) not in (None, False):
                raise not_supported(name, meaning)
        if self.num_choices != 1:
            raise not_supported("n", "answers of several choices are")
        self._json_schema = json_schema_of(_format_of(request), "text.format")
        self._tools = [_tool(tool, at) for at, tool in enumerate(request.tools or [])]
        self._tool_choice = tool_choice_of(_choice_of(request), self._tools)
        self._messages = messages_of(request)
        self._items = ResponseItems(self.id)

    def generate(self, decoder: DecoderInfo, cache_salt: bytes) -> Generate:
        """Without a limit of its own a response may run to the end of the context."""
        request = self.request
        wants_logprobs = LOGPROBS in (request.include or []) or bool(request.top_logprobs)
        return Generate(
            request_id=self.request_id,
            sampling=sampling_params(
                request,
                request.max_output_tokens or decoder.max_context_tokens,
                (request.top_logprobs or 0) if wants_logprobs else None,
            ),
            cache_salt=cache_salt,
            messages=self._messages,
            json_schema=self._json_schema,
            tools=self._tools,
            tool_choice=self._tool_choice,
            allows_several_calls=request.parallel_tool_calls is not False,
            service_class=self.service_class,
            fairness_key=self.principal.organization_id,
        )

    def answer(self, outputs: list[SequenceOutput], usage: Usage) -> ResponseAnswer:
        self.events(outputs)
        return self._ended(usage)

    def opening(self, usage: Usage) -> list[Event]:
        begun = self._response("in_progress")
        return [
            self._items.event(ResponseCreated, response=begun),
            self._items.event(ResponseInProgress, response=begun),
        ]

    def events(self, outputs: list[SequenceOutput]) -> list[Event]:
        return [event for output in outputs for event in self._items.add(output)]

    def closing(self, usage: Usage) -> list[Event]:
        is_cut = self._items.finish_reason == "length"
        kind = ResponseIncomplete if is_cut else ResponseCompleted
        return [self._items.event(kind, response=self._ended(usage))]

    def failure(self, error: AppError) -> StreamFailed:
        detail = error_body(error).error
        return self._items.event(
            StreamFailed,
            message=detail.message,
            code=detail.code,
            param=detail.param,
            error=detail,
        )

    def _ended(self, usage: Usage) -> ResponseAnswer:
        told = ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(),
            usage.total_tokens,
        )
        is_cut = self._items.finish_reason == "length"
        details = IncompleteDetails("max_output_tokens") if is_cut else None
        response = self._response("incomplete" if is_cut else "completed")
        return msgspec.structs.replace(response, usage=told, incomplete_details=details)

    def _response(self, status: Any) -> ResponseAnswer:
        request = self.request
        wanted = request.text.format if request.text else None
        is_plain = wanted is None or wanted.type != "json_schema"
        plain = PlainFormat("text" if wanted is None else wanted.type)
        return ResponseAnswer(
            id=self.id,
            created_at=self.created,
            status=status,
            model=request.model,
            output=list(self._items.items),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls is not False,
            service_tier=TIER_OF_CLASS[self.service_class],
            temperature=1.0 if request.temperature is None else request.temperature,
            text=TextAnswer(plain if is_plain else wanted),
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            top_logprobs=request.top_logprobs or 0,
            top_p=1.0 if request.top_p is None else request.top_p,
            usage=None,
        )


def _format_of(request: ResponsesRequest) -> ResponseFormat | None:
    wanted = request.text.format if request.text else None
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return ResponseFormat(wanted.type)
    return ResponseFormat(
        wanted.type, JsonSchemaFormat(wanted.name or "answer", schema=wanted.schema)
    )


def _choice_of(request: ResponsesRequest) -> str | NamedToolChoice | None:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    return NamedToolChoice(choice.type, NamedFunction(choice.name or ""))


def _tool(tool: ResponsesTool, at: int) -> Tool:
    where = f"tools[{at}]"
    if tool.type != "function":
        raise not_supported(f"{where}.type", f"tools of type {tool.type!r} are")
    if tool.name is None:
        raise InvalidRequest(f"{where}.name is required.", param=f"{where}.name")
    return Tool(
        name=tool.name,
        description=tool.description or "",
        parameters=schema_text(tool.parameters, f"{where}.parameters") or "",
    )


class InputTokens(msgspec.Struct, frozen=True):
    """How long the prompt of a response would be."""

    input_tokens: int
    object: str = "response.input_tokens"


@post("/responses", status_code=200, summary="Create a response")
async def create_response(request: Request[Any, Any, Any]) -> ASGIResponse:
    """OpenAI's responses, at once or as a stream. Nothing is kept: a conversation's items are
    sent whole each time."""
    return await respond(request, ResponsesDialect)


@post("/responses/input_tokens", status_code=200, summary="Count a response's input tokens")
async def count_input_tokens(request: Request[Any, Any, Any]) -> ASGIResponse:
    """How many tokens the input of a response has. Runs nothing and costs nothing."""
    num_tokens, request_id = await count_prompt_tokens(request, ResponsesDialect)
    return json_answer(InputTokens(num_tokens), request_id)
