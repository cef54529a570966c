"""Token ids to text as they come, in deltas that never end inside a character.

Owns the state of one stream. All deltas and the flush together are what `Tokenizer.decode` makes
of all the ids at once, at a cost per token that does not grow with the stream.
"""

import codecs
import re
from collections.abc import Iterable
from typing import Protocol

from runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
MAX_HELD_TOKENS = 32
MAX_PROMPT_TOKENS_READ = 16


class Detokenizer(Protocol):
    def add(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now and was not before."""
        ...

    def flush(self) -> str:
        """What is left at the end of the stream."""
        ...


def make_detokenizer(tokenizer: Tokenizer, prompt_ids: list[int]) -> Detokenizer:
    """A detokenizer for what follows the prompt."""
    if tokenizer.is_byte_level:
        return ByteLevelDetokenizer(tokenizer, prompt_ids)
    return WindowDetokenizer(tokenizer, prompt_ids)


class ByteLevelDetokenizer:
    """For byte-level BPE: every token is some bytes, whatever is around it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.add(prompt_ids[-MAX_PROMPT_TOKENS_READ:])  # it may end inside a character

    def add(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other decoder: decodes a short window of the last tokens, twice.

    What new tokens add depends on those before (the first of a text may lose its space), so
    they are decoded behind the last tokens whose text is out, and the difference counts. Tokens
    are held while their text may still change: it ends inside a character, or in a run of
    `<0x..>` byte tokens, all of which turn into U+FFFD if the run is not valid in the end. A run
    longer than `MAX_HELD_TOKENS` is let out early, at the end of a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        # However far back: without any, the answer would lose a space as the first of a text does.
        self._context = next(
            (
                [id_]
                for id_ in reversed(prompt_ids)
                if self._visible([id_]) and not self._is_byte(id_)
            ),
            [],
        )
        self._held: list[int] = []

    def add(self, token_ids: Iterable[int]) -> str:
        self._held += self._visible(token_ids)
        return self._release(MAX_HELD_TOKENS) if self._held else ""

    def flush(self) -> str:
        return self._release(0) if self._held else ""

    def _release(self, max_held: int) -> str:
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._held)
        if after.endswith(REPLACEMENT) and max_held:
            max_held += 4  # let a character end before the run is let out
        is_undecided = after.endswith(REPLACEMENT) or self._is_byte(self._held[-1])
        if is_undecided and len(self._held) < max_held:
            return ""
        if not after.startswith(before):  # a run that was let out early, and was not valid
            before, after = "", self._tokenizer.decode(self._held)
        self._context, self._held = self._held, []
        return after[len(before) :]

    def _visible(self, token_ids: Iterable[int]) -> list[int]:
        return [each for each in token_ids if self._tokenizer.piece(each) is not None]

    def _is_byte(self, token_id: int) -> bool:
        return BYTE_PIECE.fullmatch(self._tokenizer.piece(token_id) or "") is not None
