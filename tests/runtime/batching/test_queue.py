"""Which requests share a run, and when the first of them waits."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.batching.queue import BatchQueue, Pending

MS = 1_000_000


def add(
    queue: BatchQueue[str],
    name: str,
    *,
    rows: int = 1,
    key: object = "k",
    at: int = 0,
    is_running: bool = False,
) -> Pending[str]:
    pending = Pending(name, key, rows, at)
    queue.add(pending, is_running=is_running)
    return pending


def names(batch: list[Pending[str]]) -> list[str]:
    return [pending.item for pending in batch]


def busy_queue(max_rows: int = 8) -> BatchQueue[str]:
    """A queue whose recent requests came in company."""
    queue: BatchQueue[str] = BatchQueue(max_rows, 2 * MS)
    for _ in range(10):
        add(queue, "earlier", is_running=True)
    queue.clear()
    return queue


def test_a_single_caller_never_waits():
    queue: BatchQueue[str] = BatchQueue(8, 2 * MS)
    for turn in range(50):
        add(queue, "only", at=turn * MS)
        assert names(queue.take(turn * MS)) == ["only"]


def test_a_lone_request_waits_for_company_when_others_have_come():
    queue = busy_queue()
    add(queue, "a", at=0)
    assert queue.take(0) == []
    assert queue.due_ns() == 2 * MS
    add(queue, "b", at=MS)
    assert queue.take(MS) == []
    assert names(queue.take(2 * MS)) == ["a", "b"]


def test_a_full_run_does_not_wait():
    queue = busy_queue(max_rows=4)
    add(queue, "a", rows=3)
    assert queue.take(0) == []
    add(queue, "b", rows=1)
    assert names(queue.take(0)) == ["a", "b"]


def test_what_arrived_during_a_run_goes_at_once():
    queue = busy_queue()
    add(queue, "a", at=0, is_running=True)
    assert names(queue.take(1)) == ["a"]


def test_company_is_forgotten_after_a_while():
    queue = busy_queue()
    waits = 0
    for turn in range(40):
        add(queue, "only", at=turn * 10 * MS)
        waits += not queue.take(turn * 10 * MS)
        queue.clear()
    assert 0 < waits < 20


def test_only_equal_keys_share_a_run():
    queue: BatchQueue[str] = BatchQueue(8, 0)
    add(queue, "a", key="small")
    add(queue, "b", key="large")
    add(queue, "c", key="small")
    assert names(queue.take(0)) == ["a", "c"]
    assert names(queue.take(0)) == ["b"]
    assert queue.take(0) == []


def test_nothing_overtakes_a_request_that_does_not_fit():
    queue: BatchQueue[str] = BatchQueue(4, 0)
    add(queue, "a", rows=3)
    add(queue, "b", rows=2)
    add(queue, "c", rows=1)
    assert names(queue.take(0)) == ["a"]
    assert names(queue.take(0)) == ["b", "c"]


def test_a_removed_request_does_not_run():
    queue: BatchQueue[str] = BatchQueue(4, 0)
    first = add(queue, "a")
    add(queue, "b")
    assert queue.remove(first)
    assert names(queue.take(0)) == ["b"]
    assert not queue.remove(first)


@given(st.lists(st.tuples(st.integers(1, 8), st.sampled_from("xyz"), st.booleans()), max_size=40))
def test_every_request_runs_once_within_the_limit_and_in_order(requests):
    queue: BatchQueue[str] = BatchQueue(8, MS)
    for index, (rows, key, is_running) in enumerate(requests):
        add(queue, f"{index}", rows=rows, key=key, at=index, is_running=is_running)
    ran: list[str] = []
    now = 0
    while len(queue):
        due = queue.due_ns()
        assert due is not None
        now = max(now, due)
        batch = queue.take(now)
        assert batch, "a due request runs"
        assert sum(pending.rows for pending in batch) <= 8
        assert len({pending.key for pending in batch}) == 1
        ran += names(batch)
    assert sorted(ran, key=int) == [str(index) for index in range(len(requests))]
    for key in "xyz":
        mine = [name for name in ran if requests[int(name)][1] == key]
        assert mine == sorted(mine, key=int)
