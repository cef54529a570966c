"""Builders and a tiny model of the cache, shared by the scheduler's tests."""

from collections.abc import Callable
from itertools import count

import pytest

from runtime.protocol import SamplingParams, ServiceClass
from runtime.scheduling.plan import BlockMoves, StepPlan
from runtime.scheduling.scheduler import Scheduler
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

    `run` plays a step the way a runner does (moves, then all writes, then all reads), fails when
    a sequence would attend to anything but its own prefix, and counts what was computed.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.checks_integrity = True
        self.num_computed_tokens = 0
        self.num_copied_blocks = 0
        self.num_swapped_in_blocks = 0
        self._blocks: dict[int, dict[int, int]] = {}  # block -> offset -> content
        self._host: dict[int, dict[int, int]] = {}
        self._contents: dict[int, list[int]] = {}  # sequence id -> content at each position

    def contents(self, sequence: Sequence) -> list[int]:
        """What belongs into the slot of each of its tokens: a number for salt and prefix."""
        known = self._contents.setdefault(sequence.sequence_id, [hash(sequence.cache_salt)])
        for token in sequence.token_ids[len(known) - 1 :]:
            known.append(hash((known[-1], token)))
        return known[1:]

    def move(self, moves: BlockMoves) -> None:
        for block, host in moves.swap_outs:
            self._host[host] = dict(self._blocks.get(block, {}))
        for block in moves.poisons:
            self._blocks[block] = {}
        for host, block in moves.swap_ins:
            self._blocks[block] = dict(self._host[host])
        sources = {source for source, _ in moves.copies}
        written = [block for _, block in (*moves.swap_ins, *moves.copies)]
        assert len(set(written)) == len(written), "a block is written twice"
        assert not sources & {*written, *moves.poisons}, "a block is written before it is copied"
        for source, block in moves.copies:
            self._blocks[block] = dict(self._blocks[source])
        self.num_copied_blocks += len(moves.copies)
        self.num_swapped_in_blocks += len(moves.swap_ins)

    def run(self, plan: StepPlan) -> None:
        self.move(plan.moves)
        size = self.scheduler.block_size
        written: dict[tuple[int, int], int] = {}
        for item in plan.items:
            sequence, start = item.sequence, item.sequence.num_computed_tokens
            contents = self.contents(sequence)
            for position in range(start, start + item.num_tokens):
                block, offset = sequence.block_table[position // size], position % size
                assert (block, offset) not in written, "two sequences write one slot"
                written[block, offset] = contents[position]
                self._blocks.setdefault(block, {})[offset] = contents[position]
            self.num_computed_tokens += item.num_tokens
        for item in plan.items:
            sequence = item.sequence
            contents = self.contents(sequence)
            for position in range(sequence.num_computed_tokens + item.num_tokens):
                block = self._blocks[sequence.block_table[position // size]]
                assert block.get(position % size) == contents[position], "read what is not its own"

    def step(
        self, next_token: Callable[[Sequence], int], fails: int | None = None
    ) -> StepPlan | None:
        """Schedule, run and commit one step, checking every invariant on the way. With `fails`,
        the step fails as a whole: its sequences run again one by one, and that one fails again."""
        plan = self.scheduler.schedule()
        if plan is not None:
            assert 0 < plan.num_tokens <= self.scheduler.max_batch_tokens
            assert len(plan.items) <= self.scheduler.max_sequences
            assert len({id(item.sequence) for item in plan.items}) == len(plan.items)
            self.run(plan)
            if fails is not None:
                self._run_alone(plan, fails)
            self.scheduler.commit(
                plan,
                {
                    item.sequence.sequence_id: next_token(item.sequence)
                    for item in plan.items
                    if item.is_sampled
                },
            )
        if self.checks_integrity:
            self.scheduler.check_integrity()
        return plan

    def _run_alone(self, plan: StepPlan, fails: int) -> None:
        for at, item in enumerate(plan.items):
            if at == fails % len(plan.items):
                self.scheduler.finish(item.sequence, "error")
            else:
                self.run(StepPlan([item]))

    def finish_all(self, next_token: Callable[[Sequence], int] = lambda _: 1) -> int:
        """Step until no work is left; returns the number of steps."""
        steps = 0
        while self.step(next_token) is not None:
            steps += 1
            assert steps < 100_000
        return steps
