"""The prefix index: finds the block that already holds given tokens after a given prefix.

Owns keys and their lookup. Does not own the blocks' life (blocks.py).
"""

from array import array
from hashlib import sha256

from runtime.scheduling.sequence import BlockKey, Sequence


class PrefixIndex:
    """Full blocks by a SHA-256 chain over (salt, tokens).

    A digest covers everything before its block, so equal digests mean equal prefixes under the
    same salt; a hit's own tokens are compared as well, all along the chain. Two salts never meet.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._entries: dict[bytes, tuple[int, bytes]] = {}  # digest -> (block, its tokens)
        self._digests: dict[int, bytes] = {}  # block -> digest

    def __len__(self) -> int:
        return len(self._entries)

    def extend_keys(self, sequence: Sequence) -> None:
        """Bring `sequence.block_keys` up to its full blocks; each is hashed once in its life."""
        size, keys = self.block_size, sequence.block_keys
        for start in range(len(keys) * size, len(sequence.token_ids) - size + 1, size):
            parent = keys[-1].digest if keys else sha256(sequence.cache_salt).digest()
            tokens = array("i", sequence.token_ids[start : start + size]).tobytes()
            keys.append(BlockKey(sha256(parent + tokens).digest(), tokens))

    def find(self, key: BlockKey) -> int | None:
        """The block with these contents. Only to be asked for a block whose parent was found."""
        entry = self._entries.get(key.digest)
        if entry is None or entry[1] != key.tokens:
            return None
        return entry[0]

    def match(self, sequence: Sequence) -> list[int]:
        """The longest run of cached blocks that begins the sequence."""
        blocks: list[int] = []
        for key in sequence.block_keys:
            block = self.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, key: BlockKey, block: int) -> bool:
        """Make the block findable. False when another block already holds the same."""
        if key.digest in self._entries:
            return False
        self._entries[key.digest] = (block, key.tokens)
        self._digests[block] = key.digest
        return True

    def forget(self, block: int) -> None:
        """The block's contents are gone or not to be trusted; no-op if it was not findable."""
        digest = self._digests.pop(block, None)
        if digest is not None:
            del self._entries[digest]
