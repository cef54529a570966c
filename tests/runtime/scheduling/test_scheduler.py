"""Admission, chunking, preemption, prefix reuse and coalescing, one behaviour at a time."""

import pytest

from runtime.scheduling.scheduler import Scheduler, SequenceTooLongError
from runtime.scheduling.sequence import SequenceStatus

from .conftest import CacheModel, MakeSequence


def test_decodes_go_first_and_prompts_are_chunked_into_what_is_left(
    make_sequence: MakeSequence,
) -> None:
    scheduler = Scheduler(num_blocks=32, block_size=4, max_batch_tokens=8, max_sequences=4)
    cache = CacheModel(scheduler)
    short = make_sequence([1, 2, 3])
    scheduler.add(short)
    cache.step(lambda _: 9)
    long = make_sequence(list(range(20)))
    scheduler.add(long)

    shapes = []
    while not long.num_generated_tokens:
        plan = cache.step(lambda _: 9)
        assert plan is not None
        shapes.append([(i.sequence.sequence_id, i.num_tokens, i.is_sampled) for i in plan.items])

    assert shapes == [
        [(0, 1, True), (1, 7, False)],
        [(0, 1, True), (1, 7, False)],
        [(0, 1, True), (1, 6, True)],
    ]
    assert short.finish_reason == "length"
    assert short.token_ids == [1, 2, 3, 9, 9, 9, 9]


