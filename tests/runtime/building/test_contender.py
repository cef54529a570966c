"""A form's process does what it is asked, and whatever happens there becomes a reason."""

import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime.building.contender_messages import Make, Place, encode, to_wire
from runtime.building.contender_process import COMMAND, ContenderFailure, ContenderProcess
from runtime.compiling.packaging import read_manifest
from runtime.importing.exported import load_exported
from tests.runtime.peer import make_tensor_artifact

FAKE = (sys.executable, str(Path(__file__).with_name("fake_contender.py")))


@pytest.fixture(scope="module")
def artifact_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tensor_artifact(tmp_path_factory.mktemp("artifact") / "digits")


@pytest.fixture
def start(artifact_dir, tmp_path, monkeypatch) -> Iterator[object]:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    manifest = read_manifest(artifact_dir)
    started: list[ContenderProcess] = []

    def start(form: str, *, seconds: float = 60.0, memory_bytes: int = 0) -> ContenderProcess:
        (tmp_path / form).mkdir()
        place = Place(
            artifact_dir=str(artifact_dir),
            manifest=manifest,
            form=form,
            directory=str(tmp_path / form),
            device="cpu",
            num_threads=1,
        )
        assert manifest.schema is not None
        until = time.monotonic() + seconds
        process = ContenderProcess(
            place, manifest.schema, until=until, memory_bytes=memory_bytes, command=FAKE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.end()


CALIBRATION = [[torch.rand(2, 1, 8, 8)]]


@pytest.fixture(autouse=True)
def mark(monkeypatch) -> str:
    """What every process that this test starts has in its environment."""
    text = uuid.uuid4().hex
    monkeypatch.setenv("CONTENDER_TEST", text)
    return text


def running(text: str, mark: str) -> list[str]:
    """Command lines of this test's processes that contain `text`."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if text in arguments and mark.encode() in (directory / "environ").read_bytes():
                found.append(arguments)
        except OSError:  # it has just ended
            continue
    return found


def test_a_form_is_made_loaded_run_and_timed(start, artifact_dir):
    contender = start("fast")
    contender.make(16, CALIBRATION)
    contender.load()
    image = torch.rand(3, 1, 8, 8)
    (logits,) = contender.run([image])
    program = load_exported(artifact_dir / "program.pt2")
    assert torch.equal(logits, program.run([image])[0])
    assert contender.hold(3, [image]) > 0
    runs_ms = contender.turn(3, 0.01)
    assert len(runs_ms) > 1
    assert all(ms > 0 for ms in runs_ms)
    assert contender.turn(3, 0.0), "one run at least"
    assert 50 * 2**20 < contender.peak_bytes < 4 * 2**30


def test_a_contender_needs_no_way_to_find_its_code_by_name(artifact_dir, tmp_path, monkeypatch):
    """As in the sandbox, where the directory of a checkout on PYTHONPATH cannot be listed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(torch.__file__).parents[1]))
    manifest = read_manifest(artifact_dir)
    assert manifest.schema is not None
    place = Place(
        artifact_dir=str(artifact_dir),
        manifest=manifest,
        form="eager",
        directory=str(tmp_path),
        device="cpu",
        num_threads=1,
    )
    without_site = (sys.executable, "-S", *COMMAND[1:])  # so no editable install either
    until = time.monotonic() + 60
    contender = ContenderProcess(place, manifest.schema, until=until, command=without_site)
    try:
        contender.load()
        assert len(contender.run([torch.rand(3, 1, 8, 8)])) == 1
    finally:
        contender.end()


def test_wrong_questions_and_wrong_inputs_are_refused_and_the_process_goes_on(start):
    contender = start("fast")
    contender.make(16, CALIBRATION)
    contender.load()
    with pytest.raises(ContenderFailure, match="It fails on an input") as failure:
        contender.run([torch.rand(3, 7)])
    assert failure.value.fate == "failed"
    assert contender.run([torch.rand(1, 1, 8, 8)])[0].shape == (1, 10)


def test_a_crash_is_named(start):
    with pytest.raises(ContenderFailure, match="crashed \\(SIGSEGV\\)"):
        start("crashes").make(16, CALIBRATION)
    with pytest.raises(ContenderFailure, match="ended by itself \\(code 7\\)"):
        start("ends").make(16, CALIBRATION)


def test_a_refusal_is_passed_on(start):
    with pytest.raises(ContenderFailure, match="frobnicate has no counterpart"):
        start("refuses").make(16, CALIBRATION)


def test_too_much_memory_is_an_error_of_the_form_alone(start):
    with pytest.raises(ContenderFailure, match="more memory than an optimisation may take"):
        start("greedy", memory_bytes=2 * 2**30).make(16, CALIBRATION)


def test_a_form_that_hangs_is_stopped_with_what_it_started(start, monkeypatch, mark):
    monkeypatch.setattr("runtime.building.contender_process.TICK_SECONDS", 0.2)
    contender = start("compiles", seconds=60)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if running("sleep 86397", mark):
            contender.until = time.monotonic()  # late from now on

    contender.on_wait = wait
    with pytest.raises(ContenderFailure, match="not done after") as failure:
        contender.make(16, CALIBRATION)
    assert failure.value.fate == "out_of_time"
    assert waited == sorted(waited)
    assert not running("sleep 86397", mark)
    assert not running("fake_contender", mark)


def test_the_end_of_the_optimisation_is_the_end_of_its_contenders(start, mark):
    contender = start("compiles")
    place = contender._place
    question = Make(place=place, max_rows=1, calibration=[to_wire(each) for each in CALIBRATION])
    contender._connection.sendall(encode(question))
    deadline = time.monotonic() + 60
    while not running("sleep 86397", mark):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    contender._connection.close()  # as the kernel does when the process is killed
    contender._process.wait(10)
    assert not running("sleep 86397", mark)
    assert not running("fake_contender", mark)
