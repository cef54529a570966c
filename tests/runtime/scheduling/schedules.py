"""Random lives of a scheduler: what is asked of it, and the play of it against the cache model."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from random import Random

from runtime.protocol import FinishReason, SamplingParams
from runtime.scheduling.scheduler import Scheduler, SequenceTooLongError
from runtime.scheduling.sequence import Sequence

from .conftest import CacheModel

# Few different tokens and few prefixes, so that prompts overlap often and blocks repeat.
PREFIXES = [[0] * 20, [1] * 20, [0, 1] * 10, [0] * 7 + [1] * 13]


@dataclass(frozen=True)
class Add:
    """`num_choices` sequences with one prompt. A `turn` goes on from an earlier sequence's end."""

    tail: list[int]
    prefix: int = 0
    num_prefix: int = 0
    max_tokens: int = 4
    salt: bytes = b""
    flow: str = ""
    num_choices: int = 1
    turn: int | None = None


@dataclass(frozen=True)
class Step:
    """`fails` makes the model raise, so that each sequence runs alone, and one ends by it."""

    fails: int | None = None


@dataclass(frozen=True)
class Finish:
    at: int
    reason: FinishReason


Operation = Add | Step | Finish


@dataclass(frozen=True)
class Limits:
    num_blocks: int
    block_size: int
    max_sequences: int
    spare_tokens: int
    num_swap_blocks: int = 0
    poisons_blocks: bool = True

    def make_scheduler(self) -> Scheduler:
        return Scheduler(
            self.num_blocks,
            self.block_size,
            self.max_sequences + self.spare_tokens,
            self.max_sequences,
            num_swap_blocks=self.num_swap_blocks,
            poisons_blocks=self.poisons_blocks,
        )


def random_operations(random: Random, num_operations: int) -> list[Operation]:
    operations: list[Operation] = []
    for _ in range(num_operations):
        kind = random.random()
        if kind < 0.4:
            operations.append(
                Add(
                    tail=[random.randint(0, 1) for _ in range(random.randint(1, 6))],
                    prefix=random.randrange(len(PREFIXES)),
                    num_prefix=random.randint(0, 20),
                    max_tokens=random.randint(1, 12),
                    salt=random.choice([b"", b"", b"salt"]),
                    flow=random.choice("ab"),
                    num_choices=random.choice([1, 1, 1, 2, 4]),
                    turn=random.choice([None, None, random.randrange(40)]),
                )
            )
        elif kind < 0.9:
            operations.append(Step(random.randrange(8) if random.random() < 0.05 else None))
        else:
            operations.append(Finish(random.randrange(40), random.choice(["abort", "error"])))
    return operations


def random_limits(random: Random) -> Limits:
    return Limits(
        num_blocks=random.randint(3, 24),
        block_size=random.randint(1, 5),
        max_sequences=random.randint(1, 6),
        spare_tokens=random.randint(0, 12),
        num_swap_blocks=random.choice([0, 3, 30]),
        poisons_blocks=random.random() < 0.7,
    )


def next_token(sequence: Sequence) -> int:
    """What the pretended model says: it depends on every token before."""
    return sum(sequence.token_ids) % 2


class Play:
    """One scheduler, its sequences, and what of them must come out."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.cache = CacheModel(scheduler)
        self.sequences: list[Sequence] = []
        self._ids = count()

    def run(self, operations: list[Operation]) -> None:
        """All operations, then steps until no work is left; then nothing may be missing."""
        for operation in operations:
            match operation:
                case Add():
                    self._add(operation)
                case Step():
                    self.cache.step(next_token, operation.fails)
                case Finish():
                    self._finish(operation)
        self.cache.finish_all(next_token)
        self._check_end()

    def _add(self, add: Add) -> None:
        prompt, salt = PREFIXES[add.prefix][: add.num_prefix] + add.tail, add.salt
        if add.turn is not None and self.sequences:
            before = self.sequences[add.turn % len(self.sequences)]
            prompt, salt = before.token_ids[:40] + add.tail, before.cache_salt
        fits = len(prompt) + add.max_tokens <= self.scheduler.max_sequence_tokens
        first: Sequence | None = None
        for choice in range(add.num_choices):
            sequence = Sequence(
                sequence_id=next(self._ids),
                request_id="request",
                token_ids=list(prompt),
                num_prompt_tokens=len(prompt),
                max_tokens=add.max_tokens,
                sampling=SamplingParams(),
                cache_salt=salt,
                choice=choice,
                fairness_key=add.flow,
            )
            if first is not None:
                sequence.block_keys = list(first.block_keys)
            try:
                self.scheduler.add(sequence)
            except SequenceTooLongError:
                assert not fits
                return
            assert fits
            first = first or sequence
            self.sequences.append(sequence)

    def _finish(self, finish: Finish) -> None:
        if self.sequences:
            self.scheduler.finish(self.sequences[finish.at % len(self.sequences)], finish.reason)
            self.scheduler.check_integrity()

    def _check_end(self) -> None:
        scheduler = self.scheduler
        assert not scheduler.has_work
        assert scheduler.num_waiting == scheduler.num_running == scheduler.pool.num_used == 0
        assert len(scheduler.index) == scheduler.pool.num_cached
        assert scheduler.swap_area.num_free == scheduler.swap_area.num_blocks
        for sequence in self.sequences:
            assert sequence.is_finished
            assert 0 <= sequence.num_cached_tokens < sequence.num_prompt_tokens
            if sequence.finish_reason == "length":
                assert sequence.num_generated_tokens == sequence.max_tokens
                assert sequence.token_ids == expected(sequence)


def expected(sequence: Sequence) -> list[int]:
    """What the sequence would be had it run alone."""
    token_ids = sequence.token_ids[: sequence.num_prompt_tokens]
    total = sum(token_ids)
    while len(token_ids) < len(sequence.token_ids):
        token_ids.append(total % 2)
        total += token_ids[-1]
    return token_ids


def play_random(seed: int, prepare: Callable[[Scheduler], None] | None = None) -> Play:
    """One random schedule, the same for a seed. `prepare` may plant a fault."""
    random = Random(seed)  # noqa: S311 - not a secret
    play = Play(random_limits(random).make_scheduler())
    if prepare is not None:
        prepare(play.scheduler)
    play.run(random_operations(random, 60))
    return play
