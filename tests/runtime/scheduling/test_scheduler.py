"""Admission, chunking, ends and limits, one behaviour at a time."""

import pytest

from runtime.scheduling.scheduler import Scheduler, SequenceTooLongError

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


@pytest.mark.parametrize(("max_batch_tokens", "max_sequences"), [(4, 5), (4, 0)])
def test_limits_under_which_a_sequence_might_starve_are_refused(
    max_batch_tokens: int, max_sequences: int
) -> None:
    with pytest.raises(ValueError, match="max_batch_tokens"):
        Scheduler(8, 4, max_batch_tokens, max_sequences)
