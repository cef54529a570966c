"""What is done to a request before it runs: its prompt as token ids, its bounds.

Owns the refusals of a request and of its prompt. Does not own what runs (decoder.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.engine.constraints import Constraint, Constraints, offered_tools
from runtime.protocol import Generate
from runtime.scheduling.validation import check_sampling, check_vocabulary, refusal
from runtime.text.chat import ChatTemplate, ChatTemplateError
from runtime.text.tokenizer import Tokenizer

MAX_CHOICES = 128


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A valid request, ready to run. `max_tokens` is per choice: the request's own limit or what
    is left of the context, whichever is less; 0 of one that is only counted."""

    generate: Generate
    token_ids: list[int]
    max_tokens: int
    constraint: Constraint | None = None  # what the answer may be

    @property
    def request_id(self) -> str:
        return self.generate.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)


class Preparation:
    """Tokenises and validates, for one model. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
        *,
        num_ids: int,
        max_sequence_tokens: int,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        """Token ids below `num_ids` may be in a sequence."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._num_ids = num_ids
        self._max_sequence_tokens = max_sequence_tokens
        self._constraints = Constraints(tokenizer, chat_template, eos_token_ids, num_ids)

    def to_compile(self, generate: Generate) -> bytes | None:
        """What tells the grammar from others that `prepare` must compile, which may take seconds;
        None when there is nothing to compile."""
        return self._constraints.to_compile(generate)

    def prepare(self, generate: Generate) -> PreparedRequest:
        """Tokenise and validate. Raises `RequestError`."""
        params = generate.sampling
        check_sampling(params, self._num_ids, has_tokenizer=self._tokenizer is not None)
        if not 1 <= generate.num_choices <= MAX_CHOICES:
            raise refusal(f"n must be 1 to {MAX_CHOICES}, not {generate.num_choices}", "n")
        if generate.echo and params.logprobs is not None:
            raise refusal("logprobs of an echoed prompt are not supported", "echo")
        self._constraints.check(generate)
        param = "prompt" if generate.messages is None else "messages"
        token_ids = self._tokenise(generate)
        if not token_ids:
            raise refusal("the prompt is empty: it must have at least one token", param)
        if generate.is_count:
            return PreparedRequest(generate, token_ids, 0)
        self._check_length(len(token_ids), param)
        check_vocabulary(token_ids, self._num_ids, param)
        num_left = self._max_sequence_tokens - len(token_ids)
        max_tokens = min(params.max_tokens, num_left)
        return PreparedRequest(
            generate, token_ids, max_tokens, self._constraints.constraint_of(generate)
        )

    def _tokenise(self, generate: Generate) -> list[int]:
        given = (generate.text, generate.token_ids, generate.messages)
        if sum(each is not None for each in given) != 1:
            raise refusal("give exactly one of text, token ids and messages", "prompt")
        if generate.token_ids is not None:
            return generate.token_ids
        if self._tokenizer is None:
            raise refusal("this model has no tokenizer; send the prompt as token ids", "prompt")
        if generate.text is not None:
            self._check_length(self._tokenizer.num_tokens_at_least(generate.text), "prompt")
            return self._tokenizer.encode(generate.text)
        assert generate.messages is not None
        if self._chat_template is None:
            raise refusal("this model has no chat template; use plain completions", "messages")
        if not generate.messages:
            raise refusal("messages must hold at least one message", "messages")
        try:
            text = self._chat_template.render(generate.messages, offered_tools(generate))
        except ChatTemplateError as error:
            raise refusal(str(error), "messages") from error
        return self._tokenizer.encode(text, is_templated=True)

    def _check_length(self, num_tokens: int, param: str) -> None:
        if num_tokens >= self._max_sequence_tokens:
            raise refusal(
                f"the prompt has {num_tokens} tokens or more; with at least one token to generate, "
                f"it may have {self._max_sequence_tokens - 1}",
                param,
                code="context_length_exceeded",
            )
