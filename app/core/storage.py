"""Where files of the box live below its data directory. Owns the layout and the free-disk check,
not the meaning of the files."""

import errno
import os
import shutil
from pathlib import Path

from app.core.errors import StorageFull

RESERVE_BYTES = 256 * 1024**2  # kept free so that journal and database can always be written


class Storage:
    """The data directory: uploads, artifacts, builds under way, sockets, journal, logs, the key
    that signs receipts, and usage that is no longer in the database."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        for name in ("uploads", "artifacts", "builds", "run", "journal", "logs", "keys", "archive"):
            (data_dir / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    def upload(self, upload_id: str) -> Path:
        return self.data_dir / "uploads" / upload_id

    def artifact(self, artifact_id: str) -> Path:
        return self.data_dir / "artifacts" / artifact_id

    def build(self, version_id: str) -> Path:
        return self.data_dir / "builds" / version_id

    def log(self, name: str) -> Path:
        return self.data_dir / "logs" / f"{name}.log"

    @property
    def run_dir(self) -> Path:
        return self.data_dir / "run"

    @property
    def journal_dir(self) -> Path:
        return self.data_dir / "journal"

    @property
    def receipt_key(self) -> Path:
        return self.data_dir / "keys" / "receipts.key"

    @property
    def usage_archive(self) -> Path:
        return self.data_dir / "archive" / "usage"

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.data_dir).free

    def require_space(self, num_bytes: int) -> None:
        """Raises `StorageFull` when `num_bytes` more would leave less than the reserve."""
        free = self.free_bytes() - RESERVE_BYTES
        if num_bytes > free:
            raise StorageFull(
                f"This needs {num_bytes:,} bytes but the box has {max(free, 0):,} to spare. "
                "Delete models you no longer need, or give the data directory a larger disk."
            )


def is_full(error: OSError) -> bool:
    """Whether a write failed because the disk, or what its user may have of it, is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def fsync_directory(path: Path) -> None:
    """Makes a rename or creation inside `path` survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
