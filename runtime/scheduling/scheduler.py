"""Decides, step by step, which sequences run how many tokens, and in which blocks.

Owns admission, the token budget, preemption and the life of blocks. Does not run anything, and
knows tokens only as numbers. Not thread-safe: one thread adds, steps and aborts.
"""

from collections import Counter

from runtime.protocol import FinishReason
from runtime.scheduling.blocks import BlockPool
from runtime.scheduling.in_flight import InFlight, PendingBlock
from runtime.scheduling.plan import BlockMoves, CacheStats, ScheduledSequence, StepPlan
from runtime.scheduling.prefix import Match, PrefixIndex, token_bytes
from runtime.scheduling.sequence import Sequence, SequenceStatus, Swapped
from runtime.scheduling.swap import SwapArea
from runtime.scheduling.waiting import WaitingLine


class SequenceTooLongError(Exception):
    """The sequence could not run even with the whole cache to itself."""


class Scheduler:
    """Continuous batching over paged blocks with a shared prefix cache.

    - Blocks for all of a sequence's present tokens are taken when it is admitted, and one more
      whenever it outgrows them. If none is left, the newest sequence is preempted: its blocks go
      (to the swap area, if there is room, and to the cache) and it is admitted again later. The
      oldest is never preempted and fits by itself, so every sequence ends.
    - Full blocks are shared and never written again; of the block in which a sequence parts from
      what is cached, the beginning is copied. So a sequence that is cached to its end computes
      exactly one token, to have something to sample from.
    - Of sequences that share a prefix which a running one is still computing, only that one
      computes it: the others follow it, and are admitted when the prefix is in the cache.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_batch_tokens: int,
        max_sequences: int,
        *,
        num_swap_blocks: int = 0,
        poisons_blocks: bool = False,
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
        self.pool = BlockPool(num_blocks, on_evict=self.index.forget, notes_vacated=poisons_blocks)
        self.swap_area = SwapArea(num_swap_blocks)
        self._line = WaitingLine()
        self._in_flight = InFlight(self.index)
        self._running: list[Sequence] = []  # oldest admission first
        self._num_waiting = 0
        self._swapped: dict[int, Swapped] = {}  # by sequence id
        # Of the plan being made or run: its moves, those whose blocks are filled only by them,
        # and the sources of its copies, which stay as they are until it has run.
        self._moves = BlockMoves()
        self._unfilled: set[int] = set()  # sequence ids
        self._pins: list[int] = []
        self._num_preemptions = 0
        self._num_swapped_blocks = 0

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

    def cache_stats(self) -> CacheStats:
        return CacheStats(
            free_blocks=self.pool.num_free,
            cached_blocks=self.pool.num_cached,
            used_blocks=self.pool.num_used,
            preemptions=self._num_preemptions,
            swapped_blocks=self._num_swapped_blocks,
        )

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
        kept in the cache, nor what it was computed from."""
        if sequence.is_finished:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._stop_running(sequence, is_trusted=reason != "error")
        else:
            self._line.remove(sequence)
            self._num_waiting -= 1
            self._drop_swapped(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason

    def schedule(self) -> StepPlan | None:
        """Plan the next step. None when nothing is running or waiting."""
        assert not self._unfilled, "blocks were not filled: the last plan was not run"
        self._moves = BlockMoves()
        self._release_pins()
        self._make_room_for_decodes()
        items: list[ScheduledSequence] = []
        budget = self.max_batch_tokens
        # One token left to run means decoding; these go first, so that long prompts cannot stall
        # the streams of others.
        decoding = [each for each in self._running if each.num_uncomputed_tokens == 1]
        filling = [each for each in self._running if each.num_uncomputed_tokens > 1]
        for sequence in (*decoding, *filling):
            budget -= self._plan(items, sequence, budget)
        while budget > 0 and (sequence := self._admit_next()):
            budget -= self._plan(items, sequence, budget)
        assert items or not self.has_work
        if not items:
            return None
        self._moves.poisons.extend(self.pool.take_vacated())
        return StepPlan(items, self._moves)

    def commit(self, plan: StepPlan, sampled_token_ids: dict[int, int]) -> None:
        """Record that the plan was run. `sampled_token_ids` maps the sequence ids of its sampled
        items to their next tokens. Sequences that finished meanwhile are left alone."""
        self._unfilled.clear()
        self._release_pins()
        for item in plan.items:
            sequence = item.sequence
            if sequence.is_finished:
                continue
            self._advance(sequence, item.num_tokens)
            if item.is_sampled:
                reason = sequence.append(sampled_token_ids[sequence.sequence_id])
                self._line.charge_answer(sequence)
                if reason is not None:
                    self.finish(sequence, reason)

    def check_integrity(self) -> None:
        """Assert that no block is lost, none is held by a sequence that does not run, everything
        that can be found is there, and nobody waits for nothing."""
        held = Counter(block for sequence in self._running for block in sequence.block_table)
        held.update(self._pins)
        self.pool.check_integrity(dict(held), self.index)
        self.swap_area.check_integrity(list(self._swapped.values()))
        num_followers = self._in_flight.check_integrity()
        assert self._num_waiting == len(self._line) + num_followers, "one waits for nothing"
        for sequence in self._running:
            num_slots = len(sequence.block_table) * self.block_size
            assert sequence.num_computed_tokens < len(sequence.token_ids)
            assert sequence.num_computed_tokens <= num_slots

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
        self._num_preemptions += 1
        self._swap_out(sequence)
        self._stop_running(sequence)
        self.index.extend_keys(sequence)
        sequence.status = SequenceStatus.PREEMPTED
        sequence.num_computed_tokens = 0
        self._line.push(sequence)
        self._num_waiting += 1

    def _stop_running(self, sequence: Sequence, is_trusted: bool = True) -> None:
        self._running.remove(sequence)
        if sequence.sequence_id in self._unfilled:
            self._unfilled.remove(sequence.sequence_id)
        elif is_trusted:
            self._publish_tail(sequence)
        if not is_trusted:
            self._forget_blocks(sequence)
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.copied_from = None
        self._let_go(self._in_flight.leave(sequence))

    def _forget_blocks(self, sequence: Sequence) -> None:
        """With the block it was copied from: if that one is bad, everyone who copies it fails."""
        source = sequence.copied_from
        for block in [*sequence.block_table, *([] if source is None else [source])]:
            self.index.forget(block)
            self.pool.forget(block)

    def _advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens as computed and publish the blocks they filled, prompt's or answer's, and
        the last of the prompt's, which they may have filled in part."""
        sequence.num_computed_tokens += num_tokens
        self.index.extend_keys(sequence)
        num_full = sequence.num_computed_tokens // self.block_size
        for at in range(sequence.num_settled_blocks, num_full):
            block = sequence.block_table[at]
            self._publish(block, self.index.publish(sequence.block_keys[at], block))
        sequence.num_settled_blocks = num_full
        settled = self._in_flight.settle(sequence)
        if settled and settled[-1].digest is None:
            self._publish_tail(sequence)
        self._let_go(settled)

    def _publish_tail(self, sequence: Sequence) -> None:
        """Let others copy what is computed of the block that is not full."""
        at, num_tokens = divmod(sequence.num_computed_tokens, self.block_size)
        if num_tokens == 0:
            return
        start, block = at * self.block_size, sequence.block_table[at]
        tokens = token_bytes(sequence.token_ids[start : start + num_tokens])
        parent = self.index.parent(sequence, at)
        self._publish(block, self.index.publish_part(parent, tokens, block))

    def _publish(self, block: int, loser: int | None) -> None:
        """Follow the index, which took the block up, or another's place for it, or refused it."""
        if loser != block:
            self.pool.publish(block)
        if loser is not None:
            self.pool.forget(loser)

    def _let_go(self, blocks: list[PendingBlock]) -> None:
        """These are computed, or never will be: who followed waits in line again."""
        for pending in blocks:
            for follower in pending.followers:
                if not follower.is_finished:
                    self._line.push(follower)

    def _release_pins(self) -> None:
        self.pool.release(self._pins)
        self._pins = []

    # --- the waiting --------------------------------------------------------------------

    def _admit_next(self) -> Sequence | None:
        """Admit whoever is next in line and does not follow another. None when there is no one,
        or no room: then nobody overtakes, or a long prompt might never get in."""
        while len(self._running) < self.max_sequences and (sequence := self._line.peek()):
            match = self.index.match(sequence)
            if self._is_swap_better(sequence, match):
                match = Match(match.blocks)
            elif pending := self._in_flight.find(sequence, match):
                pending.followers.append(self._line.pop())
                continue
            if not self._has_room_for(sequence, match):
                match = Match(match.blocks)  # without a block to copy from, which takes room too
                if not self._has_room_for(sequence, match):
                    return None
            self._line.pop()
            self._admit(sequence, match)
            return sequence
        return None

    def _has_room_for(self, sequence: Sequence, match: Match) -> bool:
        kept = match.blocks if match.source is None else [*match.blocks, match.source]
        num_available = self.pool.num_available - sum(map(self.pool.is_cached, kept))
        num_new = self._num_blocks(sequence) - len(match.blocks)
        # A block in reserve for each running sequence: whoever is admitted into the very last
        # one is soon preempted again.
        return num_new + len(self._running) <= num_available

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-len(sequence.token_ids) // self.block_size)

    def _admit(self, sequence: Sequence, match: Match) -> None:
        for block in match.blocks:
            self.pool.acquire(block)
        if match.source is not None:  # before anything is allocated, which might evict it
            self.pool.acquire(match.source)
            self._pins.append(match.source)
        num_shared = len(match.blocks)
        num_new = self._num_blocks(sequence) - num_shared
        sequence.block_table = match.blocks + [self.pool.allocate() for _ in range(num_new)]
        sequence.num_settled_blocks = num_shared
        sequence.num_computed_tokens = num_shared * self.block_size + match.num_copied_tokens
        sequence.copied_from = match.source
        if match.source is not None:
            self._moves.copies.append((match.source, sequence.block_table[num_shared]))
            self._unfilled.add(sequence.sequence_id)
        if sequence.status is SequenceStatus.WAITING:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        elif self._is_swap_better(sequence, match):
            self._swap_in(sequence)
        self._drop_swapped(sequence)
        self._line.charge_prompt(sequence)
        self._in_flight.lead(sequence)
        sequence.status = SequenceStatus.RUNNING
        self._running.append(sequence)
        self._num_waiting -= 1

    # --- the swapped --------------------------------------------------------------------

    def _swap_out(self, sequence: Sequence) -> None:
        """Move what a preempted sequence has computed to host memory, if that has room.

        Not what others that run share with it: it will be found again. And not less than a
        block's worth of tokens: to run those again, beside others, costs next to nothing.
        """
        if sequence.sequence_id in self._unfilled:
            return
        first, num_tokens = 0, sequence.num_computed_tokens
        num_computed_blocks = -(-num_tokens // self.block_size)
        while first < num_computed_blocks and self.pool.is_shared(sequence.block_table[first]):
            first += 1
        if num_tokens - first * self.block_size < self.block_size:
            return
        blocks = sequence.block_table[first:num_computed_blocks]
        host_blocks = self.swap_area.take(len(blocks))
        if host_blocks is None:
            return
        self._moves.swap_outs.extend(zip(blocks, host_blocks, strict=True))
        sequence.swapped = Swapped(first, host_blocks, num_tokens)
        self._swapped[sequence.sequence_id] = sequence.swapped
        self._num_swapped_blocks += len(blocks)

    def _is_swap_better(self, sequence: Sequence, match: Match) -> bool:
        """Whether the swap area holds more of the sequence than the cache does, and the cache
        all that comes before it."""
        swapped = sequence.swapped
        if swapped is None or len(match.blocks) < swapped.first_block:
            return False
        num_found = len(match.blocks) * self.block_size + match.num_copied_tokens
        return num_found < swapped.num_tokens

    def _swap_in(self, sequence: Sequence) -> None:
        """Fill the sequence's own blocks from the swap area."""
        assert sequence.swapped is not None
        swapped, num_shared = sequence.swapped, sequence.num_settled_blocks
        host_blocks = swapped.host_blocks[num_shared - swapped.first_block :]
        blocks = sequence.block_table[num_shared : num_shared + len(host_blocks)]
        self._moves.swap_ins.extend(zip(host_blocks, blocks, strict=True))
        self._unfilled.add(sequence.sequence_id)
        sequence.num_computed_tokens = swapped.num_tokens

    def _drop_swapped(self, sequence: Sequence) -> None:
        """The swap area need not hold it any longer. Its blocks may be written again from the
        next plan on, when those of this plan have been read."""
        if sequence.swapped is not None:
            self.swap_area.give(sequence.swapped.host_blocks)
            del self._swapped[sequence.sequence_id]
            sequence.swapped = None
