"""An optimisation makes, proves and times candidates, and writes a whole artifact with the best."""

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from app.deployments.acceptance import check_optimised
from runtime.building.candidacy import Candidate
from runtime.building.contest import group
from runtime.building.optimise import max_rows_of, optimise
from runtime.building.reporter import OPTIMISE_STARTS, Reporter
from runtime.compiling.forms import Form, environment, form_directory
from runtime.compiling.packaging import read_manifest, read_receipt, write_manifest
from runtime.importing.program import ImportFailure
from runtime.protocol import (
    LENGTH,
    BuildFailed,
    CandidateReport,
    FromBuild,
    Message,
    Optimise,
    Optimised,
    Progress,
    encode_frame,
)
from tests.runtime.peer import make_tensor_artifact
from tests.runtime.test_build import BuildProcess

FAKE = Path(__file__).with_name("fake_contender.py")
EAGER = Form("eager")


@pytest.fixture(scope="module")
def artifact_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a build leaves it, with a file of the owner's and the forms of an earlier optimisation."""
    directory = make_tensor_artifact(tmp_path_factory.mktemp("artifact") / "digits")
    (directory / "text").mkdir()
    (directory / "text" / "tokenizer.json").write_text("{}")
    form_directory(directory, "old").mkdir(parents=True)
    (form_directory(directory, "old") / "form.bin").write_bytes(b"old")
    manifest = msgspec.structs.replace(read_manifest(directory), form="old", environment="gone")
    built = CandidateReport(
        name="eager",
        is_chosen=True,
        reason="",
        p50_ms={1: 1.0, 128: 2.0},
        device_ms_max=9.0,
        row_ms_by_size={8: 1.0, 16: 4.0},
    )
    receipt = msgspec.structs.replace(read_receipt(directory), candidates=[built])
    write_manifest(directory, manifest, receipt)
    return directory


def unavailable(form: Form, device: str) -> str | None:
    return f"There is no {form.name} on {device}." if form.name == "absent" else None


class Listener:
    """The other end of a reporter: all the progress that was told."""

    def __init__(self) -> None:
        self.connection, self._mine = socket.socketpair()
        self.progress: list[Progress] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with self._mine.makefile("rb") as stream:
            while prefix := stream.read(LENGTH.size):
                body = stream.read(LENGTH.unpack(prefix)[0])
                message = msgspec.msgpack.decode(body, type=FromBuild)
                assert isinstance(message, Progress)
                self.progress.append(message)

    def close(self) -> None:
        self.connection.close()
        self._thread.join(10)
        self._mine.close()


@pytest.fixture
def run(artifact_dir, tmp_path, monkeypatch) -> Iterator[Callable[..., Optimised]]:
    """Optimises with fake forms, in this process."""
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    threads = torch.get_num_threads()
    listener = Listener()
    output_dir = tmp_path / "output"

    def run(*forms: Form, **options: object) -> Optimised:
        output_dir.mkdir()
        request = msgspec.structs.replace(
            Optimise(artifact_dir=str(artifact_dir), output_dir=str(output_dir), num_threads=1),
            **options,
        )
        reporter = Reporter(listener.connection, OPTIMISE_STARTS)
        known = [EAGER, *forms]
        monkeypatch.setattr("runtime.building.optimise.forms_for", lambda *_: known)
        monkeypatch.setattr("runtime.building.optimise.unavailable", unavailable)
        monkeypatch.setattr("runtime.compiling.rounds.LOOKS", (12, 24))  # enough for clear cases
        monkeypatch.setattr("runtime.compiling.rounds.TURN_SECONDS", 0.005)
        command = (sys.executable, str(FAKE))
        optimised = optimise(request, reporter, "isolation for tests", command=command)
        listener.close()
        fractions = [each.fraction for each in listener.progress]
        assert fractions == sorted(fractions)
        assert {each.phase for each in listener.progress} == set(OPTIMISE_STARTS)
        accepts_loss = bool(options.get("accepts_loss"))
        check_optimised(optimised, read_manifest(artifact_dir), accepts_loss)
        assert read_manifest(output_dir) == optimised.manifest
        assert read_receipt(output_dir) == optimised.receipt
        return optimised

    run.output_dir = output_dir  # type: ignore[attr-defined]
    yield run
    listener.close()
    torch.set_num_threads(threads)


