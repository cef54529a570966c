"""An embedder's forms are judged as those of a tensor program, by real processes."""

from pathlib import Path

import msgspec
import pytest
import torch

from runtime.building.optimise import optimise
from runtime.building.reporter import OPTIMISE_STARTS, Reporter
from runtime.compiling.forms import FORMS, check_witness, form_directory, load_form
from runtime.compiling.packaging import read_manifest, write_manifest
from runtime.importing.embedder import load_embedder
from runtime.protocol import Manifest, Optimise
from tests.runtime.building.test_optimise import Listener
from tests.runtime.embedders import save_embedder
from tests.runtime.peer import RECEIPT


@pytest.mark.slow
def test_an_embedder_is_optimised_and_stays_an_embedder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.setattr("runtime.compiling.rounds.LOOKS", (12, 24))
    monkeypatch.setattr("runtime.compiling.rounds.TURN_SECONDS", 0.005)
    known = [form for form in FORMS if form.name in ("eager", "onnxruntime")]
    monkeypatch.setattr("runtime.building.optimise.forms_for", lambda *_: known)
    (tmp_path / "artifact").mkdir()
    artifact_dir = save_embedder(tmp_path / "artifact")
    info = msgspec.structs.replace(load_embedder(artifact_dir).info, batching="padded")
    before = Manifest(
        kind="embedder", format="huggingface", num_parameters=1, weight_bytes=4, embedder=info
    )
    write_manifest(artifact_dir, before, RECEIPT)
    output_dir = tmp_path / "output"
    output_dir.mkdir()
    request = Optimise(artifact_dir=str(artifact_dir), output_dir=str(output_dir), num_threads=1)
    listener = Listener()
    threads = torch.get_num_threads()
    try:
        optimised = optimise(request, Reporter(listener.connection, OPTIMISE_STARTS), "for tests")
    finally:
        listener.close()
        torch.set_num_threads(threads)
    reports = {report.name: report for report in optimised.receipt.candidates}
    assert set(reports["onnxruntime"].p50_ms) == {1, 8, 16}, reports["onnxruntime"].reason
    assert reports["onnxruntime"].error is not None
    assert reports["onnxruntime"].error <= 1.0
    assert optimised.manifest.form == "onnxruntime"  # several times faster on a model this small
    assert read_manifest(output_dir) == optimised.manifest
    kept = {"form": before.form, "environment": before.environment}
    assert msgspec.structs.replace(optimised.manifest, **kept) == before
    directory = form_directory(output_dir, "onnxruntime")
    check_witness(load_form("onnxruntime", None, directory, device="cpu", num_threads=1), directory)
    assert (output_dir / "model.safetensors").is_file()
