"""Failpoints: silent unless named, and then a kill that nothing survives."""

import os
import signal
import subprocess
import sys

import pytest

from app.core.failpoints import Countdown, Reached, failpoint, observed

REACHES_TWICE = """
from app.core.failpoints import failpoint
for name in ("other", "here", "here"):
    failpoint(name)
    print(name, flush=True)
"""


@pytest.mark.parametrize(
    ("target", "seen"),
    [("here", ["other"]), ("here:2", ["other", "here"]), ("*:1", []), ("*:3", ["other", "here"])],
)
def test_the_process_is_killed_where_the_environment_says(target: str, seen: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REACHES_TWICE],
        env={**os.environ, "FAILPOINT": target},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == seen


@pytest.mark.parametrize("target", ["", "elsewhere", "here:3"])
def test_nothing_happens_elsewhere(target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REACHES_TWICE],
        env={**os.environ, "FAILPOINT": target},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0


def test_a_test_may_stand_in_for_the_crash() -> None:
    def crash(name: str) -> None:
        raise Reached(name)

    with observed(Countdown("here:2", crash)):
        failpoint("here")
        failpoint("elsewhere")
        with pytest.raises(Reached, match="here"):
            failpoint("here")
        failpoint("here")
    failpoint("here")
