"""Host memory for the blocks of preempted sequences: which of its blocks are taken.

Owns their numbers. Does not own their memory (runtime.cache) nor who is swapped (scheduler.py).
"""

from runtime.scheduling.sequence import Swapped


class SwapArea:
    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` may be 0: then nothing is ever swapped."""
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_blocks: int) -> list[int] | None:
        """Blocks of the area; None when it has not as many left."""
        if num_blocks > len(self._free):
            return None
        return [self._free.pop() for _ in range(num_blocks)]

    def give(self, blocks: list[int]) -> None:
        self._free += blocks

    def check_integrity(self, held: list[Swapped]) -> None:
        """Assert that every block is either free or held by one of the swapped."""
        taken = [block for swapped in held for block in swapped.host_blocks]
        assert sorted(taken + self._free) == list(range(self.num_blocks)), "a swap block is lost"
