"""CSV for spreadsheets (RFC 4180), in which no text is taken for a formula."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
BLOCK_ROWS = 500

Value = str | int


def csv_blocks(header: Sequence[str], rows: Iterable[Sequence[Value]]) -> Iterator[bytes]:
    """The file in UTF-8, some hundred rows at a time. Without a header, more rows of one."""
    text = io.StringIO()
    writer = csv.writer(text)
    if header:
        writer.writerow(header)
    for count, row in enumerate(rows, 1):
        writer.writerow([safe(value) for value in row])
        if count % BLOCK_ROWS == 0:
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode()


def safe(value: Value) -> Value:
    """Text that a spreadsheet would calculate gets an apostrophe before it; numbers do not."""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value
