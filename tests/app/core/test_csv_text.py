"""CSV that a spreadsheet reads as text and numbers, never as a formula."""

import csv
import io

import pytest

from app.core.csv_text import BLOCK_ROWS, csv_blocks


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_text_is_never_a_formula(text: str) -> None:
    (block,) = csv_blocks(["name"], [[text]])
    (_, (cell,)) = csv.reader(io.StringIO(block.decode(), newline=""))
    assert cell == f"'{text}"


def test_numbers_and_other_text_stay_as_they_are() -> None:
    (block,) = csv_blocks(["name", "amount"], [['a,"b"\n', -5], ["é", 7]])
    assert block.decode() == 'name,amount\r\n"a,""b""\n",-5\r\né,7\r\n'


def test_a_long_file_comes_in_blocks() -> None:
    blocks = list(csv_blocks(["number"], ([index] for index in range(2 * BLOCK_ROWS + 1))))
    assert len(blocks) == 3
    assert b"".join(blocks).count(b"\r\n") == 2 * BLOCK_ROWS + 2
