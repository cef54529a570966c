"""`push` waits as long as there is something to wait for, and no longer."""

from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from app.cli import main, push
from app.cli.client import Box, Refused


class ScriptedBox:
    """Answers with one state of a version after the other; the last one stays."""

    def __init__(self, *states: dict[str, Any]) -> None:
        self._states = iter(states)
        self._state: dict[str, Any] = {}

    def json(self, method: str, path: str) -> dict[str, Any]:
        self._state = next(self._states, self._state)
        return VERSION | self._state


VERSION: dict[str, Any] = {
    "model": "digits",
    "number": 3,
    "status": "ready",
    "phase": "",
    "phase_detail": "",
    "progress": 1.0,
    "error": None,
    "endpoint": "digits",
    "is_serving": False,
    "serving_detail": "starting",
}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "POLL_SECONDS", 0)
    monkeypatch.setattr(push, "SUPERSEDED_SECONDS", 0)


def follow(*states: dict[str, Any]) -> None:
    push.follow(cast(Box, ScriptedBox(*states)), "digits", 3)


def test_it_returns_once_the_version_serves(capsys: pytest.CaptureFixture[str]) -> None:
    follow(
        {"status": "building", "phase": "prove", "progress": 0.5},
        {"serving_detail": "failed: it ran out of memory. Version 3 starts again in 1 s"},
        {"is_serving": True},
    )
    assert "50%  prove" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("states", "why"),
    [
        ([{"status": "failed", "error": {"message": "no weights"}}], "no weights"),
        ([{"status": "cancelled"}], "cancelled"),
        ([{"serving_detail": f"failed: again in {n} s"} for n in (1, 2, 4)], "does not start"),
        ([{"serving_detail": "stopped"}], "stopped"),
        ([{"endpoint": None}], "another version"),
    ],
)
def test_it_ends_when_there_is_nothing_to_wait_for(states: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(Refused, match=why):
        follow(*states)


@pytest.mark.parametrize("name", ["Digits", "../keys", "default", ""])
def test_a_bad_name_is_refused_before_anything_is_sent(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"x")
    done = CliRunner().invoke(main, ["push", str(path), "--name", name], env={})
    assert done.exit_code == 1
    assert "name" in done.output
