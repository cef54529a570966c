"""Runs of tokens by what comes before them: which of those known shares most with a given one.

Owns the search. Does not own what the runs stand for (prefix.py, in_flight.py).
"""

from bisect import bisect_left, insort
from typing import NamedTuple

TOKEN_BYTES = 4


class Likeness(NamedTuple):
    """How many tokens the best run has in common with the one asked for, and its value."""

    num_tokens: int
    value: int


class Branches:
    """Under each parent (a digest of all tokens before), runs of token ids as bytes, sorted.

    Of sorted strings, the one that shares the longest beginning with another stands right before
    or after where that one would stand: a search looks at two runs, however many there are.
    """

    def __init__(self) -> None:
        self._runs: dict[bytes, list[tuple[bytes, int]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._runs.values()))

    def add(self, parent: bytes, tokens: bytes, value: int) -> None:
        insort(self._runs.setdefault(parent, []), (tokens, value))

    def remove(self, parent: bytes, tokens: bytes, value: int) -> None:
        """The run must be there."""
        runs = self._runs[parent]
        at = bisect_left(runs, (tokens, value))
        assert runs[at] == (tokens, value)
        del runs[at]
        if not runs:
            del self._runs[parent]

    def longest(self, parent: bytes, tokens: bytes) -> Likeness | None:
        """The run with the longest beginning in common; None when none has even one token."""
        best: Likeness | None = None
        for run, value in self._neighbours(parent, tokens):
            num_tokens = num_common_tokens(run, tokens)
            if num_tokens > (best.num_tokens if best else 0):
                best = Likeness(num_tokens, value)
        return best

    def _neighbours(self, parent: bytes, tokens: bytes) -> list[tuple[bytes, int]]:
        runs = self._runs.get(parent)
        if runs is None:
            return []
        at = bisect_left(runs, (tokens,))
        return runs[max(at - 1, 0) : at + 1]


def num_common_tokens(one: bytes, other: bytes) -> int:
    """Length of the common beginning, in tokens."""
    size = min(len(one), len(other))
    # The highest bit in which they differ, as big-endian numbers, is in the first byte that does.
    difference = int.from_bytes(one[:size]) ^ int.from_bytes(other[:size])
    return (size - (difference.bit_length() + 7) // 8) // TOKEN_BYTES
