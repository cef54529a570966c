"""The structure is a test: layers, file lengths, module docstrings, and documents that are true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.settings import FIELDS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("app", "runtime", "demo") for p in (ROOT / folder).rglob("*.py"))
MAX_LINES = 400


def test_layer_contracts_hold() -> None:
    checker = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([checker], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_module_says_what_it_owns_and_stays_small(path: Path) -> None:
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "every module opens with what it owns"
    assert text.count("\n") <= MAX_LINES, "split it: one noun, one file"


def test_no_float_touches_money() -> None:
    sources = [*(ROOT / "app/billing").rglob("*.py"), ROOT / "app/core/money.py"]
    for path in sources:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            is_float = isinstance(node, ast.Constant) and isinstance(node.value, float)
            is_division = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            is_cast = isinstance(node, ast.Name) and node.id == "float"
            if is_float or is_division or is_cast:
                line = text.splitlines()[getattr(node, "lineno", 1) - 1]
                # Durations are no money.
                assert re.search(r"seconds|_ms\b", line, re.IGNORECASE), f"{path}: {line}"


def test_nothing_unpickles_what_it_did_not_write() -> None:
    banned = re.compile(
        r"^\s*(import|from) (pickle|multiprocessing|marshal|shelve)\b", re.MULTILINE
    )
    for path in SOURCES:
        assert not banned.search(path.read_text()), path


def test_the_readme_lists_every_setting_and_command() -> None:
    from app.cli import main

    readme = (ROOT / "README.md").read_text()
    for name in FIELDS:
        assert f"`TAPEOUT_{name}`" in readme, name
    for name in main.commands:
        assert re.search(rf"tapeout {name}\b", readme), name


def test_importing_the_gateway_loads_no_torch() -> None:
    script = (
        "import sys, app.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
