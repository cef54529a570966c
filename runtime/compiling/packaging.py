"""The artifact directory: the files a worker needs to serve a version, and nothing else.

program.json   the manifest
receipt.json   what the build tried and found
program.pt2    a tensor program or a decoder's graph, or *.safetensors of a decoder
program.onnx   a tensor program of that format, its large weights in program.data/
forms/<name>/  of a tensor program: the faster form that was chosen, as `forms` wrote it
program.plan   of a paged graph: what the build derived from program.pt2 (see `plans`)
config.json, tokenizer.json, ...   of a decoder, as far as it has them
"""

import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import msgspec

from runtime.protocol import BuildReceipt, Manifest

T = TypeVar("T")

MANIFEST_NAME = "program.json"
RECEIPT_NAME = "receipt.json"
PROGRAM_NAME = "program.pt2"
ONNX_NAME = "program.onnx"
MAX_MANIFEST_BYTES = 16 * 1024**2

# What of a Hugging Face directory is served; everything else stays behind.
SERVED_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "LICENSE*",
)


# Those of them that a graph's decoder needs beside it.
TEXT_FILES = tuple(name for name in SERVED_FILES if "safetensors" not in name)


class ArtifactError(Exception):
    """The directory is not an artifact that a build wrote."""


def add_program(source: Path, artifact_dir: Path) -> None:
    """Copy a `.pt2` into the artifact. The upload itself stays where it is."""
    shutil.copyfile(source, artifact_dir / PROGRAM_NAME)


def add_onnx(source: Path, locations: Sequence[str], artifact_dir: Path) -> None:
    """Copy an ONNX file into the artifact, and move there what lies in files of its own, which
    `locations` names from its directory."""
    shutil.copyfile(source, artifact_dir / ONNX_NAME)
    for location in locations:
        target = artifact_dir / location
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source.parent / location, target)


def add_text(source: Path, artifact_dir: Path) -> set[str]:
    """Copy the small files beside a model's weights: tokenizer, templates, configurations.
    Returns their names."""
    names = {
        path.name
        for path in source.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in TEXT_FILES)
    }
    for name in names:
        shutil.copyfile(source / name, artifact_dir / name)
    return names


def add_directory(source: Path, artifact_dir: Path) -> list[str]:
    """Move the served files of an unpacked Hugging Face directory into the artifact. Returns the
    names of those left behind."""
    left = []
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in SERVED_FILES):
            shutil.move(path, artifact_dir / path.name)
        else:
            left.append(path.name)
    return left


def add_module_directories(source: Path, artifact_dir: Path, modules: list[Path]) -> None:
    """Move the served files of a sentence-transformers directory's `modules`, which lie in
    `source`, to where they lay."""
    for module in modules:
        target = artifact_dir / module.relative_to(source)
        target.mkdir(parents=True, exist_ok=True)
        if module.is_dir():  # a module without settings has none
            add_directory(module, target)


def write_manifest(artifact_dir: Path, manifest: Manifest, receipt: BuildReceipt) -> None:
    """Last of all, so that a directory with a manifest is a whole artifact."""
    _write(artifact_dir / RECEIPT_NAME, msgspec.json.encode(receipt))
    _write(artifact_dir / MANIFEST_NAME, msgspec.json.encode(manifest))


def read_manifest(artifact_dir: Path) -> Manifest:
    """Raises `ArtifactError`."""
    return _read(artifact_dir / MANIFEST_NAME, Manifest)


def read_receipt(artifact_dir: Path) -> BuildReceipt:
    """Raises `ArtifactError`."""
    return _read(artifact_dir / RECEIPT_NAME, BuildReceipt)


def _read(path: Path, kind: type[T]) -> T:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_MANIFEST_BYTES), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError(f"{path.name} cannot be read: {error}") from error


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(msgspec.json.format(data))
    os.replace(partial, path)
