"""`/v1/chat/completions`: what its fields mean to a model, and its answers."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from app.api.dialect import Dialect
from app.api.openai_types import (
    AssistantMessage,
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
    TopLogprob,
    Usage,
)
from app.api.sampling import TIER_OF_CLASS, json_logprob, not_supported, sampling_params
from app.core.errors import InvalidRequest
from runtime.protocol import ChatMessage, DecoderInfo, Generate, SequenceOutput, TokenLogprob

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
        if request.tools:
            raise not_supported("tools", "calling tools is")
        if request.tool_choice not in (None, "none", "auto"):
            raise not_supported("tool_choice", "calling tools is")
        if request.functions:
            raise not_supported("functions", "calling functions is")
        if request.function_call not in (None, "none", "auto"):
            raise not_supported("function_call", "calling functions is")
        if request.response_format is not None and request.response_format.type != "text":
            raise not_supported("response_format", "formats other than text are")
        if request.modalities is not None and set(request.modalities) != {"text"}:
            raise not_supported("modalities", "modalities other than text are")
        self._started: set[int] = set()

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
            messages=flattened(request.messages),
            num_choices=self.num_choices,
            service_class=self.service_class,
            fairness_key=self.principal.organization_id,
        )

    def answer(self, outputs: list[SequenceOutput], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            self.id,
            self.created,
            self.request.model,
            [
                ChatChoice(index, AssistantMessage(text), _logprobs(logprobs), finish_reason)
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
                events.append(self._chunk(ChunkChoice(index, Delta("assistant", ""))))
            if output.text or output.logprobs:
                delta = Delta(content=output.text)
                events.append(self._chunk(ChunkChoice(index, delta, _logprobs(output.logprobs))))
            if output.finish_reason is not None:
                choice = ChunkChoice(index, Delta(), None, output.finish_reason)
                events.append(self._chunk(choice))
        return events

    def usage_event(self, usage: Usage) -> ChatChunk:
        return ChatChunk(
            self.id, self.created, self.request.model, [], TIER_OF_CLASS[self.service_class], usage
        )

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
        if message.tool_calls or message.role in ("tool", "function"):
            raise not_supported(f"messages[{i}]", "messages about tools are")
        if message.content is None:
            raise InvalidRequest(
                f"messages[{i}].content is required.", param=f"messages[{i}].content"
            )
        content = message.content
        if not isinstance(content, str):
            content = "".join(_text_of(part, i, j) for j, part in enumerate(content))
        role = ROLE_OF.get(message.role, message.role)
        flat.append(ChatMessage(role=role, content=content, name=message.name))
    return flat


def _text_of(part: ContentPart, i: int, j: int) -> str:
    where = f"messages[{i}].content[{j}]"
    if part.type != "text":
        raise not_supported(f"{where}.type", f"content of type {part.type!r} is")
    if part.text is None:
        raise InvalidRequest(f"{where}.text is required.", param=f"{where}.text")
    return part.text


def _logprobs(entries: list[TokenLogprob] | None) -> ChatLogprobs | None:
    if entries is None:
        return None
    return ChatLogprobs(
        [
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
    )
