"""Decides, from headers alone, whether an upload can be built, and says why not.

Runs in the control plane, so it unpacks, imports and executes nothing. What only loading can
tell, the sandboxed build finds out; it also makes these checks again while it unpacks.
"""

from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from app.core.errors import Unprocessable
from app.registry import refusals
from app.registry.archives import Totals
from app.registry.huggingface import HEAD_BYTES, Directory
from app.registry.onnx import check_external
from app.registry.onnx_header import looks_like_onnx
from app.registry.programs import ZIP_MAGIC, Candidate, find_program, recognise
from app.registry.protobuf import Budget
from app.registry.pt2 import is_pt2
from app.registry.tars import GzipStream, PlainStream, tar_members
from app.registry.torchscript import is_torchscript
from app.registry.zips import open_zip, zip_members

GZIP_MAGIC = b"\x1f\x8b"
TAR_MAGIC_AT = 257
TAR_MAGIC = b"ustar"


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """`notes` are for the model's owner: what was found odd, but is no reason to refuse."""

    kind: Literal["huggingface", "pt2", "onnx", "torchscript"]
    num_members: int
    unpacked_bytes: int
    notes: list[str] = []


def inspect_upload(path: Path, filename: str) -> Inspection:
    """What the file at `path` is. Blocking: call it in a thread. Raises `Unprocessable` with the
    reason and, where there is one, the few lines that make a servable file."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        totals = Totals(path.stat().st_size)
        if not head:
            raise Unprocessable("The file is empty.", code="empty")
        if head.startswith(ZIP_MAGIC):
            return _inspect_zip(file, totals)
        if head.startswith(GZIP_MAGIC):
            _require_tar(GzipStream(file, totals).read(512), filename)
            return _inspect_tar(file, GzipStream(file, totals), totals)
        if _is_tar(head):
            stream = PlainStream(file, totals.packed_bytes)
            return _inspect_tar(file, stream, totals)
        if looks_like_onnx(head):
            return _inspect_program(file, filename, head, totals)
        file.seek(0)
        head = file.read(refusals.MAX_PICKLE_BYTES)
        raise refusals.describe_file(head, totals.packed_bytes)


def _is_tar(head: bytes) -> bool:
    return head[TAR_MAGIC_AT:].startswith(TAR_MAGIC)


def _require_tar(head: bytes, filename: str) -> None:
    if not _is_tar(head):
        raise Unprocessable(
            f"{filename[:100]} is a single compressed file, not an archive. Upload the model as it "
            f"is, or pack its directory:\n{refusals.PACK_LINES}",
            code="compression",
        )


# --- containers -------------------------------------------------------------------------


def _inspect_program(file: BinaryIO, filename: str, head: bytes, totals: Totals) -> Inspection:
    """A file that is one program, or nothing that can be served."""
    candidate = Candidate(name=filename, size_bytes=totals.packed_bytes, data_at=0, head=head)
    program = recognise(file, candidate, totals, Budget())
    if program is None:
        raise refusals.describe_file(b"", 0)
    if program.header is not None:
        check_external(program.header, {})
    return Inspection(kind=program.kind, num_members=1, unpacked_bytes=totals.packed_bytes)


def _inspect_zip(file: BinaryIO, totals: Totals) -> Inspection:
    archive = open_zip(file, 0, totals.packed_bytes)
    names = archive.namelist()
    if is_pt2(names) or is_torchscript(names) or refusals.describe_torch_zip(names) is not None:
        inspection = _inspect_program(file, "upload", ZIP_MAGIC[0], totals)
        sizes = [info.file_size for info in archive.infolist()]
        return msgspec.structs.replace(
            inspection, num_members=len(sizes), unpacked_bytes=sum(sizes)
        )
    directory = Directory()
    for member in zip_members(archive, totals):
        directory.take(member)
    return _conclude(directory, file, totals)


def _inspect_tar(file: BinaryIO, stream: PlainStream | GzipStream, totals: Totals) -> Inspection:
    directory = Directory()
    for member in tar_members(stream, totals):
        directory.take(member)
    return _conclude(directory, file, totals)


def _conclude(directory: Directory, file: BinaryIO, totals: Totals) -> Inspection:
    """What the archive's files are together."""
    is_whole = not totals.is_cut
    contents = directory.contents()
    program = find_program(file, contents.candidates, totals, has_model=contents.has_model)
    notes = directory.notes
    if program is None:
        directory.conclude(is_whole=is_whole)
    elif program.header is not None:
        check_external(program.header, contents.sizes, is_whole=is_whole)
    elif not program.is_looked_into:
        notes.append(f"{program.name} is compressed and is looked into by the build.")
    if not is_whole:
        notes.append("The compressed archive is large; its end is looked into by the build.")
    return Inspection(
        kind=program.kind if program else "huggingface",
        num_members=totals.num_members,
        unpacked_bytes=totals.unpacked_bytes,
        notes=notes,
    )
