"""Embedders as tensor programs: what they compute as such, and served in a form."""

from pathlib import Path

import msgspec
import pytest
import torch

from runtime.building.optimise import max_rows_of
from runtime.compiling.embedder_program import EmbedderProgram, load_embedder_program
from runtime.compiling.form_embedder import embed_by
from runtime.compiling.forms import (
    FORMS,
    environment,
    form_directory,
    forms_for,
    load_form,
    make_form,
)
from runtime.compiling.packaging import write_manifest
from runtime.importing.embedder import load_embedder
from runtime.importing.program import ImportFailure
from runtime.protocol import Embed, Embedded, Manifest, Prepared, Start
from runtime.proving.inputs import find_inputs
from tests.runtime.embedders import FAMILIES, VOCAB_SIZE, qwen3, save_embedder
from tests.runtime.peer import RECEIPT, WorkerProcess

TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 7]]


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
def test_the_program_is_the_embedder(family: str, tmp_path: Path) -> None:
    make, _ = FAMILIES[family]
    torch.manual_seed(0)
    make().eval().save_pretrained(tmp_path)
    embedder = load_embedder(tmp_path)
    embedder.info = msgspec.structs.replace(embedder.info, batching="padded")
    program = EmbedderProgram(embedder)
    assert program.schema.is_batched
    ids, _ = program.schema.inputs
    assert (ids.maximum, ids.padded_axis) == (VOCAB_SIZE - 1, 1)
    makers = find_inputs(program)
    assert len(makers) == 3
    for maker in makers:
        inputs = maker.make(3)
        traced = program.call(program.module, inputs)[0]
        torch.testing.assert_close(traced, program.run(inputs)[0], rtol=0, atol=1e-6)
    exact = program.run_float64([inputs])
    assert exact is not None
    torch.testing.assert_close(exact[0][0].float(), program.run(inputs)[0], rtol=0, atol=1e-5)
    assert "onnxruntime" in [form.name for form in forms_for(program, "cpu")]


def test_texts_that_share_no_run_are_measured_one_at_a_time(tmp_path: Path) -> None:
    embedder = load_embedder(save_embedder(tmp_path))
    embedder.info = msgspec.structs.replace(embedder.info, batching="alone")
    program = EmbedderProgram(embedder)
    manifest = Manifest(
        kind="embedder",
        format="huggingface",
        num_parameters=1,
        weight_bytes=4,
        schema=program.schema,
    )
    assert max_rows_of(manifest) == 1


def test_a_model_that_cannot_be_traced_says_so(tmp_path: Path) -> None:
    """This one's mask is made for the very number of texts that it was traced with."""
    embedder = load_embedder(save_embedder(tmp_path, qwen3().eval(), pooling="lasttoken"))
    with pytest.raises(ImportFailure, match="Qwen3Model cannot be written as a graph"):
        EmbedderProgram(embedder)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder's artifact whose optimisation chose ONNX Runtime."""
    torch.manual_seed(0)
    directory = save_embedder(tmp_path_factory.mktemp("embedder"))
    info = msgspec.structs.replace(load_embedder(directory).info, batching="padded")
    manifest = Manifest(
        kind="embedder", format="huggingface", num_parameters=1, weight_bytes=4, embedder=info
    )
    program = load_embedder_program(directory, manifest, "cpu")
    target = form_directory(directory, "onnxruntime")
    target.mkdir(parents=True)
    make_form(
        next(form for form in FORMS if form.name == "onnxruntime"),
        program,
        target,
        max_rows=16,
        calibration=[find_inputs(program)[0].make(2)],
        num_threads=1,
    )
    chosen = msgspec.structs.replace(
        manifest, form="onnxruntime", environment=environment("cpu", 1)
    )
    write_manifest(directory, chosen, RECEIPT)
    return directory


def test_a_form_gives_the_vectors_of_the_embedder(artifact: Path) -> None:
    embedder = load_embedder(artifact)
    form = form_directory(artifact, "onnxruntime")
    run = load_form("onnxruntime", None, form, device="cpu", num_threads=1)
    embed = embed_by(run, artifact, embedder.info)
    long = torch.randint(VOCAB_SIZE, (embedder.info.max_tokens,)).tolist()
    for texts in ([[5]], TEXTS, [*TEXTS, long]):
        torch.testing.assert_close(embed(texts), embedder.embed(texts), rtol=0, atol=1e-5)


def test_a_worker_serves_the_form(artifact: Path, tmp_path: Path) -> None:
    worker = WorkerProcess(tmp_path)
    try:
        ready = worker.serve(artifact)
        assert ready.manifest.form == "onnxruntime", worker.log
        worker.peer.send(Embed(request_id="1", token_ids=TEXTS))
        worker.peer.receive_until(Prepared)
        worker.peer.send(Start(request_id="1"))
        answer = worker.peer.receive_until(Embedded)
    finally:
        worker.stop()
    found = torch.frombuffer(bytearray(answer.data), dtype=torch.float32)
    found = found.reshape(len(TEXTS), answer.dimensions)
    embedder = load_embedder(artifact)
    torch.testing.assert_close(found, embedder.embed(TEXTS), rtol=0, atol=1e-5)
