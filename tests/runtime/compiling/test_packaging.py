"""An artifact holds what serving needs, and is whole once it has a manifest."""

from pathlib import Path

import pytest

from runtime.compiling.packaging import (
    ArtifactError,
    add_directory,
    add_program,
    read_manifest,
    read_receipt,
    write_manifest,
)
from runtime.protocol import BuildReceipt, Check, Manifest, Schema, TensorSpec

MANIFEST = Manifest(
    kind="tensor",
    format="pt2",
    num_parameters=3,
    weight_bytes=12,
    schema=Schema(
        inputs=[TensorSpec(name="x", dtype="float32", shape=[None, 2], max_shape=[None, 2])],
        outputs=[TensorSpec(name="output", dtype="float32", shape=[None])],
        is_batched=True,
    ),
)
RECEIPT = BuildReceipt(
    verdict="equal",
    checks=[Check(name="repeat", is_equal=True, detail="bit for bit", error=None)],
    candidates=[],
    phase_seconds={"unpack": 0.1},
    torch_version="2.13.0",
    device="cpu",
)


def test_manifest_and_receipt_survive_the_round_trip(tmp_path: Path):
    write_manifest(tmp_path, MANIFEST, RECEIPT)
    assert read_manifest(tmp_path) == MANIFEST
    assert read_receipt(tmp_path) == RECEIPT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program.json", "receipt.json"]


def test_only_served_files_are_taken(tmp_path: Path):
    source, artifact = tmp_path / "model", tmp_path / "artifact"
    (source / "onnx").mkdir(parents=True)
    artifact.mkdir()
    kept = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    kept += ["tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
    left = ["modeling.py", "pytorch_model.bin", "README.md", "libop.so", "training_args.bin"]
    for name in kept + left:
        (source / name).write_text(name)
    assert sorted(add_directory(source, artifact)) == sorted([*left, "onnx"])
    assert sorted(path.name for path in artifact.iterdir()) == sorted(kept)


def test_the_upload_of_a_program_stays_where_it_is(tmp_path: Path):
    upload = tmp_path / "upload"
    upload.write_bytes(b"program")
    add_program(upload, tmp_path)
    assert (tmp_path / "program.pt2").read_bytes() == upload.read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"kind": "other"}', b"[1"])
def test_a_directory_without_a_valid_manifest_is_no_artifact(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "program.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"program\.json"):
        read_manifest(tmp_path)
