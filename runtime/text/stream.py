"""The text of one sequence as it is delivered: detokenized, and ended by stop strings.

Owns what is held back. Does not own token-level stops (runtime.scheduling).
"""

from runtime.text.detokenizer import make_detokenizer
from runtime.text.tokenizer import Tokenizer


class TextStream:
    """Text goes out as soon as it can be neither part of a character nor of a stop string.

    After a stop string `stop_string` tells which it was; the string and what follows are never
    delivered.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], stop: list[str]) -> None:
        self._detokenizer = make_detokenizer(tokenizer, prompt_ids)
        self._stop = stop
        self._held = ""  # decided text that may begin a stop string
        self.stop_string: str | None = None

    @property
    def is_stopped(self) -> bool:
        return self.stop_string is not None

    def add(self, token_ids: list[int]) -> str:
        return self._deliver(self._detokenizer.add(token_ids))

    def flush(self) -> str:
        """The rest, at the end of the sequence; nothing after a stop string."""
        text = self._deliver(self._detokenizer.flush())
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        return text

    def _deliver(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        # The one that is complete first, as if the text had come character by character.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stop_string = min(found)
            self._held = ""
            return text[:at]
        num_held = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
