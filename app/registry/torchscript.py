"""The members of a TorchScript archive, as `torch.jit.save` writes it: code, weights, no more.

The code is not read here: it is a program, and runs in the sandbox alone.
"""

import zipfile

from app.core.errors import Unprocessable
from app.registry import refusals
from app.registry.archives import Totals, check_name


def is_torchscript(names: list[str]) -> bool:
    """Whether member names are those of a scripted or traced module."""
    parts = [name.partition("/") for name in names]
    roots = {root for root, _, rest in parts if rest == "data.pkl" or rest.endswith("/data.pkl")}
    return any(root in roots and rest.startswith("code/") for root, _, rest in parts)


def check_torchscript(archive: zipfile.ZipFile, totals: Totals) -> None:
    """Raises `Unprocessable` unless the archive, whose directory was checked, is one module
    without compiled code."""
    seen: set[str] = set()
    for info in archive.infolist():
        check_name(info.orig_filename)
        totals.add(info.file_size)
        if info.filename.endswith(refusals.NATIVE_SUFFIXES):
            raise refusals.native_code(f"{info.filename[:120]!r} in the archive")
        if info.filename in seen:
            raise Unprocessable(
                f"{info.filename[:200]!r} is in the archive twice.", code="archive_duplicate"
            )
        seen.add(info.filename)
    if len({name.partition("/")[0] for name in seen}) != 1:
        raise Unprocessable(
            "The archive holds more than one TorchScript module. Save one with torch.jit.save.",
            code="several_programs",
        )