def by_name(optimised: Optimised) -> dict[str, CandidateReport]:
    return {each.name: each for each in optimised.receipt.candidates}


def files(directory: Path) -> list[str]:
    return sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )


def test_the_fastest_form_that_is_the_program_wins_and_the_others_say_why_not(run, artifact_dir):
    names = ("absent", "fast", "drops_bias", "crashes", "tires")
    forms = [Form(name) for name in names]
    optimised = run(*forms, Form("half", "bfloat16"), Form("tiny", "int8", is_lossy=True))

    reports = by_name(optimised)
    assert list(reports) == ["eager", *names, "half", "tiny"]
    fates = {name: report.fate for name, report in reports.items()}
    assert fates == {
        **{"eager": "slower", "absent": "unavailable", "fast": "chosen", "drops_bias": "differs"},
        **{"crashes": "failed", "tires": "failed", "half": "lossy", "tiny": "lossy"},
    }
    assert "answers: " in reports["drops_bias"].reason
    assert "SIGSEGV" in reports["crashes"].reason
    assert "killed" in reports["tires"].reason
    assert "once the owner accepts loss" in reports["half"].reason
    assert "not tried" in reports["tiny"].reason

    fast, eager, half = reports["fast"], reports["eager"], reports["half"]
    for report in (fast, eager, half):
        assert list(report.p50_ms) == list(report.p99_ms) == [1, 8, 32, 128]
        assert report.rows_per_second[128] > report.rows_per_second[1]
        assert report.num_runs >= 12
        assert report.memory_bytes
    assert fast.device_ms_max >= eager.device_ms_max >= max(eager.p99_ms.values())
    assert fast.row_ms_by_size == eager.row_ms_by_size == {8: 1.0, 16: 4.0}, "the build's"
    assert half.row_ms_by_size == {}
    assert fast.error is not None
    assert fast.error <= 1
    assert fast.prepare_seconds
    assert half.precision == "bfloat16"
    assert half.top_1_agreement is not None
    assert reports["drops_bias"].error is not None
    assert reports["drops_bias"].error > 1
    assert reports["drops_bias"].p50_ms == {}, "what is not the program is not timed"

    assert optimised.manifest.form == "fast"
    assert optimised.manifest.environment == environment("cpu", 1)
    assert optimised.receipt.verdict == "equal"
    assert {check.form for check in optimised.receipt.checks} >= {"fast", "drops_bias", "half"}
    assert files(run.output_dir) == [
        *("forms/fast/form.bin", "program.json", "program.pt2", "receipt.json"),
        "text/tokenizer.json",
    ]
    assert (run.output_dir / "program.pt2").read_bytes() == (
        artifact_dir / "program.pt2"
    ).read_bytes()


def test_where_nothing_is_faster_eager_stays_and_the_receipt_tells(run):
    optimised = run(Form("as_slow"))
    assert (optimised.manifest.form, optimised.manifest.environment) == ("eager", "")
    reports = by_name(optimised)
    assert reports["eager"].is_chosen
    assert reports["as_slow"].fate in ("within_margin", "slower")
    assert not any(name.startswith("forms") for name in files(run.output_dir))


def test_a_lossy_form_wins_where_the_owner_accepts_it(run):
    optimised = run(Form("lossy", "int8", is_lossy=True), accepts_loss=True)
    assert optimised.manifest.form == "lossy"
    assert optimised.receipt.verdict == "lossy"
    chosen = by_name(optimised)["lossy"]
    assert chosen.top_1_agreement == 1.0
    assert "of the outputs' spread" in chosen.reason
    assert any("as the owner accepts" in note for note in optimised.receipt.notes)


def test_where_not_even_eager_can_be_measured_nothing_was_found(run):
    with pytest.raises(ImportFailure, match="It was not done after") as caught:
        run(Form("fast"), budget_seconds=0.0)
    assert caught.value.error.code == "nothing_measured"


