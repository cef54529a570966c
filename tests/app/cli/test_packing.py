"""A parcel is a real tar, reproducible, and readable from any offset."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from app.cli.client import Refused
from app.cli.packing import Parcel, pack


def read_whole(parcel: Parcel, chunk_bytes: int) -> bytes:
    whole = b""
    while len(whole) < parcel.num_bytes:
        whole += parcel.read(len(whole), chunk_bytes)
    return whole


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_bytes(b"{}")
    (directory / "empty").write_bytes(b"")
    (directory / "sub" / "weights").write_bytes(bytes(range(256)) * 10)
    (directory / ".git").mkdir()
    (directory / ".git" / "secret").write_bytes(b"x")
    (directory / "linked").symlink_to(directory / "config.json")
    return directory


@pytest.mark.parametrize("chunk_bytes", [1, 77, 512, 1 << 20])
def test_a_directory_becomes_a_tar_whatever_the_chunks(directory: Path, chunk_bytes: int) -> None:
    parcel = pack(directory, None)
    with tarfile.open(fileobj=io.BytesIO(read_whole(parcel, chunk_bytes))) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    assert members == {
        "config.json": b"{}",
        "empty": b"",
        "linked": b"{}",
        "sub/weights": bytes(range(256)) * 10,
    }
    assert parcel.num_bytes % tarfile.RECORDSIZE == 0


def test_a_single_file_goes_as_it_is_and_a_tokenizer_beside_it(directory: Path) -> None:
    file = directory / "config.json"
    assert read_whole(pack(file, None), 10) == b"{}"
    with tarfile.open(fileobj=io.BytesIO(read_whole(pack(file, directory), 999))) as archive:
        assert "tokenizer/sub/weights" in archive.getnames()
        assert "config.json" in archive.getnames()


def test_examples_travel_beside_the_model_under_their_own_name(
    directory: Path, tmp_path: Path
) -> None:
    (directory / "examples.npz").write_bytes(b"old")
    (tmp_path / "mine.npz").write_bytes(b"new")
    for path in (directory, directory / "config.json"):
        parcel = pack(path, None, tmp_path / "mine.npz")
        with tarfile.open(fileobj=io.BytesIO(read_whole(parcel, 999))) as archive:
            assert archive.getnames().count("examples.npz") == 1
            assert archive.extractfile("examples.npz").read() == b"new"  # type: ignore[union-attr]
    with pytest.raises(Refused, match="--example"):
        pack(directory, None, tmp_path / "missing.npz")


def test_what_cannot_be_packed_is_refused(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(Refused, match="does not exist"):
        pack(tmp_path / "missing", None)
    with pytest.raises(Refused, match="holds no files"):
        pack(tmp_path / "nothing", None)
    with pytest.raises(Refused, match="not a directory"):
        pack(directory / "config.json", tmp_path / "missing")


@pytest.mark.parametrize("change", ["shorter", "rewritten", "replaced", "removed"])
def test_a_file_that_changes_meanwhile_is_noticed(directory: Path, change: str) -> None:
    parcel = pack(directory, None)
    parcel.check_unchanged()
    path = directory / "sub" / "weights"
    found = path.stat()
    if change == "shorter":
        path.write_bytes(b"short")
    elif change == "rewritten":
        path.write_bytes(bytes(found.st_size))
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    elif change == "replaced":  # by one that was written before
        (directory / "other").write_bytes(bytes(found.st_size))
        os.utime(directory / "other", ns=(found.st_atime_ns, found.st_mtime_ns))
        (directory / "other").rename(path)
    else:
        path.unlink()
    with pytest.raises(Refused, match="changed while"):
        read_whole(parcel, 1 << 20)
    with pytest.raises(Refused, match="changed while"):
        parcel.check_unchanged()
