"""Decides which sequences run in a step when nothing can be kept between steps.

Owns admission and turns for models without a cache. `scheduler.py` is for all others.
"""

from collections import deque

from runtime.protocol import FinishReason
from runtime.scheduling.plan import CacheStats, ScheduledSequence, StepPlan
from runtime.scheduling.sequence import Sequence, SequenceStatus
from runtime.scheduling.waiting import WaitingLine


class WholeScheduler:
    """Runs sequences from their first token to their last in every step, as many as the budget
    of tokens holds.

    The running take turns: one that has run goes behind those that have not, and one that is
    longer than the budget runs alone. So every sequence gets its next token within a bounded
    number of steps. Waiting sequences are admitted, fairly, into what the running leave of the
    budget. To look at the interface, see `Scheduler`: here, no sequence has blocks or cached
    tokens, and what a token costs is all that runs for it.
    """

    block_size = 0  # there are no blocks

    def __init__(
        self, max_batch_tokens: int, max_sequences: int, *, max_sequence_tokens: int
    ) -> None:
        assert max_batch_tokens > 0
        assert max_sequences > 0
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_sequence_tokens = max_sequence_tokens
        self._line = WaitingLine()
        self._running: deque[Sequence] = deque()  # whose turn is first

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @property
    def has_work(self) -> bool:
        return bool(self._running) or len(self._line) > 0

    def cache_stats(self) -> CacheStats:
        return CacheStats()

    def add(self, sequence: Sequence) -> None:
        """Let the sequence wait for admission."""
        assert sequence.num_prompt_tokens == len(sequence.token_ids) > 0
        assert sequence.max_tokens > 0
        assert sequence.num_prompt_tokens + sequence.max_tokens <= self.max_sequence_tokens
        self._line.push(sequence)

    def abort(self, sequence: Sequence) -> None:
        self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End the sequence now, wherever it stands; idempotent."""
        if sequence.is_finished:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        else:
            self._line.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason

    def schedule(self) -> StepPlan | None:
        """Plan the next step. None when nothing is running or waiting."""
        planned: list[Sequence] = []
        budget = self.max_batch_tokens
        while self._running and (not planned or len(self._running[0].token_ids) <= budget):
            sequence = self._running.popleft()
            planned.append(sequence)
            budget -= len(sequence.token_ids)
        for sequence in planned:
            self._line.charge(sequence, len(sequence.token_ids))
        if not self._running:  # or the waiting would take the turns of the running
            self._admit(planned, budget)
        self._running.extend(planned)
        items = [ScheduledSequence(each, len(each.token_ids), True) for each in planned]
        return StepPlan(items) if items else None

    def _admit(self, planned: list[Sequence], budget: int) -> None:
        while len(planned) < self.max_sequences and (sequence := self._line.peek()):
            if planned and len(sequence.token_ids) > budget:
                return
            self._line.pop()
            self._line.charge(sequence, len(sequence.token_ids))
            sequence.status = SequenceStatus.RUNNING
            planned.append(sequence)
            budget -= len(sequence.token_ids)

    def commit(self, plan: StepPlan, sampled_token_ids: dict[int, int]) -> None:
        """Record that the plan was run; see `Scheduler.commit`."""
        for item in plan.items:
            sequence = item.sequence
            if sequence.is_finished:
                continue
            reason = sequence.append(sampled_token_ids[sequence.sequence_id])
            if reason is not None:
                self.finish(sequence, reason)

    def check_integrity(self) -> None:
        """Assert that everyone who runs is running, and within the limits."""
        assert len(self._running) <= self.max_sequences
        assert all(each.status is SequenceStatus.RUNNING for each in self._running)
        assert all(each.num_computed_tokens == 0 for each in self._running)
