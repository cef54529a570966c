"""What is believed of a run's time: measured by the build, then by every run."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.batching.service_times import ServiceTimes, SizedTimes

MEASURED = {1: 1.0, 8: 2.0, 32: 5.0, 128: 18.0}


def test_measured_times_are_kept_and_joined_by_straight_lines():
    times = ServiceTimes(128, MEASURED)
    assert {rows: times.ms(rows) for rows in MEASURED} == MEASURED
    assert times.ms(20) == pytest.approx(3.5)
    assert times.ms(0) == 0
    assert times.knows(20)


def test_what_is_not_known_takes_as_long_as_one_by_one():
    times = ServiceTimes(64)
    assert not times
    times.observe(1, 3.0)
    assert times
    assert times.ms(64) == pytest.approx(3.0 * 64)
    assert not times.knows(64)


def test_a_slower_machine_is_found_out_at_every_size_that_was_not_seen():
    times = ServiceTimes(128)
    for _ in range(30):
        times.observe(1, 2.0)
        times.observe(2, 2.0)
    assert times.ms(2) == pytest.approx(2.0, rel=0.05)
    assert times.ms(4) <= 4.2, "from two rows' time on in proportion"


def test_runs_move_the_times_around_their_size():
    times = ServiceTimes(128, MEASURED)
    for _ in range(100):
        times.observe(1, 1.0)
        times.observe(32, 10.0)
    assert times.ms(32) == pytest.approx(10.0, rel=0.02)
    assert times.ms(1) == pytest.approx(1.0)
    assert times.ms(128) > 30, "the machine is slower than it was where nothing else is known"


def test_one_hiccup_changes_little():
    times = ServiceTimes(128, MEASURED)
    times.observe(8, 1000.0)
    assert times.ms(8) < 4.0


def test_a_large_run_that_is_quick_shows_what_smaller_ones_can_be():
    times = ServiceTimes(128, {1: 4.0, 8: 2.0})
    assert times.ms(1) == pytest.approx(2.0)


@given(
    st.dictionaries(st.integers(1, 128), st.floats(0.01, 1e4), max_size=5),
    st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1e5)), max_size=30),
)
def test_times_never_fall_and_are_never_negative(measured, runs):
    times = ServiceTimes(100, measured)
    for rows, ms in runs:
        times.observe(rows, ms)
    found = [times.ms(rows) for rows in range(101)]
    assert found[0] == 0
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in itertools.pairwise(found))


def test_sizes_are_apart_and_a_new_one_begins_with_its_neighbours_in_proportion():
    sized = SizedTimes(128, MEASURED)
    assert sized.of_size(1000).ms(8) == 2.0
    assert sized.of_size(1010) is sized.of_size(1000), "about the same"
    larger = sized.of_size(4000)
    assert larger.ms(8) == pytest.approx(8.0)
    for _ in range(5):
        larger.observe(8, 3.0)
    assert larger.ms(8) == pytest.approx(3.0, rel=0.05), "a guess is given up quickly"
    assert sized.of_size(1000).ms(8) == 2.0


def test_sizes_are_forgotten_in_the_end():
    sized = SizedTimes(128, MEASURED)
    for power in range(200):
        sized.of_size(1 << power)
    assert len(sized._times) <= 64
