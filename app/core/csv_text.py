"""CSV for spreadsheets (RFC 4180), in which no text is taken for a formula.

Everything is quoted. That alone is not enough: a spreadsheet that is set to another separator than
the comma splits a text at it, and what comes behind begins a cell.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence

# What begins a formula, also as typed in Japan, and what a spreadsheet may take away before it:
# blanks, quotes, control characters and characters without width.
SIGNS = r"=+@\uff1d\uff0b\uff20\uff0d-"
UNSEEN = r"""\s"\x00-\x1f\x7f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff"""
FORMULA = re.compile(rf"(^|[;,|\t\r\n])(?=[{UNSEEN}]*[{SIGNS}])")  # where a cell may begin with one
BLOCK_ROWS = 500

Value = str | int


def csv_blocks(header: Sequence[str], rows: Iterable[Sequence[Value]]) -> Iterator[bytes]:
    """The file in UTF-8, some hundred rows at a time. Without a header, more rows of one."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    if header:
        writer.writerow([safe(name) for name in header])
    for count, row in enumerate(rows, 1):
        writer.writerow([safe(value) for value in row])
        if count % BLOCK_ROWS == 0:
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode()


def safe(value: Value) -> Value:
    """What a spreadsheet would calculate gets an apostrophe before it; numbers do not."""
    return FORMULA.sub(r"\1'", value) if isinstance(value, str) else value
