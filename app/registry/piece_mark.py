"""How much of an upload's file counts while a piece with a checksum arrives.

A small file beside the upload's says it, so that a kill or a power loss in the middle of a piece
leaves nothing of it that counts. Written in place: one block, no entry of a directory.
"""

import os
from pathlib import Path

from app.core.storage import fsync_directory

SUFFIX = ".mark"
WIDTH = 20  # characters; a mark that was lifted is blank


def mark_path(path: Path) -> Path:
    """Of the upload that lies at `path`."""
    return path.with_name(path.name + SUFFIX)


def set_mark(path: Path, num_bytes: int) -> None:
    """From here on only so much counts; returns once a power loss cannot change that."""
    descriptor = os.open(mark_path(path), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        is_new = os.fstat(descriptor).st_size == 0
        os.pwrite(descriptor, f"{num_bytes:<{WIDTH}}".encode(), 0)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        fsync_directory(path.parent)


def lift_mark(path: Path) -> None:
    """All of the file counts again. Lost with the power, it costs one piece sent twice."""
    try:
        descriptor = os.open(mark_path(path), os.O_WRONLY)
    except FileNotFoundError:
        return
    try:
        os.pwrite(descriptor, b" " * WIDTH, 0)
    finally:
        os.close(descriptor)


def counted_bytes(path: Path) -> int:
    """Of the file at `path`. Raises `FileNotFoundError`."""
    num_bytes = path.stat().st_size
    try:
        mark = mark_path(path).read_text().strip()
    except FileNotFoundError:
        return num_bytes
    return min(num_bytes, int(mark)) if mark else num_bytes
