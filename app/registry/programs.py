"""Which file of an upload is the model, where it is a program: a `.pt2`, ONNX or TorchScript.

Told apart by content; a name only decides between several, and for what is compressed. What each
may hold is the business of `pt2.py`, `onnx.py` and `torchscript.py`.
"""

from typing import BinaryIO, Literal

import msgspec

from app.core.errors import Unprocessable
from app.registry import refusals
from app.registry.archives import Totals, reading
from app.registry.onnx import check_onnx
from app.registry.onnx_header import OnnxHeader, looks_like_onnx
from app.registry.protobuf import Budget
from app.registry.pt2 import check_pt2, is_pt2
from app.registry.torchscript import check_torchscript, is_torchscript
from app.registry.zips import open_zip

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
MAX_CANDIDATES = 16  # of an archive, that are looked into
TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript", ".jit", ".ptl")
NAMED_SUFFIXES = (".pt2", ".onnx")
ALLOWED_BESIDE = (".npz", ".zip", ".bin")  # zips too, but never programs

ProgramKind = Literal["pt2", "onnx", "torchscript"]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A file that may be a program. `data_at` is where it lies in the upload, if as it is."""

    name: str
    size_bytes: int
    data_at: int | None
    head: bytes


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """The one model of an upload. `header` is of an ONNX file that could be looked into."""

    name: str
    kind: ProgramKind
    header: OnnxHeader | None = None
    is_looked_into: bool = True


def may_be_program(name: str, head: bytes) -> bool:
    """Whether a file of an archive is worth looking into."""
    if name.endswith(NAMED_SUFFIXES):
        return True
    is_zip = head.startswith(ZIP_MAGIC) and not name.endswith(ALLOWED_BESIDE)
    return is_zip or looks_like_onnx(head)


def find_program(
    file: BinaryIO, candidates: list[Candidate], totals: Totals, *, has_model: bool
) -> Program | None:
    """The program among an archive's files; None where there is none. With `has_model`, there is
    a Hugging Face directory too, and only a `.pt2` comes before it. Raises `Unprocessable`."""
    if has_model:
        candidates = [each for each in candidates if each.name.endswith(".pt2")]
    named = [each.name for each in candidates if each.name.endswith(NAMED_SUFFIXES)]
    if len(named) > 1 or len(candidates) > MAX_CANDIDATES:
        raise _several(named or [each.name for each in candidates])
    budget = Budget()
    found: list[Program] = []
    refused: list[Unprocessable] = []
    for candidate in candidates:
        try:
            program = recognise(file, candidate, totals, budget)
        except Unprocessable as refusal:
            if candidate.name.endswith(NAMED_SUFFIXES):
                raise
            refused.append(refusal)
            continue
        if program is not None:
            found.append(program)
    chosen = [each for each in found if each.name in named] or found
    if len(chosen) > 1:
        raise _several([each.name for each in chosen])
    if not chosen and refused and not has_model:
        raise refused[0]
    return chosen[0] if chosen else None


def recognise(
    file: BinaryIO, candidate: Candidate, totals: Totals, budget: Budget
) -> Program | None:
    """What a file is; None for none of ours. Raises `Unprocessable` for a program that cannot be
    served, and for what torch wrote that is none."""
    name, start, size_bytes = candidate.name, candidate.data_at, candidate.size_bytes
    if start is None:
        return _by_name(candidate)
    if candidate.head.startswith(ZIP_MAGIC):
        archive = open_zip(file, start, size_bytes)
        names = archive.namelist()
        if is_pt2(names):
            check_pt2(archive)
            return Program(name=name, kind="pt2")
        if is_torchscript(names):
            check_torchscript(archive, Totals(totals.packed_bytes))
            return Program(name=name, kind="torchscript")
        found = refusals.describe_torch_zip(names)
        if isinstance(found, Unprocessable):
            raise found
        if found is not None:
            with reading(), archive.open(found) as pickle:
                raise refusals.describe_pickle(pickle.read(refusals.MAX_PICKLE_BYTES))
    elif looks_like_onnx(candidate.head):
        return Program(name=name, kind="onnx", header=check_onnx(file, start, size_bytes, budget))
    if name.endswith(NAMED_SUFFIXES):
        raise refusals.describe_file(candidate.head, size_bytes)
    return None


def _by_name(candidate: Candidate) -> Program | None:
    """Of a compressed file only the first bytes are known, and the build tells for certain."""
    name, is_zip = candidate.name, candidate.head.startswith(ZIP_MAGIC)
    kind: ProgramKind | None = None
    if name.endswith(".pt2"):
        kind = "pt2"
    elif name.endswith(".onnx") or looks_like_onnx(candidate.head):
        kind = "onnx"
    elif is_zip and name.endswith(TORCHSCRIPT_SUFFIXES):
        kind = "torchscript"
    return Program(name=name, kind=kind, is_looked_into=False) if kind else None


def _several(names: list[str]) -> Unprocessable:
    shown = ", ".join(sorted(names)[:4])
    return Unprocessable(
        f"The archive holds {len(names)} programs ({shown[:200]}); upload one per model.",
        code="several_programs",
    )
