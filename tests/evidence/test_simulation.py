"""Histories by seed. One that fails tells how to run it again."""

import os
from collections.abc import Iterator

import pytest

from tests.evidence.machine.people import Money
from tests.evidence.simulation import simulate, world

NUM_SEEDS = int(os.environ.get("SOAK_SEEDS", "2000"))


@pytest.fixture(scope="module")
def money_class() -> Iterator[type[Money]]:
    with world() as money_class:
        yield money_class


@pytest.mark.parametrize("seed", range(20))
def test_a_history_leaves_the_books_right(money_class: type[Money], seed: int) -> None:
    simulate(money_class, seed, num_steps=60)


def test_a_seed_always_gives_the_same_history(money_class: type[Money]) -> None:
    first = simulate(money_class, 3, num_steps=40)
    assert simulate(money_class, 3, num_steps=40) == first


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_thousands_of_histories_leave_the_books_right(money_class: type[Money]) -> None:
    for seed in range(1_000, 1_000 + NUM_SEEDS):
        simulate(money_class, seed, num_steps=200)
