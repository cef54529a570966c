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
    longer than the budget runs alone. The waiting are admitted, in the order of their line, into
    what the running leave of the budget; while they leave too little, every other step begins
    with a newcomer. So a running sequence gets its next token within `2 * max_sequences` steps,
    and while there is a place, one waiting is admitted in every other step at least. To look at
    the interface, see `Scheduler`: here, no sequence has blocks or cached tokens, and what a
    token costs is all that runs for it.
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
        self._is_newcomers_turn = False

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
        if self._is_newcomers_turn:
            budget = self._admit(planned, budget, most=1)
        is_begun_by_newcomer = bool(planned)
        while self._running and (not planned or len(self._running[0].token_ids) <= budget):
            sequence = self._running.popleft()
            self._line.charge(sequence, len(sequence.token_ids))
            planned.append(sequence)
            budget -= len(sequence.token_ids)
        num_before = len(planned)
        self._admit(planned, budget, most=self.max_sequences)
        is_anyone_new = is_begun_by_newcomer or len(planned) > num_before
        self._is_newcomers_turn = not is_anyone_new
        self._running.extend(planned)
        items = [ScheduledSequence(each, len(each.token_ids), True) for each in planned]
        return StepPlan(items) if items else None

    def _admit(self, planned: list[Sequence], budget: int, most: int) -> int:
        """Plan those who are first in line, as far as there are places and they fit the budget;
        alone, anyone does. Returns what is left of it."""
        num_places = min(most, self.max_sequences - len(self._running) - len(planned))
        while num_places > 0 and (sequence := self._line.peek()):
            if planned and len(sequence.token_ids) > budget:
                break
            self._line.pop()
            self._line.charge(sequence, len(sequence.token_ids))
            sequence.status = SequenceStatus.RUNNING
            planned.append(sequence)
            budget -= len(sequence.token_ids)
            num_places -= 1
        return budget

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
