"""Which texts share a run."""

import gc
import weakref
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from runtime.batching.length_queue import SLACK_SHARE, SLACK_TOKENS, LengthQueue, Text
from runtime.protocol import Batching


def texts(*lengths: int) -> list[list[int]]:
    return [[0] * length for length in lengths]


def runs(queue: LengthQueue) -> list[list[tuple[str, int]]]:
    """All runs to the end, as (request, length)."""
    found = []
    while batch := queue.take():
        found.append([(text.request_id, text.num_tokens) for text in batch])
    return found


def test_similar_lengths_share_runs_and_different_ones_do_not():
    queue = LengthQueue(1000, 64, "padded")
    queue.add("a", "1", texts(100, 3, 98, 2))
    queue.add("a", "2", texts(99, 5))
    assert runs(queue) == [
        [("1", 100), ("2", 99), ("1", 98)],
        [("1", 3), ("1", 2)],
        [("2", 5)],
    ]


@pytest.mark.parametrize(
    ("batching", "sizes"), [("padded", [3]), ("equal_lengths", [2, 1]), ("alone", [1, 1, 1])]
)
def test_what_the_proof_did_not_allow_never_shares_a_run(batching: Batching, sizes: list[int]):
    queue = LengthQueue(1000, 64, batching)
    queue.add("a", "1", texts(7, 7, 6))
    assert [len(run) for run in runs(queue)] == sizes


def test_a_run_keeps_to_its_budget_counted_with_padding():
    queue = LengthQueue(32, 3, "padded")
    queue.add("a", "1", texts(*[16] * 3, *[4] * 4, 100))
    assert [[n for _, n in run] for run in runs(queue)] == [
        [100],
        [16, 16],
        [16],
        [4, 4, 4],
        [4],
    ]


def test_a_removed_request_runs_no_more():
    queue = LengthQueue(1000, 64, "padded")
    queue.add("a", "1", texts(5, 6))
    queue.add("b", "2", texts(5))
    queue.remove("1")
    queue.remove("1")
    assert runs(queue) == [[("2", 5)]]
    assert len(queue) == 0


@pytest.mark.parametrize("batching", ["padded", "equal_lengths", "alone"])
def test_texts_that_ran_or_were_removed_are_not_kept(batching: Batching):
    queue = LengthQueue(10, 8, batching)
    given: list[weakref.ref[Text]] = []
    for number in range(20):  # all of one length, which is the longest of each run
        queue.add("a", str(number), texts(60, 60))
        given += [weakref.ref(text) for text in queue.take()]
        queue.add("b", f"removed {number}", texts(60))
        queue.remove(f"removed {number}")
        queue.remove(str(number))
    gc.collect()
    assert len(queue) == 0
    assert not any(text() for text in given)
    assert not any((queue._of_length, queue._texts, queue._requests))


def test_a_caller_with_one_text_does_not_wait_for_a_caller_with_many():
    queue = LengthQueue(64, 64, "equal_lengths")
    queue.add("many", "1", texts(*[64] * 50))
    queue.take()
    queue.add("one", "2", texts(10))
    assert [text.request_id for text in queue.take()] == ["2"]


def test_callers_get_equal_shares_of_tokens():
    queue = LengthQueue(64, 64, "equal_lengths")
    queue.add("long", "1", texts(*[64] * 20))
    queue.add("short", "2", texts(*[8] * 400))
    served: Counter[str] = Counter()
    for _ in range(20):
        for text in queue.take():
            served[text.key] += text.num_tokens
    assert abs(served["long"] - served["short"]) <= 64


def test_coming_back_earns_no_credit():
    queue = LengthQueue(64, 64, "equal_lengths")
    queue.add("idle", "0", texts(1))
    queue.take()
    queue.add("busy", "1", texts(*[64] * 40))
    for _ in range(20):
        queue.take()
    queue.add("idle", "2", texts(*[64] * 40))
    keys = [queue.take()[0].key for _ in range(10)]
    assert 4 <= keys.count("idle") <= 6


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 40), min_size=1, max_size=12)),
        min_size=1,
        max_size=12,
    ),
    removed=st.sets(st.integers(0, 11)),
    max_tokens=st.integers(1, 100),
    max_texts=st.integers(1, 8),
    batching=st.sampled_from(["padded", "equal_lengths", "alone"]),
)
def test_every_text_runs_once_and_in_bounds(
    requests: list[tuple[str, list[int]]],
    removed: set[int],
    max_tokens: int,
    max_texts: int,
    batching: Batching,
):
    queue = LengthQueue(max_tokens, max_texts, batching)
    for number, (key, lengths) in enumerate(requests):
        queue.add(key, str(number), texts(*lengths))
    ran: Counter[tuple[str, int]] = Counter()
    first = queue.take()
    ran.update((text.request_id, text.index) for text in first)
    for number in removed:
        queue.remove(str(number))
    while batch := queue.take():
        longest, shortest = batch[0].num_tokens, min(text.num_tokens for text in batch)
        assert len(batch) <= max_texts
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        assert batching == "padded" or len({text.num_tokens for text in batch}) == 1
        assert longest - shortest <= max(SLACK_TOKENS, longest // SLACK_SHARE)
        ran.update((text.request_id, text.index) for text in batch)
    assert max(ran.values()) == 1
    kept = {
        (str(number), index)
        for number, (_, lengths) in enumerate(requests)
        for index in range(len(lengths))
        if number not in removed
    }
    assert kept <= set(ran)
    assert len(queue) == 0
