"""`/v1/completions`: what its fields mean to a model, and its answers."""

import msgspec
from msgspec import UNSET

from app.api.dialect import Dialect
from app.api.openai_types import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from app.api.sampling import json_logprob, not_supported, sampling_params
from app.core.errors import InvalidRequest
from runtime.protocol import DecoderInfo, Generate, SequenceOutput, TokenLogprob

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionsDialect(Dialect[CompletionRequest]):
    """One request of the text completion API."""

    decoder = msgspec.json.Decoder(CompletionRequest)
    route = "/v1/completions"
    id_prefix = "cmpl-"

    def check(self) -> None:
        request = self.request
        if request.suffix:
            raise not_supported("suffix", "filling in between a prompt and a suffix is")
        if request.response_format is not None and request.response_format.type != "text":
            raise not_supported(
                "response_format", "formats of completions, unlike those of chats, are"
            )
        if request.best_of is not None and request.best_of != self.num_choices:
            raise not_supported("best_of", "choosing among more completions than n is")
        self._text, self._prompt_ids = prompt_of(request)

    def generate(self, decoder: DecoderInfo, cache_salt: bytes) -> Generate:
        request = self.request
        # Without a tokenizer there is no text to answer with.
        self._shows_token_ids = bool(request.return_token_ids) or not decoder.has_tokenizer
        return Generate(
            request_id=self.request_id,
            sampling=sampling_params(
                request, request.max_tokens or DEFAULT_MAX_TOKENS, request.logprobs
            ),
            cache_salt=cache_salt,
            text=self._text,
            token_ids=self._prompt_ids,
            num_choices=self.num_choices,
            echo=bool(request.echo),
            service_class=self.service_class,
            fairness_key=self.principal.organization_id,
        )

    def answer(self, outputs: list[SequenceOutput], usage: Usage) -> Completion:
        choices = [
            CompletionChoice(
                text,
                index,
                _logprobs(logprobs, 0),
                finish_reason,
                self._token_ids([output for output in outputs if output.choice == index]),
            )
            for index, text, logprobs, finish_reason in self.joined(outputs)
        ]
        return self._completion(choices, usage)

    def events(self, outputs: list[SequenceOutput]) -> list[Completion]:
        events: list[Completion] = []
        for output in outputs:
            token_ids = self._token_ids([output])
            if output.text or output.logprobs or token_ids:
                offset = self.advance(output)
                logprobs = _logprobs(output.logprobs, offset)
                choice = CompletionChoice(output.text, output.choice, logprobs, None, token_ids)
                events.append(self._event(choice))
            if output.finish_reason is not None:
                ended = CompletionChoice("", output.choice, None, output.finish_reason)
                events.append(self._event(ended))
        return events

    def closing(self, usage: Usage) -> list[Completion]:
        return [self._completion([], usage)] if self.includes_usage else []

    def _token_ids(self, outputs: list[SequenceOutput]) -> list[int] | msgspec.UnsetType:
        if not self._shows_token_ids:
            return UNSET
        return [token_id for output in outputs for token_id in output.token_ids]

    def _event(self, choice: CompletionChoice) -> Completion:
        return self._completion([choice], None if self.includes_usage else UNSET)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None
    ) -> Completion:
        return Completion(self.id, self.created, self.request.model, choices, usage)


def prompt_of(request: CompletionRequest) -> tuple[str | None, list[int] | None]:
    """The prompt as text or as token ids. A list of one prompt is that prompt."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt, None
    if not prompt:
        raise InvalidRequest("prompt must not be empty.", param="prompt")
    if all(isinstance(member, int) for member in prompt):
        return None, _checked([member for member in prompt if isinstance(member, int)])
    if len(prompt) > 1:
        raise not_supported("prompt", "several prompts in one request are")
    (only,) = prompt
    if isinstance(only, str):
        return only, None
    assert isinstance(only, list)
    return None, _checked(only)


def _checked(token_ids: list[int]) -> list[int]:
    if not token_ids:
        raise InvalidRequest("prompt must not be empty.", param="prompt")
    if not all(0 <= token_id < 2**31 for token_id in token_ids):
        raise InvalidRequest("prompt: token ids are 0 or more.", param="prompt")
    return token_ids


def _logprobs(entries: list[TokenLogprob] | None, offset: int) -> CompletionLogprobs | None:
    if entries is None:
        return None
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.text)
    return CompletionLogprobs(
        tokens=[entry.text for entry in entries],
        token_logprobs=[json_logprob(entry.logprob) for entry in entries],
        top_logprobs=[
            {text: json_logprob(logprob) for _, text, logprob in reversed(entry.top)}
            or {entry.text: json_logprob(entry.logprob)}
            for entry in entries
        ],
        text_offset=offsets,
    )
