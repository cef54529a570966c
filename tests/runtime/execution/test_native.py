"""Compiling the operators at install time: what is found, refused and said."""

import shutil
import subprocess
from pathlib import Path

import pytest

from runtime.execution import native


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAPEOUT_NATIVE_DIR", str(tmp_path / "native"))
    return tmp_path / "native"


def test_without_a_compiler_it_says_so_and_succeeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    assert native.main() == 0
    assert "no C++ compiler was found. Slower operators will serve" in capsys.readouterr().out


def test_a_failing_compiler_is_quoted_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], empty_directory: Path
) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: shutil.which("false"))
    assert native.main() == 0
    assert "Slower operators will serve" in capsys.readouterr().out
    assert list(empty_directory.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAPEOUT_NATIVE_DIR", str(tmp_path / "file" / "native"))
    with pytest.raises(native.CompileError, match="not writable"):
        native.compile_variant(native.variants()[0], "c++")


def test_a_library_is_named_after_all_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {native.library_path(variant).name for variant in native.variants()}
    assert len(names) == len(native.variants())
    variant = native.variants()[0]
    before = native.library_path(variant)
    assert native.torch.__version__.replace("+", "-") in before.name
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O2"))
    assert native.library_path(variant) != before


@pytest.mark.compiler
@pytest.mark.skipif(native.find_compiler() is None, reason="there is no C++ compiler")
def test_the_source_has_no_warnings() -> None:
    """The front end alone, which takes a quarter of a compilation."""
    compiler = native.find_compiler()
    assert compiler is not None
    command = native.compile_command(native.variants()[0], compiler, Path("unused"))
    output_at = command.index("-o")
    checks = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run(
        [*command[:output_at], *checks], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
