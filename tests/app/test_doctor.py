"""The doctor names what is wrong and what mends it, and exits with 1 only for what stops a box."""

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from app import doctor
from app.cli import main
from app.doctor import Finding, Probe
from app.settings import Settings

GOOD = Probe(torch="2.13.0", compiler="c++", variants=["avx2"], landlock=7)


def with_(settings: Settings, **changes: Any) -> Settings:
    return msgspec.structs.replace(settings, **changes)


def test_a_machine_that_can_serve(settings: Settings) -> None:
    findings = list(doctor.examine(settings))
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names)) == 14
    assert not [finding for finding in findings if finding.verdict == "fail"]
    assert all(finding.fix for finding in findings if finding.verdict != "ok")


def test_the_probe_says_why_torch_is_not_there() -> None:
    def broken(*_: Any, **__: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess([], 0, '{"error": "ImportError: no torch"}\n', "")

    finding = doctor.check_torch(doctor.run_probe(broken))
    assert (finding.verdict, finding.detail) == ("fail", "ImportError: no torch")


def test_a_gpu_that_is_asked_for_must_be_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda = with_(settings, device="cuda")
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "")
    assert doctor.check_device(on_cuda, GOOD).verdict == "fail"
    assert doctor.check_device(settings, GOOD).verdict == "ok"
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: "570.1")
    assert "CUDA build" in doctor.check_device(on_cuda, GOOD).fix
    assert doctor.check_device(settings, GOOD).verdict == "note"
    found = msgspec.structs.replace(GOOD, cuda=True, gpus=["H200"])
    assert doctor.check_device(on_cuda, found) == Finding("GPU", "ok", "H200 (driver 570.1)")


def test_what_only_costs_speed_is_a_note(settings: Settings) -> None:
    bare = Probe(torch="2.13.0")
    checks = [
        doctor.check_operators(bare),
        doctor.check_compiler(bare),
        doctor.check_sandbox(settings, bare),
    ]
    assert [finding.verdict for finding in checks] == ["note"] * 3


def test_a_port_in_use_is_named(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = doctor.check_port(with_(settings, port=taken.getsockname()[1]))
    assert (finding.verdict, "TAPEOUT_PORT" in finding.fix) == ("fail", True)


def test_a_database_that_is_away_is_named(settings: Settings) -> None:
    away = with_(settings, database_url="postgresql://nobody@127.0.0.1:1/none")
    finding = doctor.check_database(away)
    assert (finding.name, finding.verdict) == ("Database", "fail")
    assert doctor.check_clock(away).verdict == "ok"


def test_a_launcher_that_is_away_is_named(settings: Settings, tmp_path: Path) -> None:
    away = with_(settings, launcher="docker", launcher_socket=tmp_path / "none.sock")
    finding = doctor.check_launcher(away)
    assert (finding.verdict, "container" in finding.fix) == ("fail", True)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    finding = doctor.check_data_dir(with_(settings, data_dir=tmp_path / "closed" / "data"))
    assert finding.verdict == "fail"


def test_a_directory_that_others_read_is_noted(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    finding = doctor.check_data_dir(with_(settings, data_dir=tmp_path / "open"))
    assert (finding.verdict, finding.fix) == ("note", f"chmod 700 {tmp_path / 'open'}")


def test_the_command_prints_fixes_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("Disk", "ok", "9 GiB free"), Finding("GPU", "fail", "none", "buy one")]
    monkeypatch.setattr(doctor, "examine", lambda settings: iter(findings))
    done = CliRunner().invoke(main, ["doctor"], env={"TAPEOUT_ADMIN_KEY": None})
    assert done.exit_code == 1
    assert "ok    Disk            9 GiB free" in done.output
    assert "-> buy one" in done.output
