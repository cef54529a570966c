import os
import socket
from pathlib import Path

import pytest

from app.deployments import artifacts
from app.deployments.acceptance import NotAcceptable


@pytest.fixture
def output(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    (directory / "sub").mkdir(parents=True)
    (directory / "b").write_bytes(b"two")
    (directory / "sub" / "a").write_bytes(b"one")
    return directory


def copy(output: Path, name: str) -> Path:
    other = output.with_name(name)
    for path in sorted(output.rglob("*"), reverse=True):
        target = other / path.relative_to(output)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return other


def test_the_digest_names_the_content(output: Path, tmp_path: Path) -> None:
    same = copy(output, "same")
    renamed = copy(output, "renamed")
    (renamed / "b").rename(renamed / "c")
    shifted = copy(output, "shifted")  # the same bytes in a row, divided otherwise
    (shifted / "b").write_bytes(b"tw")
    (shifted / "sub" / "a").write_bytes(b"oone")
    stored = artifacts.store(output, tmp_path / "art_1")
    assert (stored.size_bytes, stored.num_files) == (6, 2)
    assert not output.exists()
    assert (tmp_path / "art_1" / "sub" / "a").read_bytes() == b"one"
    assert (tmp_path / "art_1" / "b").stat().st_mode & 0o777 == 0o400
    digests = {
        artifacts.store(other, tmp_path / f"art_{other.name}").digest
        for other in (same, renamed, shifted)
    }
    assert len(digests) == 3
    assert stored.digest in digests


def test_only_plain_files_are_stored(output: Path, tmp_path: Path) -> None:
    (output / "sub" / "link").symlink_to("/etc/passwd")
    with pytest.raises(NotAcceptable, match="'link'"):
        artifacts.store(output, tmp_path / "art")
    (output / "sub" / "link").unlink()
    (output / "folder").symlink_to("/etc")
    with pytest.raises(NotAcceptable, match="'folder'"):
        artifacts.store(output, tmp_path / "art")
    (output / "folder").unlink()
    os.mkfifo(output / "pipe")
    with pytest.raises(NotAcceptable, match="'pipe'"):
        artifacts.store(output, tmp_path / "art")
    (output / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(output / "socket"))
        with pytest.raises(NotAcceptable, match="'socket'"):
            artifacts.store(output, tmp_path / "art")
    assert not (tmp_path / "art").exists()


def test_an_output_without_files_or_with_too_many(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "MAX_FILES", 1)
    with pytest.raises(NotAcceptable, match="more than 1 files"):
        artifacts.store(output, tmp_path / "art")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAcceptable, match="no files"):
        artifacts.store(tmp_path / "empty", tmp_path / "art")


def test_what_no_row_names_is_removed(tmp_path: Path) -> None:
    for name in ("art_1", "art_2"):
        (tmp_path / name / "sub").mkdir(parents=True)
    assert artifacts.remove_unknown(tmp_path, {"art_1", "art_9"}) == ["art_2"]
    assert [path.name for path in tmp_path.iterdir()] == ["art_1"]
