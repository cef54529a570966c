"""What a request for embeddings asks for: its texts as token ids, or why that cannot be had.

Owns the refusals of a request, each naming the text. Does not own how texts share runs.
"""

from runtime.protocol import MAX_FRAME_BYTES, Embed, EmbedderInfo
from runtime.scheduling.validation import RequestError, check_vocabulary, refusal
from runtime.text.tokenizer import Tokenizer, TokenizerError

FLOAT_BYTES = 4
FRAME_ALLOWANCE_BYTES = 1024**2  # for whatever an answer holds beside its vectors


class EmbeddingTexts:
    """Tokenises and validates. `prompt` goes before every text, as the model was trained."""

    def __init__(
        self,
        info: EmbedderInfo,
        tokenizer: Tokenizer | None,
        *,
        prompt: str = "",
        lowercases: bool = False,
    ) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._lowercases = lowercases
        self._max_texts = (MAX_FRAME_BYTES - FRAME_ALLOWANCE_BYTES) // (
            FLOAT_BYTES * info.dimensions
        )

    def token_ids(self, embed: Embed) -> list[list[int]]:
        """Each text's ids, in order. Takes as long as tokenising does. Raises `RequestError`."""
        texts, given = embed.texts, embed.token_ids
        num_texts = len(texts if texts is not None else given or ())
        if (texts is None) == (given is None) or not num_texts:
            raise refusal("input must hold at least one text, or the token ids of one", "input")
        if num_texts > self._max_texts:
            raise refusal(
                f"input may hold at most {self._max_texts} texts of this model, whose vectors "
                "would not fit one answer otherwise",
                "input",
            )
        if texts is not None:
            return [self._encode(index, text) for index, text in enumerate(texts)]
        return [self._checked(index, ids) for index, ids in enumerate(given or ())]

    def _encode(self, index: int, text: str) -> list[int]:
        if self._tokenizer is None:
            raise refusal("this model has no tokenizer; send token ids instead", "input")
        if not text:
            raise refusal(f"input[{index}] is empty", "input")
        text = self._prompt + text
        if (least := self._tokenizer.num_tokens_at_least(text)) > self._info.max_tokens:
            raise too_long(index, least, self._info.max_tokens)
        try:
            ids = self._tokenizer.encode(text.lower() if self._lowercases else text)
        except TokenizerError as error:
            raise refusal(f"input[{index}]: {error}", "input") from error
        if not ids:
            raise refusal(f"input[{index}] has no tokens", "input")
        return self._of_length(index, ids)

    def _checked(self, index: int, ids: list[int]) -> list[int]:
        if not ids:
            raise refusal(f"input[{index}] is empty", "input")
        check_vocabulary(ids, self._info.vocab_size, f"input[{index}]")
        return self._of_length(index, ids)

    def _of_length(self, index: int, ids: list[int]) -> list[int]:
        if len(ids) > self._info.max_tokens:
            raise too_long(index, len(ids), self._info.max_tokens)
        return ids


def too_long(index: int, num_tokens: int, max_tokens: int) -> RequestError:
    """Cutting a text silently would give the vector of another text."""
    return refusal(
        f"input[{index}] has {num_tokens} tokens; this model takes at most {max_tokens}. Split or "
        "shorten it.",
        "input",
        "context_length_exceeded",
    )
