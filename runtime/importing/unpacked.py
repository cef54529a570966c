"""Tells what the files of an upload are: a Hugging Face directory, or a program and what came
with it.

By content; names only decide between several. What a program's file may hold is the business of
its format. Executes nothing.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Literal

import msgspec

from runtime.importing.formats import (
    describe_foreign_zip,
    describe_unknown,
    is_onnx,
    is_torchscript,
)
from runtime.importing.program import ImportFailure
from runtime.importing.pt2 import check_pt2, is_pt2

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_DIRECTORY = "tokenizer"  # what `tapeout push --tokenizer` packs beside a program
EXAMPLES_NAME = "examples.npz"
HEAD_BYTES = 512
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
NAMED_SUFFIXES = (".pt2", ".onnx")
MAX_CANDIDATES = 16  # of an archive, that are looked into
ALLOWED_BESIDE = (".npz", ".zip", ".bin")  # zips too, but never programs

# What the standard library raises for zips that are cut short, altered or too exotic.
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)

ProgramKind = Literal["pt2", "onnx", "torchscript"]
Kind = Literal["huggingface", "pt2", "onnx", "torchscript"]
TITLES = {
    "huggingface": "a Hugging Face directory",
    "pt2": "an exported program (.pt2)",
    "onnx": "an ONNX model",
    "torchscript": "a TorchScript program",
}


class UnpackedUpload(msgspec.Struct, frozen=True, kw_only=True):
    """`path` is the Hugging Face directory, or the program's file. `beside` are the names of the
    files that came with a program and are no part of it; a tokenizer among them is in
    `text_directory`, and `examples` is the `examples.npz` of inputs by name."""

    kind: Kind
    path: Path
    beside: list[str] = []
    text_directory: Path | None = None
    examples: Path | None = None


def program_kind(archive: zipfile.ZipFile, path: Path) -> ProgramKind | None:
    """What program the zip at `path` is, if it is one. Raises `ImportFailure` for one that must
    not be loaded."""
    if is_pt2(archive):
        check_pt2(archive, path.stat().st_size)
        return "pt2"
    return "torchscript" if is_torchscript(archive) else None


def recognise(directory: Path) -> UnpackedUpload:
    """What the files in `directory`, which were just extracted, are together. Raises
    `ImportFailure`."""
    root = directory
    while True:
        entries = [entry for entry in root.iterdir() if entry.name != "__MACOSX"]
        if len(entries) != 1 or not entries[0].is_dir():
            break
        root = entries[0]
    names = sorted(entry.name for entry in entries)
    found = _find_program(sorted(entry for entry in entries if entry.is_file()), names)
    if found is None:
        _check_huggingface(names)
        return UnpackedUpload(kind="huggingface", path=root)
    kind, path = found
    examples = root / EXAMPLES_NAME
    return UnpackedUpload(
        kind=kind,
        path=path,
        beside=[name for name in names if name not in (path.name, EXAMPLES_NAME)],
        text_directory=_text_directory(root),
        examples=examples if examples.is_file() else None,
    )


def damaged(error: Exception) -> ImportFailure:
    return ImportFailure(
        "archive_damaged",
        f"The archive is damaged ({str(error)[:200] or type(error).__name__}). Pack and upload it "
        "again.",
    )


# --- programs ---------------------------------------------------------------------------


def _find_program(files: list[Path], names: list[str]) -> tuple[ProgramKind, Path] | None:
    """The one program among `files`. A Hugging Face directory comes before all but a `.pt2`."""
    has_weights = any(name.endswith(".safetensors") for name in names)
    has_model = ("config.json" in names and has_weights) or "modules.json" in names
    heads = {path: _head(path) for path in files}
    candidates = [path for path in files if _may_be_program(path, heads[path])]
    if has_model:
        candidates = [path for path in candidates if path.suffix == ".pt2"]
    named = [path for path in candidates if path.suffix in NAMED_SUFFIXES]
    if len(named) > 1 or len(candidates) > MAX_CANDIDATES:
        raise _several(named or candidates)
    found: list[tuple[ProgramKind, Path]] = []
    refused: list[ImportFailure] = []
    for path in candidates:
        try:
            kind = _kind(path, heads[path])
        except ImportFailure as failure:
            if path.suffix in NAMED_SUFFIXES:
                raise
            refused.append(failure)
            continue
        if kind:
            found.append((kind, path))
    chosen = [each for each in found if each[1] in named] or found
    if len(chosen) > 1:
        raise _several([path for _, path in chosen])
    if not chosen and refused and "config.json" not in names:
        raise refused[0]
    return chosen[0] if chosen else None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _may_be_program(path: Path, head: bytes) -> bool:
    if path.suffix in NAMED_SUFFIXES:
        return True
    is_zip = head.startswith(ZIP_MAGIC) and path.suffix not in ALLOWED_BESIDE
    return is_zip or is_onnx(head)


def _kind(path: Path, head: bytes) -> ProgramKind | None:
    if is_onnx(head):
        return "onnx"
    if not head.startswith(ZIP_MAGIC) and path.suffix != ".pt2":
        if path.suffix in NAMED_SUFFIXES:
            raise describe_unknown(path, head)
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            kind = program_kind(archive, path)
            if kind is None and (failure := describe_foreign_zip(archive)):
                raise failure
    except ZIP_DAMAGE as error:
        raise damaged(error) from error
    if kind is None and path.suffix in NAMED_SUFFIXES:
        raise describe_unknown(path, b"")
    return kind


def _several(paths: list[Path]) -> ImportFailure:
    shown = ", ".join(path.name for path in paths[:4])
    return ImportFailure(
        "several_programs",
        f"The archive holds {len(paths)} programs ({shown[:200]}); upload one per model.",
    )


# --- what is beside them ----------------------------------------------------------------


def _text_directory(root: Path) -> Path | None:
    """Where the tokenizer beside a program lies: next to it, or in the one directory that has
    it."""
    if (root / TOKENIZER_NAME).is_file():
        return root
    found = [path.parent for path in root.glob(f"*/{TOKENIZER_NAME}") if path.is_file()]
    if len(found) > 1:
        names = ", ".join(sorted(path.name for path in found)[:5])
        raise ImportFailure(
            "several_tokenizers",
            f"The archive holds {len(found)} tokenizers beside the program ({names}); pack one.",
        )
    if not found and (root / TOKENIZER_DIRECTORY).is_dir():
        return root / TOKENIZER_DIRECTORY  # which says what it lacks
    return found[0] if found else None


def _check_huggingface(names: list[str]) -> None:
    """What is inside is the loader's to judge; this only tells a model from something else."""
    if "config.json" in names or "modules.json" in names:
        return
    if "adapter_config.json" in names:
        raise ImportFailure(
            "adapter",
            "This is an adapter (LoRA), not a whole model. Merge it and upload the result:\n"
            "    model = model.merge_and_unload()\n"
            '    model.save_pretrained("merged")',
        )
    listing = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    raise ImportFailure(
        "unknown_contents",
        "The archive holds neither a program (.pt2, ONNX or TorchScript) nor a Hugging Face "
        f"directory (config.json and *.safetensors). It holds: {listing or 'nothing'}.",
    )
