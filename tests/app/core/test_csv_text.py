"""CSV that a spreadsheet reads as text and numbers, never as a formula."""

import csv
import io
import re
from pathlib import Path

import pytest

from app.core import csv_text
from app.core.csv_text import BLOCK_ROWS, csv_blocks


@pytest.mark.parametrize(
    "text",
    [
        *("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"),
        *("\uff1d1+1", "\uff0b1", "\uff0d1", "\uff20SUM(A1)"),
        *("\ufeff=1", "\u200b=1", "\x00=1", "\x01\x7f@SUM(A1)", "\u202e-1"),
    ],
)
def test_text_is_never_a_formula(text: str) -> None:
    """Nor is that of a header."""
    (block,) = csv_blocks([text], [[text]])
    for (cell,) in csv.reader(io.StringIO(block.decode(), newline="")):
        assert cell.startswith("'")
        assert cell.replace("'", "") == text


def test_every_file_is_written_here() -> None:
    """So that none can forget it."""
    app = Path(csv_text.__file__).parents[1]
    assert [
        path.name
        for path in app.rglob("*.py")
        if re.search(r"^import csv|csv\.writer", path.read_text(), re.M)
    ] == ["csv_text.py"]


@pytest.mark.parametrize(
    "text", ["a;=HYPERLINK(1)", 'a;"=1+1', " =1+1", "\n=1+1", "a\t@SUM(A1)", "a|b; -1", "a,+1"]
)
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_no_cell_is_a_formula_whatever_it_is_split_at(text: str, separator: str) -> None:
    (block,) = csv_blocks(["name", "amount"], [["b", text]])
    rows = csv.reader(io.StringIO(block.decode(), newline=""), delimiter=separator)
    for cell in (cell for row in rows for cell in row):
        assert not re.match(r"""[\s"]*[=+@-]""", cell), cell


def test_numbers_and_other_text_stay_as_they_are() -> None:
    (block,) = csv_blocks(["name", "amount"], [['a,"b"\n', -5], ["é", 7]])
    assert block.decode() == '"name","amount"\r\n"a,""b""\n","-5"\r\n"é","7"\r\n'


def test_a_long_file_comes_in_blocks() -> None:
    blocks = list(csv_blocks(["number"], ([index] for index in range(2 * BLOCK_ROWS + 1))))
    assert len(blocks) == 3
    assert b"".join(blocks).count(b"\r\n") == 2 * BLOCK_ROWS + 2
