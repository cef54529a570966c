"""What holds for every archive: names, totals, and how damage is reported.

The containers themselves are read in `zips.py` and `tars.py`, member by member under hard
limits; what a model's archive must hold is `inspection.py`'s.
"""

import struct
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager

import msgspec

from app.core.errors import Unprocessable

MAX_MEMBERS = 20_000
MAX_RATIO = 100  # unpacked bytes per uploaded byte
RATIO_ALLOWANCE_BYTES = 1024**2  # so that tiny text files cannot trip the ratio
MAX_UNPACKED_BYTES = 512 * 1024**3
MAX_DEPTH = 16
MAX_NAME_BYTES = 255


class Member(msgspec.Struct, frozen=True):
    """One regular file. `read(n)` gives up to `n` of its bytes, then the next, until the next
    member is taken. `data_at` is where it lies in the archive, if it lies there as it is."""

    name: str
    size_bytes: int
    data_at: int | None
    read: Callable[[int], bytes]


class Totals(msgspec.Struct):
    """What an archive adds up to, filled while its members are walked."""

    packed_bytes: int
    num_members: int = 0
    unpacked_bytes: int = 0
    is_cut: bool = False  # a compressed archive was not walked to its end

    def add(self, num_bytes: int) -> None:
        """Counts one member. Raises `Unprocessable` beyond a limit."""
        self.num_members += 1
        self.unpacked_bytes += num_bytes
        check_num_members(self.num_members)
        self.check(self.unpacked_bytes)

    def check(self, unpacked_bytes: int) -> None:
        if unpacked_bytes > MAX_RATIO * self.packed_bytes + RATIO_ALLOWANCE_BYTES:
            raise Unprocessable(
                f"The archive unpacks to more than {MAX_RATIO} times its size, which model files "
                "never do. Pack the model's files without padding.",
                code="archive_ratio",
            )
        if unpacked_bytes > MAX_UNPACKED_BYTES:
            raise Unprocessable(
                f"The archive unpacks to more than {MAX_UNPACKED_BYTES:,} bytes, the limit here.",
                code="archive_size",
            )


def check_num_members(num_members: int) -> None:
    if num_members > MAX_MEMBERS:
        raise Unprocessable(
            f"The archive has more than {MAX_MEMBERS:,} members. Pack only the model's files.",
            code="archive_members",
        )


@contextmanager
def reading() -> Generator[None]:
    """Turns whatever a parser says about damaged bytes into one plain refusal."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        ValueError,
        IndexError,
        OverflowError,
        RuntimeError,  # zipfile's answer to an encrypted member; includes NotImplementedError
    ) as error:
        raise damaged(str(error)[:200] or type(error).__name__) from error


def damaged(detail: str) -> Unprocessable:
    return Unprocessable(
        f"The archive is damaged ({detail}). Pack and upload it again.", code="archive_damaged"
    )


def check_name(name: str) -> None:
    """Raises `Unprocessable` unless the name stays inside the directory it is unpacked to."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    is_outside = name.startswith("/") or ".." in parts
    if is_outside or "\\" in name or ":" in name or "\0" in name or not parts:
        raise Unprocessable(
            f"The archive member {name[:200]!r} points outside the archive. Pack relative paths "
            "only, for example:\n    tar -cf model.tar -C my-model .",
            code="archive_path",
        )
    if len(parts) > MAX_DEPTH or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise Unprocessable(
            f"The archive member {name[:200]!r} has too long a path.", code="archive_path"
        )


def special_member(name: str) -> Unprocessable:
    return Unprocessable(
        f"The archive member {name[:200]!r} is a link or device; only files and directories are "
        "accepted. Pack the files themselves, for example:\n    tar -chf model.tar -C my-model .",
        code="archive_link",
    )


def checked_name(name: str, seen: set[str]) -> str:
    """The name in its one spelling. Raises `Unprocessable` for a bad one or one in `seen`."""
    check_name(name)
    plain = "/".join(part for part in name.split("/") if part not in ("", "."))
    if plain in seen:
        raise Unprocessable(
            f"The archive holds {plain[:200]!r} twice. Pack each file once.",
            code="archive_duplicate",
        )
    seen.add(plain)
    return plain
