"""Random histories of money over the real code and a real database, checked after every step.

Two judges: `invariants.py` reads the tables alone, `model.py` says what they should hold.
"""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)

from app.core import clock
from app.core.database import create_writer_engine
from app.core.migration import upgrade
from tests.evidence.machine.base import START
from tests.evidence.machine.people import Money


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Money]:
    path = tmp_path / "template.db"
    engine = create_writer_engine(f"sqlite:///{path}")
    upgrade(engine)
    engine.dispose()
    instant = [START]
    monkeypatch.setattr(clock, "now", lambda: instant[0])

    class Bound(Money):
        template = path
        set_clock = staticmethod(lambda at: instant.__setitem__(0, at))

    return Bound


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


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_long_histories_leave_the_books_right(machine: type[Money]) -> None:
    run_state_machine_as_test(machine, settings=LONG)
