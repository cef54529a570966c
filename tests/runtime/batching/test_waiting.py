"""When waiting pays, and how many rows run at once."""

import pytest

from runtime.batching.arrivals import SPANS_MS, Arrivals
from runtime.batching.service_times import ServiceTimes
from runtime.batching.waiting import best_rows, best_wait, drain_ms

FLAT = ServiceTimes(128, {1: 10.0, 128: 10.0})
LINEAR = ServiceTimes(128, {1: 1.0, 128: 128.0})


def expect(rows: float, within_ms: float) -> list[float]:
    return [rows if span >= within_ms else 0.0 for span in SPANS_MS]


def wait(rows: int, coming: list[float], times: ServiceTimes = FLAT, target_ms: float = 100.0):
    return best_wait(rows, 0.0, 0.0, coming, times, max_rows=128, target_ms=target_ms)


def test_nobody_waits_for_nobody():
    assert wait(1, []) is None
    assert wait(1, expect(0, 0)) is None


def test_many_who_are_about_to_come_are_waited_for():
    decision = wait(1, expect(7, 1.0))
    assert decision is not None
    assert decision.rows == 8
    assert 0 < decision.until_ms < 2.0


def test_many_do_not_wait_for_one():
    assert wait(64, expect(1, 2.0)) is None


def test_nobody_is_waited_for_who_comes_when_the_server_is_free_anyway():
    assert wait(1, expect(100, 11.0)) is None


def test_company_that_saves_nothing_is_not_waited_for():
    assert wait(1, expect(7, 0.2), LINEAR) is None


@pytest.mark.parametrize(("target_ms", "waits"), [(0, False), (10, False), (13, True)])
def test_a_wait_keeps_to_the_latency_target(target_ms, waits):
    assert (wait(1, expect(7, 1.0), target_ms=target_ms) is not None) == waits


def test_a_run_longer_than_the_target_is_never_waited_for():
    slow = ServiceTimes(128, {1: 500.0, 128: 500.0})
    assert wait(1, expect(50, 1.0), slow) is None


# --- how many rows ----------------------------------------------------------------------


def test_all_run_at_once_where_rows_are_nearly_free():
    assert best_rows(100, FLAT, 128) == 100
    assert best_rows(300, FLAT, 128) == 128


def test_rows_that_take_their_full_time_anyway_run_in_small_runs():
    assert best_rows(128, LINEAR, 128) == 1
    overhead = ServiceTimes(128, {rows: 1.0 + 0.5 * rows for rows in (1, 8, 16, 32, 64, 128)})
    assert 16 <= best_rows(128, overhead, 128) < 128


def test_a_size_at_which_the_model_is_slow_is_avoided():
    times = ServiceTimes(128, {1: 0.19, 8: 0.47, 32: 1.3, 128: 12.0})
    assert best_rows(128, times, 128) == 32


def test_sizes_that_never_ran_are_tried():
    times = ServiceTimes(128)
    assert best_rows(100, times, 128) == 100
    for _ in range(5):
        times.observe(1, 1.0)
    assert best_rows(100, times, 128) == 100


def test_what_waits_drains_at_the_measured_rate():
    assert drain_ms(0, FLAT, 128) == 0
    assert drain_ms(1280, FLAT, 128) == pytest.approx(100.0)


# --- who is coming ----------------------------------------------------------------------


def test_callers_that_come_back_are_expected_after_a_run():
    arrivals = Arrivals()
    for turn in range(20):
        arrivals.begin("ended", turn * 20.0, 8)
        for caller in range(8):
            arrivals.add(1, turn * 20.0 + 1.0 + caller * 0.1)
    arrivals.begin("ended", 400.0, 16)  # twice as many are answered
    assert arrivals.expected(400.0, 50.0)[-1] == pytest.approx(16, rel=0.2)
    assert arrivals.expected(400.0, 0.5)[-1] == 0
    assert len(arrivals.expected(400.0, 0.5)) < len(SPANS_MS)


def test_who_is_back_is_not_expected_again():
    arrivals = Arrivals()
    for turn in range(5):
        arrivals.begin("ended", turn * 20.0, 4)
        arrivals.add(4, turn * 20.0 + 1.0)
    arrivals.begin("ended", 100.0, 4)
    arrivals.add(4, 100.5)
    assert arrivals.expected(100.5, 50.0)[-1] == pytest.approx(0, abs=0.1)


def test_a_lone_call_and_the_first_of_a_burst_are_told_apart_by_what_follows():
    arrivals = Arrivals()
    for turn in range(12):
        arrivals.begin("came", turn * 100.0, 1)
        for number in range(7 if turn % 2 else 0):
            arrivals.add(1, turn * 100.0 + 0.1 * (number + 1))
    arrivals.begin("came", 2000.0, 1)
    first = arrivals.expected(2000.0, 10.0)[-1]
    assert 2 < first < 5, "half of the time a burst"
    assert arrivals.expected(2000.4, 10.0)[-1] < 0.5, "nobody followed"
    arrivals.add(1, 2000.41)
    arrivals.add(1, 2000.42)
    arrivals.add(1, 2000.43)
    arrivals.add(1, 2000.44)
    assert arrivals.expected(2000.45, 10.0)[-1] > 2, "a burst"
