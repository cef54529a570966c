"""Builders and a tiny model of the cache, shared by the scheduler's tests."""

from collections.abc import Callable
from itertools import count

import pytest

from runtime.protocol import SamplingParams, ServiceClass
from runtime.scheduling.scheduler import Scheduler, StepPlan
from runtime.scheduling.sequence import Sequence

MakeSequence = Callable[..., Sequence]


@pytest.fixture
def make_sequence() -> MakeSequence:
    ids = count()

    def make(
        prompt: list[int],
        max_tokens: int = 4,
        salt: bytes = b"",
        flow: str = "",
        service_class: ServiceClass = "standard",
    ) -> Sequence:
        sequence_id = next(ids)
        return Sequence(
            sequence_id=sequence_id,
            request_id=f"request-{sequence_id}",
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            sampling=SamplingParams(),
            cache_salt=salt,
            fairness_key=flow,
            service_class=service_class,
        )

    return make


class CacheModel:
    """What a device would hold: each slot remembers the salt and all tokens up to its own.

    `run` plays a step the way a runner does (all writes, then all reads), fails when a sequence
    would attend to anything but its own prefix, and counts what was computed.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.num_computed_tokens = 0
        self._slots: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    def _slot(self, sequence: Sequence, position: int) -> int:
        size = self.scheduler.block_size
        return sequence.block_table[position // size] * size + position % size

    def run(self, plan: StepPlan) -> None:
        written: set[int] = set()
        for item in plan.items:
            sequence, start = item.sequence, item.sequence.num_computed_tokens
            for position in range(start, start + item.num_tokens):
                slot = self._slot(sequence, position)
                content = (sequence.cache_salt, tuple(sequence.token_ids[: position + 1]))
                # Two sequences may only write one slot in a step if both write the same.
                assert slot not in written or self._slots[slot] == content
                written.add(slot)
                self._slots[slot] = content
            self.num_computed_tokens += item.num_tokens
        for item in plan.items:
            sequence = item.sequence
            for position in range(sequence.num_computed_tokens + item.num_tokens):
                expected = (sequence.cache_salt, tuple(sequence.token_ids[: position + 1]))
                assert self._slots[self._slot(sequence, position)] == expected

    def step(self, next_token: Callable[[Sequence], int]) -> StepPlan | None:
        """Schedule, run and commit one step, checking every invariant on the way."""
        plan = self.scheduler.schedule()
        if plan is not None:
            assert 0 < plan.num_tokens <= self.scheduler.max_batch_tokens
            assert len(plan.items) <= self.scheduler.max_sequences
            assert len({id(item.sequence) for item in plan.items}) == len(plan.items)
            self.run(plan)
            self.scheduler.commit(
                plan,
                {
                    item.sequence.sequence_id: next_token(item.sequence)
                    for item in plan.items
                    if item.is_sampled
                },
            )
        self.scheduler.check_integrity()
        return plan

    def finish_all(self, next_token: Callable[[Sequence], int] = lambda _: 1) -> int:
        """Step until no work is left; returns the number of steps."""
        steps = 0
        while self.step(next_token) is not None:
            steps += 1
            assert steps < 100_000
        return steps
