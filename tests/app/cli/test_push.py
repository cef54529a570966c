"""`push` waits as long as there is something to wait for, and no longer."""

from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from app.cli import main, optimise, push
from app.cli.client import Box, Refused
from app.cli.listings import form_cell


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
    monkeypatch.setattr(optimise, "POLL_SECONDS", 0)
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


def attempt(**values: Any) -> dict[str, Any]:
    made = {
        "status": "running",
        "phase": "measure",
        "phase_detail": "",
        "progress": 0.5,
        "form": "eager",
        "speed_up": None,
        "error": None,
    }
    return {"serving_form": "eager", "optimisation": made | values}


def follow_optimisation(*states: dict[str, Any]) -> None:
    optimise.follow_optimisation(cast(Box, ScriptedBox(*states)), "digits", 3)


def test_it_waits_for_the_faster_form(capsys: pytest.CaptureFixture[str]) -> None:
    follow_optimisation(
        attempt(status="queued"),
        attempt(phase_detail="onnxruntime"),
        attempt(status="done", form="onnxruntime", speed_up=3.21),
        attempt(status="done", form="onnxruntime", speed_up=3.21) | {"serving_form": "onnxruntime"},
    )
    said = capsys.readouterr().err
    assert "waiting for its turn" in said
    assert "50%  measure: onnxruntime" in said
    assert "onnxruntime won; its worker is starting" in said
    assert "optimised: onnxruntime, 3.2 times as fast as eager" in said


def test_eager_may_win(capsys: pytest.CaptureFixture[str]) -> None:
    follow_optimisation(attempt(status="done", speed_up=1.0))
    assert "eager is as fast as any other form" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (attempt(status="failed", error={"message": "It crashed."}), "It crashed."),
        (attempt(status="cancelled"), "cancelled"),
        ({"optimisation": None}, "no decoders"),
    ],
)
def test_it_says_why_there_is_no_faster_form(state: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        follow_optimisation(state)


@pytest.mark.parametrize(
    ("form", "serving", "state", "cell"),
    [
        ("", "", {"optimisation": None}, ""),
        ("eager", "", {"optimisation": None}, "eager"),
        ("eager", "eager", attempt(), "eager, optimising 50%"),
        ("eager", "eager", attempt(status="done", speed_up=1.0), "eager"),
        ("onnxruntime", "", attempt(status="done", speed_up=3.21), "onnxruntime, 3.2x"),
        ("onnxruntime", "onnxruntime", attempt(status="done", speed_up=3.21), "onnxruntime, 3.2x"),
        ("onnxruntime", "eager", attempt(status="done", speed_up=3.21), "eager"),
    ],
)
def test_the_list_of_models_shows_the_form_that_serves_and_its_speed_up(
    form: str, serving: str, state: dict[str, Any], cell: str
) -> None:
    manifest = {"form": form} if form else None
    assert form_cell({**state, "manifest": manifest, "serving_form": serving}) == cell


def test_inputs_that_nobody_could_read_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    command = ["push", str(path), "--name", "m", "--inputs", "x: float[batch]"]
    done = CliRunner().invoke(main, command, env={})
    assert done.exit_code == 1
    assert "did you mean float32?" in done.output
