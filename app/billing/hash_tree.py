"""A Merkle tree that is kept, so that many paths through it cost little more than one.

The same tree as `digests.py`'s: pairing neighbours level by level, with a last one that has no
neighbour going up as it is, gives RFC 6962's.
"""

import hashlib
from collections.abc import Iterable

from app.billing.digests import NODE, PathStep, leaf_hash

HASH_BYTES = 32


class HashTree:
    """All hashes of a tree: 64 bytes for each leaf, or a little less."""

    def __init__(self, leaves: Iterable[bytes]) -> None:
        level = b"".join(leaf_hash(leaf) for leaf in leaves)
        self._levels = [level]
        while len(level) > HASH_BYTES:
            level = _paired(level)
            self._levels.append(level)

    @property
    def root(self) -> bytes:
        return self._levels[-1] or hashlib.sha256().digest()

    def path(self, index: int) -> list[PathStep]:
        """As `digests.merkle_path` gives it."""
        steps: list[PathStep] = []
        for level in self._levels[:-1]:
            start = (index ^ 1) * HASH_BYTES
            if start < len(level):
                side = "left" if index & 1 else "right"
                steps.append(PathStep(side, level[start : start + HASH_BYTES].hex()))
            index >>= 1
        return steps


def _paired(level: bytes) -> bytes:
    pairs = (level[start : start + 2 * HASH_BYTES] for start in range(0, len(level), 64))
    return b"".join(
        hashlib.sha256(NODE + pair).digest() if len(pair) == 2 * HASH_BYTES else pair
        for pair in pairs
    )
