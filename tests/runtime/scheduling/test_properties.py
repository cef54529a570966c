"""Random lives of a scheduler, checked step by step against a model of the cache; and faults,
planted to see that the model would notice."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.scheduling.plan import BlockMoves
from runtime.scheduling.prefix import Match
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.sequence import Sequence

from .schedules import PREFIXES, Add, Finish, Limits, Operation, Play, Step, play_random

additions = st.builds(
    Add,
    tail=st.lists(st.integers(0, 1), min_size=1, max_size=6),
    prefix=st.integers(0, len(PREFIXES) - 1),
    num_prefix=st.integers(0, 20),
    max_tokens=st.integers(1, 12),
    salt=st.sampled_from([b"", b"salt"]),
    flow=st.sampled_from(["a", "b"]),
    num_choices=st.sampled_from([1, 1, 3]),
    turn=st.one_of(st.none(), st.integers(0, 40)),
)
operations = st.lists(
    st.one_of(
        additions,
        st.builds(Step),
        st.builds(Step, st.one_of(st.none(), st.integers(0, 5))),
        st.builds(Finish, st.integers(0, 40), st.sampled_from(["abort", "error"])),
    ),
    max_size=50,
)
limits = st.builds(
    Limits,
    num_blocks=st.integers(3, 24),
    block_size=st.integers(1, 5),
    max_sequences=st.integers(1, 6),
    spare_tokens=st.integers(0, 12),
    num_swap_blocks=st.sampled_from([0, 3, 30]),
    poisons_blocks=st.booleans(),
)


@settings(max_examples=1000, deadline=None)
@given(operations=operations, limits=limits)
def test_any_schedule_attends_only_to_its_own_prefix_and_ends(
    operations: list[Operation], limits: Limits
) -> None:
    Play(limits.make_scheduler()).run(operations)


@pytest.mark.parametrize("first_seed", range(0, 2000, 500))
def test_thousands_of_schedules(first_seed: int) -> None:
    """As above, without the means to shrink a failure, but many; the seed names the one."""
    num_copied = num_swapped = num_preemptions = 0
    for seed in range(first_seed, first_seed + 500):
        try:
            play = play_random(seed)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        num_copied += play.cache.num_copied_blocks
        num_swapped += play.cache.num_swapped_in_blocks
        num_preemptions += play.scheduler.cache_stats().preemptions
    assert min(num_copied, num_swapped, num_preemptions) > 100, "nothing was exercised"


# --- planted faults ---------------------------------------------------------------------


def copy_one_too_many(scheduler: Scheduler) -> None:
    """The copied beginning of a block is taken for a token longer than it is."""
    match = scheduler.index.match

    def wrong(sequence: Sequence) -> Match:
        found = match(sequence)
        num_known = len(found.blocks) * scheduler.block_size + found.num_copied_tokens + 1
        if found.source is None or num_known >= len(sequence.token_ids):
            return found
        return found._replace(num_copied_tokens=found.num_copied_tokens + 1)

    scheduler.index.match = wrong


def copy_nothing(scheduler: Scheduler) -> None:
    """The plan's copies are lost on the way."""
    schedule = scheduler.schedule

    def wrong() -> object:
        plan = schedule()
        if plan is not None:
            plan.moves.copies.clear()
        return plan

    scheduler.schedule = wrong  # type: ignore[method-assign]


def forget_to_forget(scheduler: Scheduler) -> None:
    """An evicted block can still be found."""
    scheduler.pool._on_evict = lambda block: None
    acquire = scheduler.pool.acquire

    def unchecked(block: int) -> None:
        scheduler.pool._is_findable[block] = True
        acquire(block)

    scheduler.pool.acquire = unchecked


def keep_what_failed(scheduler: Scheduler) -> None:
    """A block given back blank can still be found, and nobody has written to it since."""
    release = scheduler.pool.release

    def wrong(blocks: list[int]) -> None:
        release(blocks)
        for block in blocks:
            if scheduler.pool.is_cached(block):
                scheduler.pool.forget(block)  # without the index

    scheduler.pool.release = wrong
    acquire = scheduler.pool.acquire

    def unchecked(block: int) -> None:
        scheduler.pool._is_findable[block] = True
        acquire(block)

    scheduler.pool.acquire = unchecked


def mix_salts(scheduler: Scheduler) -> None:
    """Prefixes are shared whatever their salt."""
    match, extend_keys = scheduler.index.match, scheduler.index.extend_keys

    def without_salt(call: Callable[[Sequence], object]) -> Callable[[Sequence], object]:
        def called(sequence: Sequence) -> object:
            salt, sequence.cache_salt = sequence.cache_salt, b""
            try:
                return call(sequence)
            finally:
                sequence.cache_salt = salt

        return called

    scheduler.index.match = without_salt(match)  # type: ignore[assignment]
    scheduler.index.extend_keys = without_salt(extend_keys)  # type: ignore[assignment]


def swap_in_shifted(scheduler: Scheduler) -> None:
    """Blocks come back from the swap area in each other's place."""
    swap_in = scheduler._swap_in

    def wrong(sequence: Sequence) -> None:
        swap_in(sequence)
        moves: BlockMoves = scheduler._moves
        hosts = [host for host, _ in moves.swap_ins]
        blocks = [block for _, block in moves.swap_ins]
        moves.swap_ins[:] = zip(hosts, blocks[1:] + blocks[:1], strict=True)

    scheduler._swap_in = wrong


@pytest.mark.parametrize(
    "plant",
    [
        copy_one_too_many,
        copy_nothing,
        forget_to_forget,
        keep_what_failed,
        mix_salts,
        swap_in_shifted,
    ],
)
def test_a_planted_fault_shows_as_a_wrong_read(plant: Callable[[Scheduler], None]) -> None:
    """Without the integrity checks, which would find some of them first."""
    caught: list[str] = []

    def plant_unchecked(scheduler: Scheduler) -> None:
        plant(scheduler)
        scheduler.check_integrity = lambda: None

    for seed in range(400):
        try:
            play_random(seed, plant_unchecked)
        except (AssertionError, KeyError) as error:
            caught.append(str(error))
            if caught[-1].startswith("read what is not its own"):
                return
    pytest.fail(f"no wrong read among {caught}")
