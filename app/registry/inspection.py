"""Decides, from headers alone, whether an upload can be built, and says why not.

Runs in the control plane, so it unpacks, imports and executes nothing. What only loading can
tell, the sandboxed build finds out; it also makes these checks again while it unpacks.
"""

import zipfile
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from app.core.errors import Unprocessable
from app.registry import refusals
from app.registry.archives import Member, Totals, reading
from app.registry.huggingface import HEAD_BYTES, Directory
from app.registry.pt2 import check_pt2, is_pt2
from app.registry.tars import GzipStream, PlainStream, tar_members
from app.registry.zips import open_zip, zip_members

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
GZIP_MAGIC = b"\x1f\x8b"
TAR_MAGIC_AT = 257
TAR_MAGIC = b"ustar"


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """`notes` are for the model's owner: what was found odd, but is no reason to refuse."""

    kind: Literal["huggingface", "pt2"]
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


def _inspect_zip(file: BinaryIO, totals: Totals) -> Inspection:
    archive = open_zip(file, 0, totals.packed_bytes)
    if is_pt2(archive.namelist()):
        check_pt2(archive)
        sizes = [info.file_size for info in archive.infolist()]
        return Inspection(kind="pt2", num_members=len(sizes), unpacked_bytes=sum(sizes))
    _refuse_torch_zip(archive)
    directory = Directory()
    for member in zip_members(archive, totals):
        _take(directory, member, file)
    return _conclude(directory, totals)


def _inspect_tar(file: BinaryIO, stream: PlainStream | GzipStream, totals: Totals) -> Inspection:
    directory = Directory()
    for member in tar_members(stream, totals):
        _take(directory, member, file)
    return _conclude(directory, totals)


def _refuse_torch_zip(archive: zipfile.ZipFile) -> None:
    found = refusals.describe_torch_zip(archive.namelist())
    if isinstance(found, Unprocessable):
        raise found
    if found is not None:
        with reading(), archive.open(found) as file:
            data = file.read(refusals.MAX_PICKLE_BYTES)
        raise refusals.describe_pickle(data)


def _take(directory: Directory, member: Member, file: BinaryIO) -> None:
    directory.take(member)
    if not member.name.endswith(".pt2"):
        return
    if member.data_at is None:
        directory.notes.append(f"{member.name} is compressed and is looked into by the build.")
        return
    program = open_zip(file, member.data_at, member.size_bytes)
    if not is_pt2(program.namelist()):
        _refuse_torch_zip(program)
        raise refusals.describe_file(b"", 0)
    check_pt2(program)


def _conclude(directory: Directory, totals: Totals) -> Inspection:
    kind = directory.conclude(is_whole=not totals.is_cut)
    notes = list(directory.notes)
    if totals.is_cut:
        notes.append("The compressed archive is large; its end is looked into by the build.")
    return Inspection(
        kind=kind,
        num_members=totals.num_members,
        unpacked_bytes=totals.unpacked_bytes,
        notes=notes,
    )
