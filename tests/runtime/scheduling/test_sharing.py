"""What is computed once: shared prefixes, copied beginnings, answers, followers."""

import pytest

from runtime.scheduling.scheduler import Scheduler

from .conftest import CacheModel, MakeSequence


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


def test_the_block_in_which_sequences_part_is_copied(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(32, 4, 64, 4)
    cache = CacheModel(scheduler)
    scheduler.add(make_sequence([*range(10), 50, 51, 52], max_tokens=1))
    cache.finish_all()
    parting = make_sequence([*range(10), 60, 61], max_tokens=1)
    scheduler.add(parting)
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.moves.copies) == 1
    assert [item.num_tokens for item in plan.items] == [2]
    assert parting.num_cached_tokens == 10


def test_a_shared_full_block_is_never_written_again(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(32, 4, 64, 8)
    cache = CacheModel(scheduler)
    scheduler.add(make_sequence(list(range(8)), max_tokens=1))
    cache.finish_all()
    again = [make_sequence(list(range(8)), max_tokens=4) for _ in range(3)]
    for sequence in again:
        scheduler.add(sequence)
    cache.step(lambda _: 1)
    firsts = {sequence.block_table[0] for sequence in again}
    assert len(firsts) == 1
    assert len({sequence.block_table[1] for sequence in again}) == 3
    cache.finish_all()
    assert cache.num_computed_tokens == 8 + 3 * (1 + 3)


def test_a_thousand_shared_tokens_are_computed_once_to_the_token(
    make_sequence: MakeSequence,
) -> None:
    """1,000 is no multiple of the block size: the last 8 are shared by copy."""
    shared = list(range(1000))

    def make(number: int) -> list[int]:
        return [*shared, *range(2000 + 50 * number, 2050 + 50 * number)]

    scheduler = Scheduler(1024, 32, 1024, 16)
    cache = CacheModel(scheduler)
    unseen = [make_sequence(make(number), max_tokens=2) for number in range(64)]
    for sequence in unseen:
        scheduler.add(sequence)
    cache.finish_all()
    assert cache.num_computed_tokens == 1000 + 64 * (50 + 1)
    assert [sequence.num_cached_tokens for sequence in unseen] == [0] + [1000] * 63

    warm = make_sequence(make(64), max_tokens=1)
    scheduler.add(warm)
    cache.finish_all()
    assert warm.num_cached_tokens == 1000


def test_every_turn_of_a_chat_finds_all_of_the_last(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(128, 32, 256, 4)
    cache = CacheModel(scheduler)
    tokens = list(range(45))
    for turn in range(5):
        sequence = make_sequence(tokens, max_tokens=10)
        scheduler.add(sequence)
        cache.finish_all(lambda each: 1000 + len(each.token_ids))
        # All but the last token of the answer, which was never run.
        assert sequence.num_cached_tokens == (0 if turn == 0 else 45 + 18 * turn - 9)
        tokens = [*sequence.token_ids, *range(500 + 10 * turn, 508 + 10 * turn)]


def test_a_few_tokens_in_common_are_not_worth_a_step(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(64, 32, 1024, 8)
    cache = CacheModel(scheduler)
    sequences = [make_sequence([1, 2, *range(100 * i, 100 * i + 60)]) for i in range(1, 5)]
    for sequence in sequences:
        scheduler.add(sequence)
    plan = cache.step(lambda _: 1)
    assert plan is not None
    assert len(plan.items) == 4


def test_a_copy_is_left_out_where_its_source_leaves_no_room(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(num_blocks=4, block_size=4, max_batch_tokens=64, max_sequences=2)
    cache = CacheModel(scheduler)
    scheduler.add(make_sequence([*range(10), 50], max_tokens=1))
    cache.finish_all()
    whole = make_sequence([*range(10), 60, 61, 62], max_tokens=3)  # needs all four blocks
    scheduler.add(whole)
    cache.finish_all()
    assert whole.num_cached_tokens == 8
    assert whole.finish_reason == "length"


def test_the_source_of_a_copy_is_not_evicted_before_it_is_copied(
    make_sequence: MakeSequence,
) -> None:
    scheduler = Scheduler(num_blocks=5, block_size=4, max_batch_tokens=64, max_sequences=2)
    cache = CacheModel(scheduler)
    scheduler.add(make_sequence([1, 2, 3, 50], max_tokens=1))  # one block, the oldest in the cache
    cache.finish_all()
    scheduler.add(make_sequence(list(range(60, 76)), max_tokens=1))  # the other four
    cache.finish_all()
    scheduler.add(make_sequence([1, 2, 3, 70, 71], max_tokens=1))
    plan = scheduler.schedule()
    assert plan is not None
    [(source, _)] = plan.moves.copies
    scheduler.add(make_sequence([9], max_tokens=1))
    assert source not in plan.items[0].sequence.block_table
    scheduler.check_integrity()


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


def test_a_bad_block_is_not_copied_a_second_time(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(32, 4, 8, 4)
    cache = CacheModel(scheduler)
    scheduler.add(make_sequence([1, 2, 3, 4, 5, 6], max_tokens=1))
    cache.finish_all()
    copying = make_sequence([1, 2, 3, 4, 5, 9], max_tokens=3)
    scheduler.add(copying)
    cache.step(lambda _: 1)
    assert copying.num_cached_tokens == 5
    scheduler.finish(copying, "error")
    scheduler.check_integrity()
    again = make_sequence([1, 2, 3, 4, 5, 8], max_tokens=1)
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
