"""The structure is a test: layers, file lengths, module docstrings, and documents that are true."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.settings import FIELDS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("app", "runtime", "demo") for p in (ROOT / folder).rglob("*.py"))
APP_SOURCES = [path for path in SOURCES if path.is_relative_to(ROOT / "app")]
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


# What turns whole numbers into others, or is one that is not whole.
INEXACT = frozenset({"float", "round", "Decimal", "Fraction", "fmean", "mean"})
DURATION = re.compile(r"seconds|_ms\b", re.IGNORECASE)


def inexact_lines(text: str, is_money: Callable[[ast.expr], bool]) -> list[str]:
    """Lines that divide, cast, round or print as a float what `is_money` holds for. A path joined
    with a text that is written out is no division."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.BinOp(left, ast.Div(), right) | ast.AugAssign(left, ast.Div(), right):
                is_path = any(
                    isinstance(part, ast.JoinedStr)
                    or (isinstance(part, ast.Constant) and isinstance(part.value, str))
                    for part in (left, right)
                )
                is_wrong = not is_path and (is_money(left) or is_money(right))
            case ast.BinOp(left, _, right):
                is_wrong = any(
                    isinstance(one, ast.Constant) and isinstance(one.value, float) and is_money(two)
                    for one, two in ((left, right), (right, left))
                )
            case ast.Call(ast.Name(id=name) | ast.Attribute(attr=name), arguments):
                is_wrong = name in INEXACT and any(is_money(each) for each in arguments)
            case ast.FormattedValue(value, _, ast.JoinedStr([ast.Constant(str(spec))])):
                is_wrong = spec[-1:] in {"e", "f", "g", "%", "E", "F", "G"} and is_money(value)
            case _:
                is_wrong = False
        if is_wrong:
            found.add(getattr(node, "lineno", 1))
    lines = text.splitlines()
    return [lines[number - 1].strip() for number in sorted(found)]


def names_nano(expression: ast.expr) -> bool:
    """Whether an amount is named in it; nano-seconds are none."""
    names = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(expression)
        if isinstance(node, ast.Name | ast.Attribute)
    }
    return any(re.search(r"(^|_)nano(s|$|_(?!per_second))", name.lower()) for name in names)


def test_no_float_touches_money() -> None:
    """In the code of money nothing is inexact but durations, on lines that name them."""
    for path in (*(ROOT / "app/billing").rglob("*.py"), ROOT / "app/core/money.py"):
        text = path.read_text()
        wrong = inexact_lines(text, lambda _: True)
        for node in ast.walk(ast.parse(text)):
            is_float = isinstance(node, ast.Constant) and isinstance(node.value, float)
            is_name = isinstance(node, ast.Name) and node.id in INEXACT
            if is_float or is_name:
                wrong.append(text.splitlines()[node.lineno - 1].strip())
        assert [line for line in wrong if not DURATION.search(line)] == [], path


@pytest.mark.parametrize("path", APP_SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_amount_becomes_a_float(path: Path) -> None:
    """Anywhere else, what is named as nano-units is not divided, cast or rounded."""
    assert inexact_lines(path.read_text(), names_nano) == []


def test_no_template_does_sums_with_amounts() -> None:
    inexact = re.compile(r"nano\b[^{}%]*( / |\|\s*(round|float|filesizeformat))")
    for path in (ROOT / "templates").rglob("*.html"):
        found = inexact.search(path.read_text())
        assert found is None, f"{path}: {found and found[0]}"


@pytest.mark.parametrize(
    "line",
    [
        "x = amount_nano / 100",
        "x = 7 / line.amount_nano",
        "amount_nano /= 2",
        "x = float(row.amount_nano)",
        "x = round(100 * spent_nano // limit_nano, 2)",
        "x = Decimal(total_nano)",
        "x = amount_nano * 0.5",
        "x = sum(amounts_nano) / 3",
        "x = statistics.fmean(amounts_nano)",
        "x = f'{amount_nano:.2f}'",
        "x = NANO_PER_UNIT / 2",
    ],
)
def test_the_search_for_floats_finds(line: str) -> None:
    assert inexact_lines(line, names_nano) == [line]


@pytest.mark.parametrize(
    "line",
    [
        "x = amount_nano // 100",
        "x = amount_nano * 2",
        "x = folder / 'nano'",
        "x = f'{a_nano:,}'",
        "x = a / NANO_PER_SECOND",
    ],
)
def test_the_search_for_floats_passes(line: str) -> None:
    assert inexact_lines(line, names_nano) == []


def test_what_a_request_changes_begins_with_what_its_caller_may() -> None:
    """`app.api.writing` opens the transactions of both, but for people about themselves, and for
    those who are nobody yet."""
    opened = re.compile(r"\.write\(\)|\.begin\(\)|\.commit\(\)")
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("app/api", "app/console")
        for path in (ROOT / folder).rglob("*.py")
        if opened.search(path.read_text())
    }
    assert found == {"app/api/writing.py", "app/console/account.py", "app/console/entry.py"}


def test_nothing_unpickles_what_it_did_not_write() -> None:
    banned = re.compile(
        r"^\s*(import|from) (pickle|multiprocessing|marshal|shelve)\b", re.MULTILINE
    )
    for path in SOURCES:
        assert not banned.search(path.read_text()), path


def test_every_setting_and_command_is_documented() -> None:
    from app.cli import main

    settings = (ROOT / "docs" / "operations.md").read_text()
    for name in FIELDS:
        assert f"`TAPEOUT_{name}`" in settings, f"{name} is missing in docs/operations.md"
    readme = (ROOT / "README.md").read_text()
    for name in main.commands:
        assert re.search(rf"tapeout {name}\b", readme), f"{name} is missing in README.md"


def test_compose_passes_every_setting_but_where_the_container_s_own_things_are() -> None:
    text = (ROOT / "compose.yaml").read_text()
    own = {"DATA_DIR", "HOST", "PORT", "LAUNCHER_SOCKET"}
    missing = {name for name in FIELDS if not re.search(rf"- TAPEOUT_{name}(=|\n)", text)}
    assert missing == own


def test_importing_the_gateway_loads_no_torch() -> None:
    script = (
        "import sys, app.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
