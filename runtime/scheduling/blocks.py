"""The cache's blocks: which are free, which are in use, which hold something worth keeping.

Owns reference counts and eviction. Does not own what a block holds (prefix.py) nor its memory
(runtime.cache).
"""

from collections import OrderedDict
from collections.abc import Callable


class BlockPool:
    """Every block is exactly one of *free* (blank), *cached* (unused but findable by prefix) and
    *used* (referenced by running sequences, findable or not).

    `allocate` takes a free block, else the least recently used cached one, after telling
    `on_evict` so that its contents can no longer be found.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_references = [0] * num_blocks
        self._is_findable = [False] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    def is_cached(self, block: int) -> bool:
        return block in self._cached

    def allocate(self) -> int:
        """A block to write to, with one reference. At least one must be available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._is_findable[block] = False
            self._on_evict(block)
        self._num_references[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Add a reference to a block that was found by prefix."""
        assert self._is_findable[block]
        self._cached.pop(block, None)
        self._num_references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop one reference of each block of a sequence, given in the sequence's order."""
        # Last block first: a block is only findable through those before it, so they must outlive
        # it in the order of eviction.
        for block in reversed(blocks):
            assert self._num_references[block] > 0
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                if self._is_findable[block]:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int) -> None:
        """From now on the block is kept for others after its last reference goes."""
        assert self._num_references[block] > 0
        self._is_findable[block] = True

    def forget(self, block: int) -> None:
        """Undo `publish`: what the block holds must not be reused."""
        self._is_findable[block] = False
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def check_integrity(self, references: dict[int, int]) -> None:
        """Assert that free + cached + used = total, that none is two of them, and that
        `references` (block to count, as the running sequences hold them) is what we counted."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._num_references) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free | cached | used) == self.num_blocks, "a block is lost"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is in two states"
        assert all(self._is_findable[block] for block in cached)
        assert references == {block: self._num_references[block] for block in used}
