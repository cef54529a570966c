"""What the scheduler decides: the work of one step.

Owns the shape of a plan. Does not own how it comes about (scheduler.py).
"""

from dataclasses import dataclass, field

from runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`num_tokens` from `sequence.num_computed_tokens` on; `is_sampled` when they are its last."""

    sequence: Sequence
    num_tokens: int
    is_sampled: bool


@dataclass(frozen=True, slots=True)
class BlockMoves:
    """What happens to blocks before the step's tokens are written, once, in this order.

    No block is both read and written by `swap_ins` and `copies`, and none is poisoned after it
    was written.
    """

    swap_outs: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # block, host
    poisons: list[int] = field(default_factory=list[int])  # hold nothing that may be read
    swap_ins: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # host, block
    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # from, to

    def __bool__(self) -> bool:
        return bool(self.swap_outs or self.poisons or self.swap_ins or self.copies)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decoding sequences first, then chunks of prompts."""

    items: list[ScheduledSequence]
    moves: BlockMoves = field(default_factory=BlockMoves)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The cache now, and what was preempted since the start. All zero where there is no cache."""

    free_blocks: int = 0
    cached_blocks: int = 0
    used_blocks: int = 0
    preemptions: int = 0
    swapped_blocks: int = 0
