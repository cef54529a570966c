"""What unanswered requests hold of a worker's memory, and how much of it they may.

Owns the bound and the count by request. Does not own the bound on their number, nor the cache.
"""

import sys

from runtime.protocol import Generate

MAX_WAITING_BYTES = 512 * 1024 * 1024

ID_BYTES = 48  # a Python int, its place in the prompt's list, its part of a block's key
COPY_BYTES = 8  # its place in the list of one choice


class WaitingMemory:
    """Bytes by request id. One request alone may hold more than the bound: each is bounded by
    its frame and by the context, and would otherwise never be answered."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._total = 0

    @property
    def total_bytes(self) -> int:
        return self._total

    def hold(self, request_id: str, num_bytes: int) -> bool:
        """Count the request with `num_bytes` from here on. False, and nothing is changed, when
        that is too much beside the others."""
        others = self._total - self._bytes.get(request_id, 0)
        if others and others + num_bytes > MAX_WAITING_BYTES:
            return False
        self._bytes[request_id] = num_bytes
        self._total = others + num_bytes
        return True

    def release(self, request_id: str) -> None:
        """The request is answered. Idempotent."""
        self._total -= self._bytes.pop(request_id, 0)


def text_bytes(generate: Generate) -> int:
    """A request's text, in whatever form."""
    texts = [message.content for message in generate.messages or ()]
    texts += [tool.parameters for tool in generate.tools]
    if generate.json_schema is not None:
        texts.append(generate.json_schema)
    if generate.text is not None:
        texts.append(generate.text)
    return sum(map(sys.getsizeof, texts))


def prompt_bytes(num_tokens: int, num_choices: int) -> int:
    """A prompt's ids and each choice's copy of them."""
    return num_tokens * (ID_BYTES + COPY_BYTES * num_choices)
