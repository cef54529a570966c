"""A form wins by five percent without doubt, whatever the noise; ties go to eager."""

import random

import pytest

from runtime.compiling.choosing import LOOKS, Standing, choose, compare_times, find_bounds

SIZES = (1, 8, 32, 128)


def times(
    speed: float | dict[int, float] = 1.0,
    *,
    rounds: int = 24,
    noise: float = 0.02,
    seed: int = 0,
    drift: float = 0.0,
) -> dict[int, list[float]]:
    """Made-up medians: eager takes 1 ms a row; noise is log-normal; `drift` slows rounds down
    by that much from first to last."""
    draw = random.Random(seed)  # noqa: S311
    speeds = speed if isinstance(speed, dict) else dict.fromkeys(SIZES, speed)
    return {
        size: [
            size / speeds[size] * draw.lognormvariate(0, noise) * (1 + drift * index / rounds)
            for index in range(rounds)
        ]
        for size in speeds
    }


def stand(speed: float | dict[int, float], **options: float) -> Standing:
    options = {"noise": 0.02, **options}
    return compare_times(times(seed=1, **options), times(speed, seed=2, **options))  # type: ignore[arg-type]


def test_a_form_that_is_clearly_faster_wins():
    standing = stand(1.5)
    assert standing.verdict == "faster"
    assert standing.score.least < 1.5 < standing.score.most
    assert choose({"fast": standing}, {"fast": 0}) == "fast"


def test_ties_and_gains_below_the_margin_go_to_eager():
    assert stand(1.0).verdict == "not_faster"
    assert stand(1.03, noise=0.005).verdict == "not_faster"
    assert stand(0.7).verdict == "not_faster"
    assert choose({"same": stand(1.0)}, {"same": 0}) == "eager"
    assert choose({}, {}) == "eager"


def test_a_gain_the_spread_does_not_support_is_undecided_and_does_not_win():
    standing = stand(1.08, noise=0.3, rounds=12)
    assert standing.verdict == "undecided"
    assert choose({"perhaps": standing}, {"perhaps": 0}) == "eager"
    assert stand(1.08, noise=0.03, rounds=96).verdict == "faster"


def test_too_few_rounds_decide_nothing():
    assert stand(3.0, rounds=5).verdict == "undecided"
    assert stand(3.0, rounds=LOOKS[0]).verdict == "faster"


@pytest.mark.parametrize("speed", [1.0, 1.2])
def test_drift_of_the_machine_changes_nothing(speed: float):
    drifting = stand(speed, drift=4.0)
    assert drifting.verdict == stand(speed).verdict


def test_an_outlier_in_either_changes_nothing():
    eager, own = times(seed=1), times(1.3, seed=2)
    eager[8][3] *= 1000
    own[32][7] *= 1000
    assert compare_times(eager, own).verdict == "faster"
    same = times(1.0, seed=2)
    assert compare_times(eager, same).verdict == "not_faster"


def test_a_form_that_is_slower_at_one_size_does_not_win():
    standing = stand({1: 0.8, 8: 2.0, 32: 2.0, 128: 2.0})
    assert standing.score.value > 1.5
    assert standing.verdict == "not_faster"
    assert standing.slowest_size == 1
    as_fast = stand({1: 1.0, 8: 2.0, 32: 2.0, 128: 2.0}, noise=0.01)
    assert as_fast.verdict == "faster"


def test_equal_forms_hardly_ever_win():
    """Of 200 races of two equal forms under heavy noise, looked at four times each."""
    num_wins = 0
    for seed in range(200):
        eager = times(1.0, rounds=LOOKS[-1], noise=0.2, seed=2 * seed)
        own = times(1.0, rounds=LOOKS[-1], noise=0.2, seed=2 * seed + 1)
        looks = [
            compare_times(
                {size: each[:rounds] for size, each in eager.items()},
                {size: each[:rounds] for size, each in own.items()},
            )
            for rounds in LOOKS
        ]
        num_wins += any(standing.verdict == "faster" for standing in looks)
    assert num_wins <= 4


def test_a_lower_precision_has_to_beat_the_best_of_the_uploaded_one_by_the_margin():
    ranks = {"exact": 0, "half": 1, "lossy": 2}
    exact, close, far = stand(1.5, noise=0.01), stand(1.55, noise=0.01), stand(2.0, noise=0.01)
    assert choose({"exact": exact, "half": close}, ranks) == "exact"
    assert choose({"exact": exact, "half": far}, ranks) == "half"
    assert choose({"half": far, "lossy": stand(2.05, noise=0.01)}, ranks) == "half"
    assert choose({"exact": exact, "exacter": far}, ranks | {"exacter": 0}) == "exacter"


def test_bounds_leave_as_many_rounds_outside_as_coins_might():
    bounds = find_bounds([float(value) for value in range(1, 13)])
    assert (bounds.value, bounds.least, bounds.most) == (6.5, 2.0, 11.0)
    assert find_bounds([1.0, 2.0]).least == 0.0
