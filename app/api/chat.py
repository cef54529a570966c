"""`/v1/chat/completions`: what its fields mean to a model, and its answers."""

from collections import defaultdict
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from app.api.dialect import Dialect
from app.api.openai_types import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    ContentPart,
    Delta,
    Message,
    ToolCallDelta,
    ToolCallView,
    TopLogprob,
    Usage,
)
from app.api.sampling import TIER_OF_CLASS, json_logprob, not_supported, sampling_params
from app.api.tools import json_schema_of, tool_calls_of, tool_choice_of, tools_of
from app.core.errors import InvalidRequest
from runtime.protocol import (
    ChatMessage,
    DecoderInfo,
    Generate,
    SequenceOutput,
    TokenLogprob,
    ToolCall,
)

ROLE_OF = {"developer": "system"}  # templates know the older word


class ChatDialect(Dialect[ChatRequest]):
    """One request of the chat API."""

    decoder = msgspec.json.Decoder(ChatRequest)
    route = "/v1/chat/completions"
    id_prefix = "chatcmpl-"

    def check(self) -> None:
        request = self.request
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequest(
                "top_logprobs is only allowed when logprobs is true.", param="top_logprobs"
            )
        for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
            if getattr(request, old) not in (None, [], "none", "auto"):
                raise not_supported(old, f"the older form of {new} is")
        if request.moderation is not None:
            raise not_supported("moderation", "judging what is asked and answered is")
        if request.web_search_options is not None:
            raise not_supported("web_search_options", "searching the web is")
        if request.audio is not None:
            raise not_supported("audio", "answers that are spoken are")
        self._messages = flattened(request.messages)
        self._json_schema = json_schema_of(request.response_format)
        self._tools = tools_of(request.tools)
        self._tool_choice = tool_choice_of(request.tool_choice, self._tools)
        if request.modalities is not None and set(request.modalities) != {"text"}:
            raise not_supported("modalities", "modalities other than text are")
        self._started: set[int] = set()
        self._num_calls: dict[int, int] = defaultdict(int)  # sent, per choice

    def generate(self, decoder: DecoderInfo, cache_salt: bytes) -> Generate:
        """Without a limit of its own a chat may run to the end of the context."""
        request = self.request
        max_tokens = (
            request.max_completion_tokens or request.max_tokens or decoder.max_context_tokens
        )
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return Generate(
            request_id=self.request_id,
            sampling=sampling_params(request, max_tokens, num_logprobs),
            cache_salt=cache_salt,
            messages=self._messages,
            num_choices=self.num_choices,
            json_schema=self._json_schema,
            tools=self._tools,
            tool_choice=self._tool_choice,
            allows_several_calls=request.parallel_tool_calls is not False,
            service_class=self.service_class,
            fairness_key=self.principal.organization_id,
        )

    def answer(self, outputs: list[SequenceOutput], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            self.id,
            self.created,
            self.request.model,
            [
                ChatChoice(
                    index,
                    _message(
                        text, [call for o in outputs if o.choice == index for call in o.tool_calls]
                    ),
                    _logprobs(logprobs),
                    finish_reason,
                )
                for index, text, logprobs, finish_reason in self.joined(outputs)
            ],
            usage,
            TIER_OF_CLASS[self.service_class],
        )

    def events(self, outputs: list[SequenceOutput]) -> list[ChatChunk]:
        events: list[ChatChunk] = []
        for output in outputs:
            index = output.choice
            if index not in self._started:
                self._started.add(index)
                first = Delta("assistant", None if output.tool_calls else "")
                events.append(self._chunk(ChunkChoice(index, first)))
            if output.text or output.logprobs:
                delta = Delta(content=output.text)
                events.append(self._chunk(ChunkChoice(index, delta, _logprobs(output.logprobs))))
            for call in output.tool_calls:
                delta = Delta(tool_calls=[self._call_delta(index, call)])
                events.append(self._chunk(ChunkChoice(index, delta)))
            if output.finish_reason is not None:
                choice = ChunkChoice(index, Delta(), None, output.finish_reason)
                events.append(self._chunk(choice))
        return events

    def _call_delta(self, index: int, call: ToolCall) -> ToolCallDelta:
        at = self._num_calls[index]
        self._num_calls[index] = at + 1
        return ToolCallDelta(at, call.id, CalledFunction(call.name, call.arguments))

    def closing(self, usage: Usage) -> list[ChatChunk]:
        if not self.includes_usage:
            return []
        tier = TIER_OF_CLASS[self.service_class]
        return [ChatChunk(self.id, self.created, self.request.model, [], tier, usage)]

    def _chunk(self, choice: ChunkChoice) -> ChatChunk:
        return ChatChunk(
            self.id,
            self.created,
            self.request.model,
            [choice],
            TIER_OF_CLASS[self.service_class],
            None if self.includes_usage else UNSET,
        )


def flattened(messages: Sequence[Message]) -> list[ChatMessage]:
    """Messages whose content is one text each. Raises `InvalidRequest` for any other part."""
    flat: list[ChatMessage] = []
    for i, message in enumerate(messages):
        if message.role == "function":
            raise not_supported(f"messages[{i}].role", "the older form of the role tool is")
        calls = tool_calls_of(message, i)
        if message.role == "tool" and message.tool_call_id is None:
            where = f"messages[{i}].tool_call_id"
            raise InvalidRequest(f"{where} is required.", param=where)
        content = message.content
        if content is None and message.role == "assistant":
            content = message.refusal
        if content is None and not calls:
            raise InvalidRequest(
                f"messages[{i}].content is required.", param=f"messages[{i}].content"
            )
        if content is not None and not isinstance(content, str):
            content = "".join(_text_of(part, i, j) for j, part in enumerate(content))
        flat.append(
            ChatMessage(
                role=ROLE_OF.get(message.role, message.role),
                content=content or "",
                name=message.name,
                tool_calls=calls,
                tool_call_id=message.tool_call_id if message.role == "tool" else None,
            )
        )
    return flat


def _message(text: str, calls: list[ToolCall]) -> AssistantMessage:
    if not calls:
        return AssistantMessage(text)
    views = [ToolCallView(call.id, CalledFunction(call.name, call.arguments)) for call in calls]
    return AssistantMessage(text or None, tool_calls=views)


def _text_of(part: ContentPart, i: int, j: int) -> str:
    where = f"messages[{i}].content[{j}]"
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type != "text":
        raise not_supported(f"{where}.type", f"content of type {part.type!r} is")
    if part.text is None:
        raise InvalidRequest(f"{where}.text is required.", param=f"{where}.text")
    return part.text


def _logprobs(entries: list[TokenLogprob] | None) -> ChatLogprobs | None:
    return None if entries is None else ChatLogprobs(logprobs_of(entries))


def logprobs_of(entries: list[TokenLogprob]) -> list[ChatLogprob]:
    """In the shape that chats and responses share."""
    return [
        ChatLogprob(
            entry.text,
            json_logprob(entry.logprob),
            list(entry.text.encode()),
            [
                TopLogprob(text, json_logprob(logprob), list(text.encode()))
                for _, text, logprob in entry.top
            ],
        )
        for entry in entries
    ]
