"""ONNX files through real build and worker processes: from an upload to answers."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from runtime.compiling.packaging import read_manifest
from runtime.protocol import BuildFailed, Built, Predict, Predicted
from tests.runtime.importing.onnx_files import export_bundle, linear, save, with_external
from tests.runtime.peer import WorkerProcess, tensor
from tests.runtime.test_build import BuildProcess


@pytest.fixture
def build(tmp_path: Path) -> Iterator[BuildProcess]:
    (tmp_path / "build").mkdir()
    process = BuildProcess(tmp_path / "build")
    yield process
    if process.process.poll() is None:
        process.process.kill()
        process.process.wait()
    process.hang_up()


def predict(artifact: Path, directory: Path, name: str, values: torch.Tensor) -> np.ndarray:
    """What a worker of the artifact answers."""
    directory.mkdir()
    worker = WorkerProcess(directory)
    try:
        worker.serve(artifact)
        worker.peer.send(Predict(request_id="one", inputs=[tensor(name, values)]))
        (output,) = worker.peer.receive_until(Predicted).outputs
        return np.frombuffer(output.data, np.float32).reshape(output.shape)
    finally:
        worker.stop()


def test_a_bundle_is_built_and_served_as_it_is(build, tmp_path):
    path, data = export_bundle(tmp_path)
    with tarfile.open(build.upload_path, "w") as tar:
        tar.add(path, "mine/model.onnx")
        tar.add(data, "mine/model.onnx.data")
        tar.add(path, "mine/readme.md")
    progress, message = build.run()
    assert isinstance(message, Built), (message, build.log())
    assert any(each.detail == "found an ONNX model" for each in progress)
    manifest, receipt = message.manifest, message.receipt
    assert (manifest.kind, manifest.format, manifest.form) == ("tensor", "onnx", "eager")
    assert manifest.num_parameters == 1370
    assert manifest.schema is not None
    assert manifest.schema.is_batched
    assert receipt.verdict == "equal"
    assert all(check.is_equal for check in receipt.checks)
    (noise,) = [check for check in receipt.checks if check.name == "float64"]
    assert noise.error is not None, "the tolerance came from float64"
    assert "Not used: readme.md." in receipt.notes
    assert read_manifest(build.output_dir) == manifest
    names = sorted(
        path.relative_to(build.output_dir).as_posix()
        for path in build.output_dir.rglob("*")
        if path.is_file()
    )
    assert names == ["program.data/0", "program.json", "program.onnx", "receipt.json"]

    images = torch.rand(3, 1, 8, 8)
    session = onnxruntime.InferenceSession(tmp_path / "whole")
    (expected,) = session.run(None, {"image": images.numpy()})
    found = predict(build.output_dir, tmp_path / "worker", "image", images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_of_one_is_freed_and_said(build, tmp_path):
    save(build.upload_path, linear(1))
    _, message = build.run()
    assert isinstance(message, Built), (message, build.log())
    assert message.manifest.schema is not None
    assert message.manifest.schema.is_batched
    assert any("fixes the batch at 1" in note for note in message.receipt.notes)
    found = predict(build.output_dir, tmp_path / "worker", "x", torch.ones(5, 4))
    assert found.shape == (5, 3)


def test_a_hostile_location_ends_the_build_with_its_reason(build):
    model, _ = with_external(linear(), "/etc/passwd")
    save(build.upload_path, model)
    _, message = build.run()
    assert isinstance(message, BuildFailed)
    assert message.error.code == "external_data_missing"
    assert list(build.output_dir.iterdir()) == []
