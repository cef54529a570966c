"""Builds the archives that inspection tests feed: sound ones and hostile ones."""

import gzip
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()


def safetensors(header: dict[str, object] | None = None, data: bytes = bytes(16)) -> bytes:
    """One float32 tensor of four values, unless told otherwise."""
    if header is None:
        header = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def model_files(**changes: bytes | None) -> dict[str, bytes]:
    """The files of a small Hugging Face directory; a change of None leaves a file out. Names are
    given with `__` for a dot."""
    files: dict[str, bytes] = {
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors(),
    }
    for name, content in changes.items():
        name = name.replace("__", ".")
        if content is None:
            files.pop(name)
        else:
            files[name] = content
    return files


def write_tar(
    path: Path, files: dict[str, bytes], prefix: str = "", kind: int | None = None
) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if kind is None else kind) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_gz(path: Path, files: dict[str, bytes]) -> Path:
    plain = write_tar(path.with_suffix(".plain"), files)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


def write_zip(
    path: Path, files: dict[str, bytes], prefix: str = "", compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return path


def pt2_files(**changes: bytes | None) -> dict[str, bytes]:
    """The members of an exported program; keys of changes with `__` for a slash."""
    payload = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": None}
    files: dict[str, bytes] = {
        "archive_format": b"pt2",
        "models/model.json": b"{}",
        "data/weights/model_weights_config.json": json.dumps({"config": {"w": payload}}).encode(),
        "data/weights/weight_0": bytes(16),
    }
    for name, content in changes.items():
        if content is None:
            files.pop(name.replace("__", "/"))
        else:
            files[name.replace("__", "/")] = content
    return files


def write_deflated_zip(path: Path, files: dict[str, bytes], prefix: str = "") -> Path:
    return write_zip(path, files, prefix, zipfile.ZIP_DEFLATED)


def write_pt2(path: Path, files: dict[str, bytes] | None = None) -> Path:
    return write_zip(path, files or pt2_files(), "model/")
