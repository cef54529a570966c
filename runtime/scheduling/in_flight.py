"""What running sequences are computing at the moment, and who waits to share it.

Owns leaders and their followers. Does not own who is admitted (scheduler.py) nor what is computed
already (prefix.py).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from runtime.scheduling.branches import Branches
from runtime.scheduling.prefix import Match, PrefixIndex, token_bytes
from runtime.scheduling.sequence import Sequence, SequenceStatus


@dataclass(eq=False, slots=True)
class PendingBlock:
    """A block of prompt tokens that `leader` will have computed once it has computed `end` tokens.
    The last may be filled in part: then it has no digest."""

    ticket: int
    leader: Sequence
    parent: bytes
    tokens: bytes
    digest: bytes | None
    end: int
    followers: list[Sequence] = field(default_factory=list[Sequence])


class InFlight:
    """Each pending block by what it will hold. A block that two sequences compute is the first
    one's."""

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._tickets = count()
        self._by_digest: dict[bytes, PendingBlock] = {}
        self._by_ticket: dict[int, PendingBlock] = {}
        self._branches = Branches()
        # By sequence id, in the order they will be computed.
        self._by_leader: dict[int, deque[PendingBlock]] = {}

    def lead(self, sequence: Sequence) -> None:
        """Let others follow the sequence, which was just admitted."""
        size, keys = self._index.block_size, sequence.block_keys
        mine = self._by_leader[sequence.sequence_id] = deque[PendingBlock]()
        for at in range(sequence.num_computed_tokens // size, len(keys)):
            key = keys[at]
            if key.digest not in self._by_digest:
                mine.append(self._pend(sequence, key.parent, key.tokens, key.digest, at + 1))
        if tail := sequence.token_ids[len(keys) * size :]:
            parent = self._index.parent(sequence, len(keys))
            pending = self._pend(sequence, parent, token_bytes(tail), None, len(keys))
            pending.end += len(tail)
            mine.append(pending)

    def _pend(
        self, leader: Sequence, parent: bytes, tokens: bytes, digest: bytes | None, num_blocks: int
    ) -> PendingBlock:
        end = num_blocks * self._index.block_size
        pending = PendingBlock(next(self._tickets), leader, parent, tokens, digest, end)
        if digest is not None:
            self._by_digest[digest] = pending
        self._by_ticket[pending.ticket] = pending
        self._branches.add(parent, tokens, pending.ticket)
        return pending

    def find(self, sequence: Sequence, match: Match) -> PendingBlock | None:
        """The last block that is worth waiting for, for a sequence of which the cache holds
        `match` now; None if it had better start."""
        size, keys = self._index.block_size, sequence.block_keys
        found: PendingBlock | None = None
        at = len(match.blocks)
        num_here = at * size + match.num_copied_tokens
        while at < len(keys) and (pending := self._by_digest.get(keys[at].digest)):
            found = pending
            at += 1
        num_there = min(at * size, len(sequence.token_ids) - 1)
        # Then the block in which it and the others part.
        tokens = self._index.tokens_to_find(sequence, at)
        if best := self._branches.longest(self._index.parent(sequence, at), tokens):
            found = self._by_ticket[best.value]
            num_there += best.num_tokens
        # A few tokens (the same first word, say) are not worth a step.
        return found if num_there - num_here >= max(1, size // 4) else None

    def settle(self, sequence: Sequence) -> list[PendingBlock]:
        """Take out what the sequence has computed meanwhile."""
        settled: list[PendingBlock] = []
        mine = self._by_leader.get(sequence.sequence_id, ())
        while mine and mine[0].end <= sequence.num_computed_tokens:
            settled.append(mine.popleft())
        self._take_out(settled)
        if not mine:
            self._by_leader.pop(sequence.sequence_id, None)
        return settled

    def leave(self, sequence: Sequence) -> list[PendingBlock]:
        """Take out all that the sequence was going to compute: it will not."""
        left = list(self._by_leader.pop(sequence.sequence_id, ()))
        self._take_out(left)
        return left

    def _take_out(self, blocks: Iterable[PendingBlock]) -> None:
        for pending in blocks:
            if pending.digest is not None:
                del self._by_digest[pending.digest]
            del self._by_ticket[pending.ticket]
            self._branches.remove(pending.parent, pending.tokens, pending.ticket)

    def check_integrity(self) -> int:
        """Assert that nobody waits for what nobody will compute; returns how many wait."""
        assert sum(map(len, self._by_leader.values())) == len(self._by_ticket)
        assert len(self._branches) == len(self._by_ticket)
        num_followers = 0
        for pending in self._by_ticket.values():
            leader = pending.leader
            assert leader.status is SequenceStatus.RUNNING, "a leader does not run"
            assert leader.num_computed_tokens < pending.end, "a block was computed, and is awaited"
            assert pending in self._by_leader[leader.sequence_id]
            num_followers += sum(not follower.is_finished for follower in pending.followers)
        return num_followers
