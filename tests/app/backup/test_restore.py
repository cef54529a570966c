"""A backup that has travelled: its modes are not believed, its names lead nowhere else, and what
fails can be tried again."""

import hashlib
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from app.backup import restore
from app.backup.backup import MANIFEST, BackedUpFile, read_manifest, take_backup
from app.backup.restore import restore_backup
from app.core.database import create_writer_engine
from app.core.errors import InvalidRequest
from app.core.migration import upgrade
from app.core.storage import Storage
from app.settings import read_settings


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of a box with a file in each part."""
    folder = tmp_path_factory.mktemp("original")
    settings = read_settings({}, data_dir=folder / "box")
    storage = Storage(settings.data_dir)
    for part in restore.PARTS:
        (storage.data_dir / part / "some").mkdir()
        (storage.data_dir / part / "some" / "file").write_bytes(part.encode() * 1000)
    storage.receipt_key.write_bytes(b"secret")
    engine = create_writer_engine(settings.sync_database_url)
    upgrade(engine)
    engine.dispose()
    take_backup(settings.data_dir, settings.sync_database_url, folder / "backup")
    return folder / "backup"


@pytest.fixture
def backup(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    target = tmp_path / "backup"
    shutil.copytree(original, target)
    return target


def make_box(backup: Path) -> Path:
    data_dir = backup.parent / "new"
    restore_backup(backup, data_dir, f"sqlite:///{backup.parent / 'new.db'}")
    return data_dir


def files_below(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != "lock")


def rename(backup: Path, name: str, new_name: str) -> None:
    """In the manifest alone."""
    manifest = read_manifest(backup)
    files = {new_name if key == name else key: file for key, file in manifest.files.items()}
    changed = msgspec.structs.replace(manifest, files=files)
    (backup / MANIFEST).write_bytes(msgspec.json.encode(changed))


def test_keys_are_closed_whatever_the_copy_says(backup: Path) -> None:
    for path in (backup, *backup.rglob("*")):
        path.chmod(0o777)
    (backup.parent / "new" / "keys").mkdir(parents=True, mode=0o755)
    data_dir = make_box(backup)
    for path in (data_dir / "keys").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (data_dir / "keys").stat().st_mode & 0o777 == 0o700
    assert (data_dir / "keys/some/file").read_bytes() == b"keys" * 1000
    for part in restore.PARTS:  # nobody else may write to the others either
        assert (data_dir / part / "some").stat().st_mode & 0o777 == 0o700
        assert not (data_dir / part / "some/file").stat().st_mode & 0o022


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../outside",
        "keys/../../outside",
        "keys/./some",
        "keys//some",
        "keys/",
        "keys",
        "",
        "lock",
        "tapeout.db",
        "run/worker.sock",
        "builds/ver_1/file",
        "logs/app.log",
        "keys\\some",
        "uploads/a\x00b",
        "uploads/..\\..\\outside",
    ],
)
def test_names_lead_nowhere_else(backup: Path, name: str) -> None:
    (backup / "outside").write_bytes(b"uploads" * 1000)
    rename(backup, "uploads/some/file", name)
    with pytest.raises(InvalidRequest, match="is no file of a box"):
        make_box(backup)
    assert files_below(backup.parent / "new") == []
    assert not (backup.parent / "outside").exists()


@pytest.mark.parametrize("linked", ["uploads/some/file", "uploads/some", "uploads"])
def test_a_link_is_not_followed(backup: Path, linked: str) -> None:
    path = backup / "files" / linked
    moved = path.rename(backup.parent / "elsewhere")
    path.symlink_to(moved)
    with pytest.raises(InvalidRequest, match="is a link"):
        make_box(backup)
    assert files_below(backup.parent / "new") == []


def test_a_pipe_is_not_read(backup: Path) -> None:
    path = backup / "files/uploads/some/file"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InvalidRequest, match="is no file"):
        make_box(backup)


@pytest.mark.parametrize(
    "name", ["files/artifacts/some/file", "files/keys/some/file", "database/model.msgpack.z"]
)
def test_after_damage_the_same_command_works(backup: Path, original: Path, name: str) -> None:
    path = backup / name
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(InvalidRequest, match="damaged"):
        make_box(backup)
    assert files_below(backup.parent / "new") == []
    path.write_bytes(good)
    assert files_below(make_box(backup)) == sorted(read_manifest(original).files)


def test_what_was_copied_is_removed_when_the_rest_fails(
    backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_file = restore.copy_file
    names: list[str] = []

    def filling_disk(source: Path, target: Path, mode: int | None) -> BackedUpFile:
        names.append(target.name)
        if len(names) == 4:
            target.write_bytes(b"half")
            raise OSError("disk full")
        return copy_file(source, target, mode)

    with monkeypatch.context() as patch:
        patch.setattr(restore, "copy_file", filling_disk)
        with pytest.raises(OSError, match="disk full"):
            make_box(backup)
    assert files_below(backup.parent / "new") == []
    make_box(backup)


def test_a_file_that_changes_after_its_check_is_not_kept(
    backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(source: Path, target: Path, mode: int | None) -> BackedUpFile:
        target.write_bytes(b"other")
        return BackedUpFile(5, hashlib.sha256(b"other").hexdigest())

    monkeypatch.setattr(restore, "copy_file", swapped)
    with pytest.raises(InvalidRequest, match="changed while"):
        make_box(backup)
    assert files_below(backup.parent / "new") == []


def test_a_manifest_without_a_table_is_refused(backup: Path) -> None:
    manifest = read_manifest(backup)
    tables = {name: file for name, file in manifest.tables.items() if name != "organization"}
    changed = msgspec.structs.replace(manifest, tables=tables)
    (backup / MANIFEST).write_bytes(msgspec.json.encode(changed))
    with pytest.raises(InvalidRequest, match="organization is missing"):
        make_box(backup)