def test_stop_token_ends_the_sequence_and_is_kept(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(8, 4, 8, 4)
    sequence = make_sequence([1, 2], max_tokens=10)
    sequence.stop_token_ids = frozenset({7})
    scheduler.add(sequence)
    answers = iter([5, 6, 7, 8])
    CacheModel(scheduler).finish_all(lambda _: next(answers))
    assert sequence.token_ids == [1, 2, 5, 6, 7]
    assert sequence.finish_reason == "stop"
    assert not scheduler.has_work


def test_a_repeated_prompt_is_served_from_the_cache(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(32, 4, 64, 4)
    cache = CacheModel(scheduler)
    prompt = list(range(10))
    scheduler.add(make_sequence(prompt, max_tokens=1))
    cache.finish_all()
    assert cache.num_computed_tokens == 10

    again = make_sequence(prompt, max_tokens=1)
    scheduler.add(again)
    cache.finish_all()
    assert again.num_cached_tokens == 9, "all but its last, of which it is sampled"
    assert cache.num_computed_tokens == 10 + 1


def test_a_full_hit_computes_one_token(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(32, 4, 64, 4)
    cache = CacheModel(scheduler)
    scheduler.add(make_sequence(list(range(8)), max_tokens=1))
    cache.finish_all()
    again = make_sequence(list(range(8)), max_tokens=1)
    scheduler.add(again)
    cache.finish_all()
    assert again.num_cached_tokens == 7
    assert cache.num_computed_tokens == 8 + 1


def test_answers_are_cached_too(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(32, 4, 64, 4)
    cache = CacheModel(scheduler)
    first = make_sequence([1, 2, 3], max_tokens=10)
    scheduler.add(first)
    cache.finish_all(lambda sequence: 100 + len(sequence.token_ids))
    # The token sampled last was never run, so 12 of 13 tokens are in the cache: three blocks.
    turn = make_sequence([*first.token_ids, 50, 51], max_tokens=1)
    scheduler.add(turn)
    cache.finish_all()
    assert turn.num_cached_tokens == 12


def test_salts_never_share(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(32, 4, 64, 4)
    cache = CacheModel(scheduler)
    for salt in (b"one", b"two"):
        sequence = make_sequence(list(range(8)), max_tokens=1, salt=salt)
        scheduler.add(sequence)
        cache.finish_all()
        assert sequence.num_cached_tokens == 0


@pytest.mark.parametrize("max_batch_tokens", [16, 1000])
def test_simultaneous_requests_compute_a_shared_prefix_once(
    make_sequence: MakeSequence, max_batch_tokens: int
) -> None:
    scheduler = Scheduler(256, 4, max_batch_tokens, 16)
    cache = CacheModel(scheduler)
    sequences = [make_sequence([*range(40), 100 + i], max_tokens=3) for i in range(16)]
    for sequence in sequences:
        scheduler.add(sequence)
    cache.finish_all()
    # 40 shared tokens once, then for each its own last prompt token and two generated ones.
    assert cache.num_computed_tokens == 40 + 16 * (1 + 2)
    assert [s.num_cached_tokens for s in sequences] == [0] + [40] * 15


def test_followers_take_over_when_the_one_they_follow_is_aborted(
    make_sequence: MakeSequence,
) -> None:
    scheduler = Scheduler(64, 4, 8, 8)
    cache = CacheModel(scheduler)
    first, second, third = (make_sequence([*range(40), 100 + i], max_tokens=1) for i in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    for _ in range(2):
        cache.step(lambda _: 1)
    assert scheduler.num_running == 1
    scheduler.abort(first)
    cache.finish_all()
    assert second.finish_reason == third.finish_reason == "length"
    assert (second.num_cached_tokens, third.num_cached_tokens) == (16, 40)
    assert cache.num_computed_tokens == 40 + 2


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


def test_admission_waits_for_room_and_nobody_overtakes(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(num_blocks=8, block_size=4, max_batch_tokens=64, max_sequences=8)
    cache = CacheModel(scheduler)
    holder = make_sequence(list(range(16)), max_tokens=4)
    big = make_sequence(list(range(100, 120)), max_tokens=4)
    small = make_sequence([7], max_tokens=1)
    for sequence in (holder, big, small):
        scheduler.add(sequence)
    cache.step(lambda _: 1)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    cache.finish_all()
    assert all(s.finish_reason == "length" for s in (holder, big, small))


def test_what_can_never_fit_is_refused_when_added(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(num_blocks=4, block_size=4, max_batch_tokens=64, max_sequences=8)
    scheduler.add(make_sequence([1] * 12, max_tokens=4))
    with pytest.raises(SequenceTooLongError, match="17 tokens"):
        scheduler.add(make_sequence([1] * 12, max_tokens=5))
    CacheModel(scheduler).finish_all()


def test_abort_in_every_state_frees_everything(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(num_blocks=16, block_size=4, max_batch_tokens=4, max_sequences=2)
    cache = CacheModel(scheduler)
    running, decoding = make_sequence(list(range(12))), make_sequence([50, 51])
    follower, waiting = make_sequence(list(range(12))), make_sequence([60, 61])
    sequences = [decoding, running, follower, waiting]
    for sequence in sequences:
        scheduler.add(sequence)
    cache.step(lambda _: 1)
    for sequence in sequences:
        scheduler.abort(sequence)
        scheduler.abort(sequence)
        scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.schedule() is None
    assert scheduler.pool.num_used == 0
    assert all(s.finish_reason == "abort" for s in sequences)


def test_an_abort_between_schedule_and_commit_is_harmless(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(16, 4, 64, 4)
    kept, gone = make_sequence([1, 2], max_tokens=2), make_sequence([3, 4], max_tokens=2)
    scheduler.add(kept)
    scheduler.add(gone)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abort(gone)
    scheduler.commit(plan, {kept.sequence_id: 5, gone.sequence_id: 6})
    assert (kept.token_ids, gone.token_ids) == ([1, 2, 5], [3, 4])
    scheduler.check_integrity()


def test_blocks_of_a_failed_sequence_are_not_found_again(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(32, 4, 8, 4)
    cache = CacheModel(scheduler)
    bad = make_sequence(list(range(20)))
    scheduler.add(bad)
    cache.step(lambda _: 1)
    scheduler.finish(bad, "error")
    scheduler.check_integrity()
    assert scheduler.pool.num_free == 32
    again = make_sequence(list(range(20)))
    scheduler.add(again)
    cache.finish_all()
    assert again.num_cached_tokens == 0


def test_cached_blocks_are_evicted_least_recently_used_first(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(num_blocks=6, block_size=4, max_batch_tokens=64, max_sequences=4)
    cache = CacheModel(scheduler)
    prompts = [[10 * p + i for i in range(9)] for p in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        scheduler.add(make_sequence(prompt, max_tokens=1))
        cache.finish_all()
    # Two blocks each for prompts 0 and 2 stayed; prompt 1 lost at least its first or last block.
    hits = []
    for prompt in (prompts[0], prompts[1]):
        sequence = make_sequence(prompt, max_tokens=1)
        scheduler.add(sequence)
        cache.finish_all()
        hits.append(sequence.num_cached_tokens)
    assert hits[0] == 8
    assert hits[1] < 8


@pytest.mark.parametrize(("max_batch_tokens", "max_sequences"), [(4, 5), (4, 0)])
def test_limits_under_which_a_sequence_might_starve_are_refused(
    max_batch_tokens: int, max_sequences: int
) -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        Scheduler(8, 4, max_batch_tokens, max_sequences)
