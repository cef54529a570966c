"""Decides, step by step, which sequences run how many tokens, and in which blocks.

Owns admission, the token budget, preemption and the life of blocks. Does not run anything, and
knows tokens only as numbers. Not thread-safe: one thread adds, steps and aborts.
"""

from collections import Counter
from dataclasses import dataclass

from runtime.protocol import FinishReason
from runtime.scheduling.blocks import BlockPool
from runtime.scheduling.prefix import PrefixIndex
from runtime.scheduling.sequence import Sequence, SequenceStatus
from runtime.scheduling.waiting import WaitingLine


class SequenceTooLongError(Exception):
    """The sequence could not run even with the whole cache to itself."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`num_tokens` from `sequence.num_computed_tokens` on; `is_sampled` when they are its last."""

    sequence: Sequence
    num_tokens: int
    is_sampled: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decoding sequences first, then chunks of prompts."""

    items: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


class Scheduler:
    """Continuous batching over paged blocks with a shared prefix cache.

    - Blocks for all of a sequence's present tokens are taken when it is admitted, and one more
      whenever it outgrows them. If none is left, the newest sequence is preempted: its blocks go
      (cached, if full) and it is admitted again later. The oldest is never preempted and fits by
      itself, so every sequence ends.
    - Of sequences that share a prefix which a running one is still computing, only that one
      computes it: the others follow it, and are admitted when the prefix is in the cache.
    - A prompt that is cached to its end runs its last token again, to have something to sample
      from. That writes the same K/V to the same slot, so the block may be shared.
    """

    def __init__(
        self, num_blocks: int, block_size: int, max_batch_tokens: int, max_sequences: int
    ) -> None:
        """Raises `ValueError` when the limits do not let every running sequence get a token in
        every step: one of them might never end."""
        if not max_batch_tokens >= max_sequences > 0:
            raise ValueError(
                f"max_batch_tokens ({max_batch_tokens}) must be at least max_sequences "
                f"({max_sequences}), and that at least 1"
            )
        self.block_size = block_size
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.index = PrefixIndex(block_size)
        self.pool = BlockPool(num_blocks, on_evict=self.index.forget)
        self._line = WaitingLine()
        self._running: list[Sequence] = []  # oldest admission first
        self._num_waiting = 0
        # Digests of prompt blocks being computed: by whom, and who waits for them.
        self._computing: dict[bytes, Sequence] = {}
        self._followers: dict[bytes, list[Sequence]] = {}

    @property
    def max_sequence_tokens(self) -> int:
        """Prompt and answer together: what the whole cache can hold."""
        return self.pool.num_blocks * self.block_size

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._num_waiting)

    def add(self, sequence: Sequence) -> None:
        """Let the sequence wait for admission. Raises `SequenceTooLongError`."""
        assert sequence.num_prompt_tokens == len(sequence.token_ids) > 0
        assert sequence.max_tokens > 0
        num_tokens = sequence.num_prompt_tokens + sequence.max_tokens
        if num_tokens > self.max_sequence_tokens:
            raise SequenceTooLongError(
                f"{num_tokens} tokens (prompt and max_tokens) do not fit the cache of "
                f"{self.max_sequence_tokens}"
            )
        self.index.extend_keys(sequence)
        self._line.push(sequence)
        self._num_waiting += 1

    def abort(self, sequence: Sequence) -> None:
        self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End the sequence now, wherever it stands; idempotent. What an `error` computed is not
        kept in the cache."""
        if sequence.is_finished:
            return
        if sequence.status is SequenceStatus.RUNNING:
            if reason == "error":
                self._forget_blocks(sequence)
            self._stop_running(sequence)
        else:
            self._line.remove(sequence)
            self._num_waiting -= 1
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason

    def schedule(self) -> StepPlan | None:
        """Plan the next step. None when nothing is running or waiting."""
        items: list[ScheduledSequence] = []
        self._make_room_for_decodes()
        budget = self.max_batch_tokens
        # One token left to run means decoding; these go first, so that long prompts cannot stall
        # the streams of others.
        for sequence in sorted(
            self._running, key=lambda running: running.num_uncomputed_tokens > 1
        ):
            budget -= self._plan(items, sequence, budget)
        while budget > 0 and (sequence := self._admit_next()):
            budget -= self._plan(items, sequence, budget)
        assert items or not self.has_work
        return StepPlan(items) if items else None

    def commit(self, plan: StepPlan, sampled_token_ids: dict[int, int]) -> None:
        """Record that the plan was run. `sampled_token_ids` maps the sequence ids of its sampled
        items to their next tokens. Sequences that finished meanwhile are left alone."""
        for item in plan.items:
            sequence = item.sequence
            if sequence.is_finished:
                continue
            self._line.charge(sequence, item.num_tokens)
            self._advance(sequence, item.num_tokens)
            if item.is_sampled:
                reason = sequence.append(sampled_token_ids[sequence.sequence_id])
                if reason is not None:
                    self.finish(sequence, reason)

    def check_integrity(self) -> None:
        """Assert that no block is lost and none is held by a sequence that does not run."""
        held = Counter(block for sequence in self._running for block in sequence.block_table)
        self.pool.check_integrity(dict(held))
        assert all(owner.status is SequenceStatus.RUNNING for owner in self._computing.values())
        assert self._followers.keys() <= self._computing.keys()

    # --- the running --------------------------------------------------------------------

    def _plan(self, items: list[ScheduledSequence], sequence: Sequence, budget: int) -> int:
        """Give the sequence as much of the budget as it can use; returns how much."""
        remaining = sequence.num_uncomputed_tokens
        num_tokens = min(remaining, budget)
        if num_tokens > 0:
            items.append(ScheduledSequence(sequence, num_tokens, num_tokens == remaining))
        return num_tokens

    def _make_room_for_decodes(self) -> None:
        """Give every running sequence a slot for its last token, preempting the newest if blocks
        run out. Oldest first, so that no one loses a block to a newer sequence."""
        at = 0
        while at < len(self._running):
            sequence = self._running[at]
            if len(sequence.block_table) * self.block_size >= len(sequence.token_ids):
                at += 1
            elif self.pool.num_available:
                sequence.block_table.append(self.pool.allocate())
            else:
                self._preempt(self._running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.status = SequenceStatus.PREEMPTED
        sequence.num_computed_tokens = 0
        self._line.push(sequence)
        self._num_waiting += 1

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        for key in sequence.block_keys[sequence.num_computed_tokens // self.block_size :]:
            self._settle(key.digest, sequence)

    def _forget_blocks(self, sequence: Sequence) -> None:
        for block in sequence.block_table:
            self.index.forget(block)
            self.pool.forget(block)

    def _advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens as computed and publish the blocks they filled, prompt's or answer's."""
        first = sequence.num_computed_tokens // self.block_size
        sequence.num_computed_tokens += num_tokens
        self.index.extend_keys(sequence)
        for at in range(first, sequence.num_computed_tokens // self.block_size):
            key, block = sequence.block_keys[at], sequence.block_table[at]
            if self.index.publish(key, block):
                self.pool.publish(block)
            self._settle(key.digest, sequence)

    def _settle(self, digest: bytes, sequence: Sequence) -> None:
        """The sequence has computed this block, or never will: who followed it waits no more."""
        if self._computing.get(digest) is sequence:
            del self._computing[digest]
            for follower in self._followers.pop(digest, ()):
                if not follower.is_finished:
                    self._line.push(follower)

    # --- the waiting --------------------------------------------------------------------

    def _admit_next(self) -> Sequence | None:
        """Admit whoever is next in line and does not follow another. None when there is no one,
        or no room: then nobody overtakes, or a long prompt might never get in."""
        while len(self._running) < self.max_sequences and (sequence := self._line.peek()):
            blocks = self.index.match(sequence)
            if digest := self._find_computing(sequence, len(blocks)):
                self._followers.setdefault(digest, []).append(self._line.pop())
            elif self._has_room_for(sequence, blocks):
                self._line.pop()
                self._admit(sequence, blocks)
                return sequence
            else:
                return None
        return None

    def _find_computing(self, sequence: Sequence, num_matched: int) -> bytes | None:
        """The last of the sequence's next blocks that one running sequence is computing."""
        digest = None
        for key in sequence.block_keys[num_matched:]:
            if key.digest not in self._computing:
                break
            digest = key.digest
        return digest

    def _has_room_for(self, sequence: Sequence, cached_blocks: list[int]) -> bool:
        num_new = self._num_blocks(sequence) - len(cached_blocks)
        num_available = self.pool.num_available - sum(map(self.pool.is_cached, cached_blocks))
        # A block in reserve for each running sequence: whoever is admitted into the very last
        # one is soon preempted again.
        return num_new + len(self._running) <= num_available

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-len(sequence.token_ids) // self.block_size)

    def _admit(self, sequence: Sequence, cached_blocks: list[int]) -> None:
        for block in cached_blocks:
            self.pool.acquire(block)
        num_new = self._num_blocks(sequence) - len(cached_blocks)
        new_blocks = [self.pool.allocate() for _ in range(num_new)]
        sequence.block_table = cached_blocks + new_blocks
        # At least one token must run, to be sampled from.
        num_cached_tokens = len(cached_blocks) * self.block_size
        sequence.num_computed_tokens = min(num_cached_tokens, len(sequence.token_ids) - 1)
        if sequence.status is SequenceStatus.WAITING:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        for key in sequence.block_keys[len(cached_blocks) :]:
            self._computing.setdefault(key.digest, sequence)
        sequence.status = SequenceStatus.RUNNING
        self._running.append(sequence)
        self._num_waiting -= 1
