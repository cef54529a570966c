"""Random histories of money over the real code and a real database, checked after every step.

Two judges: `invariants.py` reads the tables alone, `model.py` says what they should hold.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)

from tests.evidence.machine.people import Money
from tests.evidence.simulation import world


@pytest.fixture
def machine() -> Iterator[type[Money]]:
    with world() as money_class:
        yield money_class


QUICK = settings(
    max_examples=int(os.environ.get("QUICK_HISTORIES", "25")),
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(
    QUICK,
    max_examples=int(os.environ.get("SOAK_HISTORIES", "300")),
    stateful_step_count=100,
    derandomize=False,
    print_blob=True,
)


def test_every_history_leaves_the_books_right(machine: type[Money]) -> None:
    run_state_machine_as_test(machine, settings=QUICK)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_long_histories_leave_the_books_right(machine: type[Money]) -> None:
    run_state_machine_as_test(machine, settings=LONG)
