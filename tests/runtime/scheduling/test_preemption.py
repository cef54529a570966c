"""When blocks run out: who goes, what is swapped, and what is poisoned."""

import pytest

from runtime.protocol import FinishReason
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.sequence import Sequence, SequenceStatus

from .conftest import CacheModel, MakeSequence


def test_the_newest_is_preempted_and_finishes_later_with_the_same_tokens(
    make_sequence: MakeSequence,
) -> None:
    scheduler = Scheduler(num_blocks=8, block_size=2, max_batch_tokens=16, max_sequences=4)
    cache = CacheModel(scheduler)
    old, new = make_sequence([1, 2, 3], max_tokens=10), make_sequence([4, 5, 6], max_tokens=10)
    scheduler.add(old)
    scheduler.add(new)
    seen: set[SequenceStatus] = set()
    while cache.step(lambda sequence: len(sequence.token_ids)) is not None:
        assert old.status is not SequenceStatus.PREEMPTED
        seen.add(new.status)
    assert SequenceStatus.PREEMPTED in seen
    assert old.token_ids == [1, 2, 3, *range(3, 13)]
    assert new.token_ids == [4, 5, 6, *range(3, 13)]
    assert new.num_cached_tokens == 0, "what it finds again after preemption is not the caller's"


def make_crowded(
    make_sequence: MakeSequence, num_swap_blocks: int, poisons_blocks: bool = False
) -> tuple[Scheduler, CacheModel, list[Sequence]]:
    """Two sequences that do not fit together to their ends; the second is preempted."""
    scheduler = Scheduler(
        num_blocks=12,
        block_size=2,
        max_batch_tokens=16,
        max_sequences=4,
        num_swap_blocks=num_swap_blocks,
        poisons_blocks=poisons_blocks,
    )
    sequences = [make_sequence([n, 5, 6, 7, 8], max_tokens=12) for n in (1, 2)]
    for sequence in sequences:
        scheduler.add(sequence)
    return scheduler, CacheModel(scheduler), sequences


@pytest.mark.parametrize("num_swap_blocks", [0, 2, 20])
@pytest.mark.parametrize("poisons_blocks", [False, True])
def test_a_preempted_sequence_is_swapped_if_there_is_room_and_ends_the_same(
    make_sequence: MakeSequence, num_swap_blocks: int, poisons_blocks: bool
) -> None:
    scheduler, cache, (old, new) = make_crowded(make_sequence, num_swap_blocks, poisons_blocks)
    cache.finish_all(lambda sequence: len(sequence.token_ids))
    assert old.token_ids == [1, 5, 6, 7, 8, *range(5, 17)]
    assert new.token_ids == [2, 5, 6, 7, 8, *range(5, 17)]
    stats = scheduler.cache_stats()
    assert stats.preemptions == 1
    is_swapped = num_swap_blocks == 20
    assert (stats.swapped_blocks > 0) == is_swapped
    num_needed = 2 * (5 + 11)
    if is_swapped:
        assert cache.num_computed_tokens == num_needed, "nothing is computed twice"
        assert cache.num_swapped_in_blocks > 0
    else:
        assert cache.num_computed_tokens > num_needed
    assert scheduler.swap_area.num_free == num_swap_blocks


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_swapped_sequence_that_ends_frees_its_area(
    make_sequence: MakeSequence, reason: FinishReason
) -> None:
    scheduler, cache, (_, new) = make_crowded(make_sequence, num_swap_blocks=20)
    while new.status is not SequenceStatus.PREEMPTED:
        cache.step(lambda sequence: len(sequence.token_ids))
    assert new.swapped is not None
    assert scheduler.swap_area.num_free < 20
    scheduler.finish(new, reason)
    scheduler.check_integrity()
    assert scheduler.swap_area.num_free == 20
    cache.finish_all()


def test_what_others_share_is_not_swapped(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(16, 2, 32, 4, num_swap_blocks=20)
    cache = CacheModel(scheduler)
    shared = list(range(100, 110))
    old, new = (make_sequence([*shared, n, 5, 6], max_tokens=14) for n in (1, 2))
    scheduler.add(old)
    scheduler.add(new)
    while new.status is not SequenceStatus.PREEMPTED:
        cache.step(lambda sequence: len(sequence.token_ids))
    assert new.swapped is not None
    assert new.swapped.first_block == len(shared) // 2
    cache.finish_all(lambda sequence: len(sequence.token_ids))


def test_a_block_is_poisoned_when_it_is_given_up_and_before_it_is_written(
    make_sequence: MakeSequence,
) -> None:
    scheduler = Scheduler(4, 2, 16, 2, poisons_blocks=True)
    cache = CacheModel(scheduler)
    failed = make_sequence([1, 2, 3], max_tokens=5)
    scheduler.add(failed)
    cache.step(lambda _: 4)
    given_up = list(failed.block_table)
    scheduler.finish(failed, "error")
    scheduler.add(make_sequence([7], max_tokens=1))
    plan = scheduler.schedule()
    assert plan is not None
    assert set(plan.moves.poisons) == set(given_up)
    cache.run(plan)
    scheduler.commit(plan, {plan.items[0].sequence.sequence_id: 1})
    # What the cache keeps is not poisoned before it is evicted.
    cached = make_sequence([1, 2, 3, 4, 5, 6], max_tokens=1)
    scheduler.add(cached)
    plan = cache.step(lambda _: 1)
    assert plan is not None
    assert not plan.moves.poisons
    scheduler.add(make_sequence([9] * 7, max_tokens=1))
    plan = cache.step(lambda _: 1)
    assert plan is not None
    assert len(plan.moves.poisons) >= 3


def test_nothing_is_poisoned_unless_asked_for(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(4, 2, 16, 2)
    cache = CacheModel(scheduler)
    for number in range(4):
        scheduler.add(make_sequence([number] * 5, max_tokens=1))
        plan = cache.step(lambda _: 1)
        assert plan is not None
        assert not plan.moves
