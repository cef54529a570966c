"""The prefix index: finds the blocks that already hold given tokens after a given prefix.

Owns keys and their lookup. Does not own the blocks' life (blocks.py).
"""

from array import array
from hashlib import sha256
from typing import NamedTuple

from runtime.scheduling.branches import TOKEN_BYTES, Branches
from runtime.scheduling.sequence import BlockKey, Sequence


class Match(NamedTuple):
    """What the cache holds of a sequence's beginning: whole blocks to share, then the first
    `num_copied_tokens` of block `source`, to be copied (None: there are none)."""

    blocks: list[int]
    source: int | None = None
    num_copied_tokens: int = 0


class _Entry(NamedTuple):
    parent: bytes
    tokens: bytes
    digest: bytes | None  # None for a block that is filled in part


class PrefixIndex:
    """Blocks by a SHA-256 chain over (salt, tokens), and under each the blocks that go on from it.

    A digest covers everything before its block, so equal digests mean equal prefixes under the
    same salt; a hit's own tokens are compared as well, all along the chain. Two salts never meet.

    A block is held here at most once, full or filled in part, and no block of which another
    holds all tokens and more: there are never more entries than blocks in the pool.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._full: dict[bytes, int] = {}  # digest -> block
        self._entries: dict[int, _Entry] = {}  # by block
        self._branches = Branches()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    # --- keys ---------------------------------------------------------------------------

    def extend_keys(self, sequence: Sequence) -> None:
        """Bring `sequence.block_keys` up to its full blocks; each is hashed once in its life."""
        size, keys = self.block_size, sequence.block_keys
        for start in range(len(keys) * size, len(sequence.token_ids) - size + 1, size):
            parent = keys[-1].digest if keys else root_digest(sequence.cache_salt)
            tokens = token_bytes(sequence.token_ids[start : start + size])
            # The first byte keeps the chain's digests and the salts' apart.
            keys.append(BlockKey(parent, sha256(b"\1" + parent + tokens).digest(), tokens))

    def parent(self, sequence: Sequence, at: int) -> bytes:
        """The digest of all before the sequence's block `at`, which must be full up to there."""
        return sequence.block_keys[at - 1].digest if at else root_digest(sequence.cache_salt)

    def tokens_to_find(self, sequence: Sequence, at: int) -> bytes:
        """The tokens of block `at` that are worth finding in the cache: all but the sequence's
        last, which must run in any case, to be sampled from."""
        start = at * self.block_size
        end = min(start + self.block_size, len(sequence.token_ids) - 1)
        return token_bytes(sequence.token_ids[start:end])

    # --- finding ------------------------------------------------------------------------

    def find(self, key: BlockKey) -> int | None:
        """The full block with these contents. Only to be asked for a block whose parent was
        found."""
        block = self._full.get(key.digest)
        if block is None or self._entries[block].tokens != key.tokens:
            return None
        return block

    def match(self, sequence: Sequence) -> Match:
        """The longest beginning of the sequence that is in the cache, its last token excepted."""
        blocks: list[int] = []
        for at in range((len(sequence.token_ids) - 1) // self.block_size):
            block = self.find(sequence.block_keys[at])
            if block is None:
                break
            blocks.append(block)
        at = len(blocks)
        best = self._branches.longest(self.parent(sequence, at), self.tokens_to_find(sequence, at))
        return Match(blocks, best.value, best.num_tokens) if best else Match(blocks)

    # --- changing -----------------------------------------------------------------------

    def publish(self, key: BlockKey, block: int) -> int | None:
        """Make a full block findable; the rest as `publish_part`."""
        return self._publish(_Entry(key.parent, key.tokens, key.digest), block)

    def publish_part(self, parent: bytes, tokens: bytes, block: int) -> int | None:
        """Make findable what a block begins with. Replaces what the block was found by before.

        Returns the block that is findable no more, if any: one that only began as this one does,
        or this one itself when another holds as much.
        """
        return self._publish(_Entry(parent, tokens, None), block)

    def _publish(self, entry: _Entry, block: int) -> int | None:
        self.forget(block)
        if entry.digest in self._full:
            return block
        parent, tokens, digest = entry
        loser: int | None = None
        # As no run begins another, only the nearest can begin with this one, or this one with it.
        if best := self._branches.longest(parent, tokens):
            num_bytes = best.num_tokens * TOKEN_BYTES
            if num_bytes == len(tokens):
                return block
            if num_bytes == len(self._entries[best.value].tokens):
                loser = best.value
                self.forget(loser)
        self._entries[block] = entry
        self._branches.add(parent, tokens, block)
        if digest is not None:
            self._full[digest] = block
        return loser

    def forget(self, block: int) -> None:
        """The block's contents are gone or not to be trusted; no-op if it was not findable."""
        entry = self._entries.pop(block, None)
        if entry is None:
            return
        self._branches.remove(entry.parent, entry.tokens, block)
        if entry.digest is not None:
            del self._full[entry.digest]


def root_digest(cache_salt: bytes) -> bytes:
    """What a first block's parent is under this salt."""
    return sha256(b"\0" + cache_salt).digest()


def token_bytes(token_ids: list[int]) -> bytes:
    return array("i", token_ids).tobytes()
