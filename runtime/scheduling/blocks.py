"""The cache's blocks: which are free, which are in use, which hold something worth keeping.

Owns reference counts and eviction. Does not own what a block holds (prefix.py) nor its memory
(runtime.cache).
"""

from collections import OrderedDict
from collections.abc import Callable, Container


class BlockPool:
    """Every block is exactly one of *free* (blank), *cached* (unused but findable by prefix) and
    *used* (referenced by running sequences or as the source of a copy, findable or not).

    `allocate` takes a free block, else the least recently used cached one, after telling
    `on_evict` so that its contents can no longer be found.
    """

    def __init__(
        self, num_blocks: int, on_evict: Callable[[int], None], *, notes_vacated: bool = False
    ) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_references = [0] * num_blocks
        self._is_findable = [False] * num_blocks
        # Blocks whose contents nobody may read any more, whatever they are now.
        self._vacated: dict[int, None] | None = {} if notes_vacated else None

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

    def is_shared(self, block: int) -> bool:
        """Whether more than one refers to the block."""
        return self._num_references[block] > 1

    def allocate(self) -> int:
        """A block to write to, with one reference. At least one must be available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._is_findable[block] = False
            self._on_evict(block)
            self._vacate(block)
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
                    self._vacate(block)

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
            self._vacate(block)

    def take_vacated(self) -> list[int]:
        """The blocks whose contents were given up since the last call; none unless noted."""
        vacated = list(self._vacated or ())
        if vacated:
            self._vacated = {}
        return vacated

    def _vacate(self, block: int) -> None:
        if self._vacated is not None:
            self._vacated[block] = None

    def check_integrity(self, references: dict[int, int], index: Container[int]) -> None:
        """Assert that free + cached + used = total, that none is two of them, that `references`
        (block to count, as they are held) is what we counted, and that `index` finds exactly the
        blocks that are findable."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, count in enumerate(self._num_references) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free | cached | used) == self.num_blocks, "a block is lost"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is in two states"
        assert all(self._is_findable[block] for block in cached)
        assert all((block in index) == findable for block, findable in enumerate(self._is_findable))
        assert references == {block: self._num_references[block] for block in used}
