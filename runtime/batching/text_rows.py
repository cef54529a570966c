"""Rows of texts, or of pairs of texts, to the input tensors of a program: as transformers does.

Owns the refusals of rows, each naming its row: nothing is cut silently. Blocks; its caller keeps
it off the event loop.
"""

import math
from array import array
from pathlib import Path

import tokenizers

from runtime.batching.tensors import PredictFailure
from runtime.protocol import MAX_FRAME_BYTES, Schema, Tensor, TensorSpec, TextInput
from runtime.text.tokenizer import TokenizerError

TOKENIZER_NAME = "tokenizer.json"
ITEM_BYTES = 8  # of an int64
# What rows may come to once they are padded: as much as could be sent as tensors.
MAX_TENSOR_BYTES = MAX_FRAME_BYTES
# No text has more characters than this for each token; a longer one is not tokenised at all.
MAX_TOKEN_CHARACTERS = 256
MIN_REFUSED_CHARACTERS = 100_000
# Of all rows together: others wait while they are tokenised, which takes seconds.
MAX_CHARACTERS = 8_000_000


class TextRows:
    """Tokenises and pads. `schema` is the program's, whose inputs `text` names: its ranges bound
    the token ids, and rows of different lengths are taken where it says that padding is
    harmless."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, text: TextInput, schema: Schema) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._text = text
        self._specs = {spec.name: spec for spec in schema.inputs}
        token_ids = self._specs[text.token_ids]
        self._longest_padded: float = 0
        if token_ids.padded_axis is not None:
            self._longest_padded = token_ids.longest_padded or math.inf
        self._most_id = token_ids.maximum
        longest = max(MIN_REFUSED_CHARACTERS, text.max_tokens * MAX_TOKEN_CHARACTERS)
        self._max_characters = longest

    @classmethod
    def load(cls, directory: Path, text: TextInput, schema: Schema) -> "TextRows":
        """From an artifact. Raises `TokenizerError`."""
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_NAME))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
        return cls(tokenizer, text, schema)

    def __call__(self, rows: list[list[str]]) -> list[Tensor]:
        """One row of every input for each of `rows`, in the program's order. Raises
        `PredictFailure`."""
        if not rows:
            raise _refusal("texts must hold at least one row")
        for index, row in enumerate(rows):
            self._check(index, row)
        num_characters = sum(len(text) for row in rows for text in row)
        if num_characters > MAX_CHARACTERS:
            raise _refusal(
                f"texts have {num_characters:,} characters; a request may have "
                f"{MAX_CHARACTERS:,}. Send fewer rows per request.",
                "too_many_rows",
            )
        encodings = self._encode(rows)
        lengths = [len(encoding.ids) for encoding in encodings]
        longest = max(lengths)
        for index, encoding in enumerate(encodings):
            self._check_length(index, encoding)
        self._check_together(lengths)
        columns = {
            self._text.token_ids: [encoding.ids for encoding in encodings],
            self._text.attention_mask: [encoding.attention_mask for encoding in encodings],
            self._text.token_type_ids: [encoding.type_ids for encoding in encodings],
        }
        return [_tensor(spec, columns[name], longest) for name, spec in self._specs.items()]

    # --- one row ------------------------------------------------------------------------

    def _check(self, index: int, row: list[str]) -> None:
        if len(row) not in (1, 2):
            raise _refusal(f"texts[{index}] must be a text, or two")
        if len(row) == 2 and not self._text.takes_pairs:
            raise _refusal(f"texts[{index}] has two texts; this model takes one in each row")
        num_characters = sum(map(len, row))
        if num_characters > self._max_characters:
            raise _refusal(
                f"texts[{index}] has {num_characters:,} characters; this model takes "
                f"{self._text.max_tokens:,} tokens at most. Split or shorten it.",
                "context_length_exceeded",
            )

    def _check_length(self, index: int, encoding: tokenizers.Encoding) -> None:
        num_tokens = len(encoding.ids)
        if not num_tokens:
            raise _refusal(f"texts[{index}] has no tokens")
        if num_tokens > self._text.max_tokens:
            raise _refusal(
                f"texts[{index}] has {num_tokens:,} tokens; this model takes at most "
                f"{self._text.max_tokens:,}. Split or shorten it.",
                "context_length_exceeded",
            )
        if self._most_id is not None and max(encoding.ids) > self._most_id:
            raise _refusal(f"texts[{index}] has a token that the model does not know")

    # --- all rows -----------------------------------------------------------------------

    def _encode(self, rows: list[list[str]]) -> list[tokenizers.Encoding]:
        inputs = [row[0] if len(row) == 1 else (row[0], row[1]) for row in rows]
        try:
            return self._tokenizer.encode_batch_fast(inputs)
        except BaseException as error:
            # A panic of the library is no `Exception`, and would end the thread.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise _refusal("the tokenizer fails on these texts") from error

    def _check_together(self, lengths: list[int]) -> None:
        if max(lengths) > self._longest_padded and len(set(lengths)) > 1:
            raise _refusal(
                f"texts have {min(lengths)} to {max(lengths)} tokens; this model's answers would "
                "change if the shorter ones were padded. Send one row per request.",
                "unequal_lengths",
            )
        num_bytes = len(lengths) * max(lengths) * ITEM_BYTES * len(self._specs)
        if num_bytes > MAX_TENSOR_BYTES:
            raise _refusal(
                f"texts have {len(lengths):,} rows of up to {max(lengths):,} tokens, which is more "
                "than fits one request. Send fewer rows per request.",
                "too_many_rows",
            )


def _tensor(spec: TensorSpec, rows: list[list[int]], longest: int) -> Tensor:
    """Filled up on the right with the input's own padding."""
    values = array("q")
    pad = int(spec.pad_value)
    for row in rows:
        values.extend(row)
        values.extend([pad] * (longest - len(row)))
    return Tensor(name=spec.name, dtype="int64", shape=[len(rows), longest], data=values.tobytes())


def _refusal(message: str, code: str = "invalid_value") -> PredictFailure:
    return PredictFailure(code, message, param="texts")
