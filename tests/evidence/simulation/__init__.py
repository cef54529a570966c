"""Whole histories of a box's money by a seed: one number drives the clock, who does what, what is
lost when the process dies, and every amount. The same seed always gives the same history."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from app.core import clock
from app.core.database import create_writer_engine
from app.core.migration import upgrade
from tests.evidence.machine.base import MEMORY, START
from tests.evidence.machine.people import Money
from tests.evidence.machine.walk import Walk


class Failed(AssertionError):
    """A history that went wrong: its text is how to see it again, and what happened."""


@contextmanager
def world() -> Generator[type[Money]]:
    """Boxes whose clock is ours alone, on copies of one empty database."""
    instant = [START]
    real, clock.now = clock.now, lambda: instant[0]
    try:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
            path = Path(directory) / "template.db"
            engine = create_writer_engine(f"sqlite:///{path}")
            upgrade(engine)
            engine.dispose()

            class Bound(Money):
                template = path
                set_clock = staticmethod(lambda at: instant.__setitem__(0, at))

            yield Bound
    finally:
        clock.now = real


def simulate(money_class: type[Money], seed: int, num_steps: int) -> list[str]:
    """Returns what happened. Raises `Failed`."""
    money = money_class()
    walk = Walk(money, seed)
    try:
        walk.take(num_steps)
    except Exception as error:
        raise Failed(
            f"python -m tests.evidence.simulation --seed {seed} --steps {num_steps}\n"
            + "\n".join(walk.trace)
        ) from error
    finally:
        money.teardown()
    return walk.trace
