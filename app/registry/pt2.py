"""The members of a `.pt2` archive: one graph with plain tensors, nothing else.

The graph itself is not parsed here; the build does that in its sandbox.
"""

import re
import zipfile

import msgspec

from app.core.errors import Unprocessable
from app.registry import refusals
from app.registry.archives import check_name, damaged, reading
from app.registry.safetensors import MAX_HEADER_BYTES, MAX_TENSORS

_TABLE = re.compile(r"data/(weights|constants)/[^/]+_config\.json")
_OBJECT = re.compile(r"data/constants/(custom_obj|opaque_obj|script_obj)")
_PLAIN = re.compile(r"(weight|tensor)_\d+")


class _Payload(msgspec.Struct):
    path_name: str
    use_pickle: bool


class _Table(msgspec.Struct):
    config: dict[str, _Payload]


def is_pt2(names: list[str]) -> bool:
    """Whether member names are those of an exported program or a compiled package."""
    return any(
        name.partition("/")[2] == "archive_format"
        or name.partition("/")[2].startswith(("models/", "data/aotinductor/"))
        for name in names
    )


def check_pt2(archive: zipfile.ZipFile) -> None:
    """Raises `Unprocessable` unless the archive, whose directory was checked, is one graph with
    plain tensor weights."""
    infos = archive.infolist()
    seen: set[str] = set()
    for info in infos:
        check_name(info.orig_filename)
        if info.compress_type != zipfile.ZIP_STORED:
            raise Unprocessable(
                f"The member {info.filename[:200]!r} is compressed; torch.export.save stores its "
                "members. Upload the file as it was saved.",
                code="pt2_compressed",
            )
        if info.filename in seen:
            raise Unprocessable(
                f"{info.filename[:200]!r} is in the archive twice.", code="archive_duplicate"
            )
        seen.add(info.filename)
    _check_kinds([info.filename.partition("/")[2] for info in infos])
    for info in infos:
        name = info.filename.partition("/")[2]
        if _TABLE.fullmatch(name):
            _check_table(archive, info, name)


def _check_kinds(names: list[str]) -> None:
    if any(
        name.startswith("data/aotinductor/") or name.endswith(refusals.NATIVE_SUFFIXES)
        for name in names
    ):
        raise refusals.native_code("The archive's compiled part (AOTInductor)")
    if [name for name in names if name.startswith("models/")] != ["models/model.json"]:
        raise Unprocessable(
            "The archive must hold exactly one exported program named 'model', as "
            f"torch.export.save writes it:\n{refusals.EXPORT_LINES}",
            code="pt2_models",
        )
    for name in names:
        is_payload = name.startswith(("data/weights/", "data/constants/"))
        if is_payload and name.endswith((".pt", ".pkl")):
            raise refusals.pickled_weights(name)
        if _OBJECT.match(name):
            raise _custom_objects()


def _check_table(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> None:
    if info.file_size > MAX_HEADER_BYTES:
        raise damaged(f"{name} is larger than any table of tensors should be")
    with reading(), archive.open(info) as file:
        data = file.read(info.file_size)
    try:
        table = msgspec.json.decode(data, type=_Table)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise damaged(f"{name} is not a table of tensors: {error}") from error
    if len(table.config) > MAX_TENSORS:
        raise damaged(f"{name} lists more than {MAX_TENSORS:,} tensors")
    for tensor_name, payload in table.config.items():
        if payload.use_pickle:
            raise refusals.pickled_weights(tensor_name)
        if not _PLAIN.fullmatch(payload.path_name):
            raise _custom_objects()


def _custom_objects() -> Unprocessable:
    return Unprocessable(
        "The program holds custom objects (torch.classes or opaque constants), which are stored as "
        "pickles. Use plain tensors, and export the model again.",
        code="custom_objects",
    )
