"""Real workers, in the serve sandbox, on artifacts whose build chose a form."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from runtime.compiling.forms import FORMS, environment, form_directory, make_form
from runtime.compiling.packaging import (
    PROGRAM_NAME,
    read_manifest,
    read_receipt,
    write_manifest,
)
from runtime.importing.exported import load_exported
from runtime.protocol import Predict, Predicted
from tests.runtime.peer import WorkerProcess, make_tensor_artifact, tensor

Launch = Callable[[Path], WorkerProcess]
NUM_THREADS = 1  # as `WorkerProcess` serves


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started: list[WorkerProcess] = []

    def start(artifact_dir: Path) -> WorkerProcess:
        directory = tmp_path / f"worker{len(started)}"
        directory.mkdir()
        started.append(WorkerProcess(directory))
        started[-1].serve(artifact_dir)
        return started[-1]

    yield start
    for worker in started:
        worker.stop()


def optimise(artifact_dir: Path, name: str) -> Path:
    """What an optimisation leaves: a form in the artifact, and the manifest that names it."""
    make_tensor_artifact(artifact_dir)
    directory = form_directory(artifact_dir, name)
    directory.mkdir(parents=True)
    make_form(
        next(form for form in FORMS if form.name == name),
        load_exported(artifact_dir / PROGRAM_NAME),
        directory,
        max_rows=8,
        calibration=[[torch.rand(2, 1, 8, 8)]],
        num_threads=NUM_THREADS,
    )
    change_manifest(artifact_dir, form=name, environment=environment("cpu", NUM_THREADS))
    return artifact_dir


def change_manifest(artifact_dir: Path, **changes: str) -> None:
    manifest = msgspec.structs.replace(read_manifest(artifact_dir), **changes)
    write_manifest(artifact_dir, manifest, read_receipt(artifact_dir))


def check_serves(worker: WorkerProcess, artifact_dir: Path, form: str) -> None:
    """`form` is in use, and answers as the program does, at one row and at several."""
    assert worker.ready is not None
    assert worker.ready.manifest.form == form, worker.log
    program = load_exported(artifact_dir / PROGRAM_NAME)
    for rows in (1, 5):
        image = torch.rand(rows, 1, 8, 8)
        worker.peer.send(Predict(request_id=str(rows), inputs=[tensor("image", image)]))
        answer = worker.peer.receive_until(Predicted)
        actual = torch.frombuffer(bytearray(answer.outputs[0].data), dtype=torch.float32)
        torch.testing.assert_close(
            actual.reshape(rows, 10), program.run([image])[0], rtol=0, atol=1e-5
        )


@pytest.fixture(scope="module")
def onnx_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return optimise(tmp_path_factory.mktemp("onnx") / "artifact", "onnxruntime")


def test_a_worker_serves_the_onnx_runtime_form(onnx_artifact: Path, launch: Launch) -> None:
    check_serves(launch(onnx_artifact), onnx_artifact, "onnxruntime")


@pytest.mark.compiler
def test_a_worker_serves_the_aot_inductor_form(tmp_path: Path, launch: Launch) -> None:
    artifact_dir = optimise(tmp_path / "artifact", "aot_inductor")
    check_serves(launch(artifact_dir), artifact_dir, "aot_inductor")


def test_eager_serves_where_the_form_was_made_elsewhere(
    onnx_artifact: Path, tmp_path: Path, launch: Launch
) -> None:
    artifact_dir = shutil.copytree(onnx_artifact, tmp_path / "artifact")
    change_manifest(artifact_dir, environment="another machine")
    worker = launch(artifact_dir)
    check_serves(worker, artifact_dir, "eager")
    assert "serving eager instead of onnxruntime. It was made for 'another machine'" in worker.log


def test_eager_serves_where_the_form_is_damaged_or_answers_otherwise(
    onnx_artifact: Path, tmp_path: Path, launch: Launch
) -> None:
    damaged = shutil.copytree(onnx_artifact, tmp_path / "damaged")
    (form_directory(damaged, "onnxruntime") / "model.onnx").write_bytes(b"no graph")
    worker = launch(damaged)
    check_serves(worker, damaged, "eager")
    assert "onnxruntime cannot be loaded" in worker.log
    other = shutil.copytree(onnx_artifact, tmp_path / "other")
    weights = form_directory(other, "onnxruntime") / "model.weights"
    values = bytearray(weights.read_bytes())
    values[1024:2048] = bytes(1024)
    weights.write_bytes(values)
    worker = launch(other)
    check_serves(worker, other, "eager")
    assert "other answers than it did" in worker.log