def test_where_contenders_do_not_start_nothing_was_found(run, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FAKE", Path("/nonexistent.py"))
    with pytest.raises(ImportFailure, match="Its process ended by itself"):
        run(Form("fast"))


def test_forms_run_beside_eager_as_many_at_once_as_memory_allows():
    def candidate(name: str, peak_bytes: int) -> Candidate:
        return Candidate(Form(name), peak_bytes=peak_bytes)

    eager = candidate("eager", 4)
    a, b, c, huge = (candidate(*each) for each in (("a", 3), ("b", 3), ("c", 3), ("huge", 99)))
    assert group(eager, [a, b, c], 100) == [[a, b, c]]
    assert group(eager, [a, b, c], 10) == [[a, b], [c]]
    assert group(eager, [huge, a], 10) == [[huge], [a]], "each is tried, alone if need be"
    assert group(eager, [], 10) == [[]]


def test_runs_are_as_large_as_the_schema_lets_them_be(artifact_dir):
    manifest = read_manifest(artifact_dir)
    assert manifest.schema is not None
    assert max_rows_of(manifest) == 128
    (image,) = manifest.schema.inputs
    bounded = msgspec.structs.replace(image, max_shape=[20, 1, 8, 8])
    schema = msgspec.structs.replace(manifest.schema, inputs=[bounded])
    assert max_rows_of(msgspec.structs.replace(manifest, schema=schema)) == 20
    alone = msgspec.structs.replace(manifest.schema, is_batched=False)
    assert max_rows_of(msgspec.structs.replace(manifest, schema=alone)) == 1


# --- real processes ---------------------------------------------------------------------


@pytest.fixture
def build(tmp_path: Path) -> Iterator[BuildProcess]:
    process = BuildProcess(tmp_path)
    process.connect()
    yield process
    if process.process.poll() is None:
        process.process.kill()
        process.process.wait()
    process.hang_up()


def start(build: BuildProcess, artifact_dir: Path, **options: object) -> None:
    request = Optimise(artifact_dir=str(artifact_dir), output_dir=str(build.output_dir))
    request = msgspec.structs.replace(request, num_threads=1, **options)
    build.send(encode_frame(request))


def finish(build: BuildProcess) -> tuple[list[Progress], Message | None]:
    progress: list[Progress] = []
    while isinstance(message := build.receive(), Progress):
        progress.append(message)
    return progress, message


@pytest.mark.compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_digits_are_optimised_with_real_compilers_in_the_sandbox(build, artifact_dir):
    start(build, artifact_dir)
    progress, message = finish(build)
    assert isinstance(message, Optimised), (message, build.log())
    reports = by_name(message)
    for name in ("aot_inductor", "onnxruntime"):
        assert reports[name].p50_ms, reports[name].reason
        assert reports[name].error is not None
        assert reports[name].error <= 1
    assert all(report.reason and report.fate for report in reports.values())
    check_optimised(message, read_manifest(artifact_dir), accepts_loss=False)
    form = message.manifest.form
    assert form in ("aot_inductor", "onnxruntime")
    assert files(form_directory(build.output_dir, form))
    assert any("making aot_inductor" in each.detail for each in progress)
    assert "isolation L" in " ".join(message.receipt.notes)
    assert build.hang_up() == 0


def test_an_artifact_that_is_none_is_refused(build, tmp_path):
    (tmp_path / "empty").mkdir()
    start(build, tmp_path / "empty")
    _, message = finish(build)
    assert isinstance(message, BuildFailed)
    assert list(build.output_dir.iterdir()) == []


def descendants(process_id: int) -> dict[int, str]:
    """Running processes below one, with their command lines."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], check=True, capture_output=True, text=True
    )
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    found: dict[int, str] = {}
    parents = {process_id}
    while parents:
        new = {int(pid): args for pid, parent, args in rows if int(parent) in parents}
        found |= new
        parents = set(new)
    return found


def is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_cancel_in_the_middle_of_a_compilation_leaves_no_process(build, artifact_dir):
    start(build, artifact_dir)
    while isinstance(message := build.receive(), Progress):
        if "making aot_inductor" in message.detail:
            break
    below: dict[int, str] = {}
    deadline = time.monotonic() + 120
    while not any("cc1plus" in args for args in below.values()):
        assert time.monotonic() < deadline, (below, build.log())
        time.sleep(0.05)
        below = descendants(build.process.pid)
    build.hang_up()
    deadline = time.monotonic() + 20
    while any(map(is_running, below)):
        left = [args for pid, args in below.items() if is_running(pid)]
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
