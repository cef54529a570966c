"""Tables for narrow screens too, where the style sheet makes labelled values of each row.

Each value is given its column's words, which the style sheet sets beside it, and each part its
role, which would be lost with a table's display. Templates and guides write plain tables.
"""

import re
from html import unescape

from markupsafe import escape

_TABLE = re.compile(r"<table\b.*?</table>", re.DOTALL)
_PART = re.compile(r"<(/?)(table|thead|tbody|tfoot|tr|th|td)\b([^>]*)>")
_TAG = re.compile(r"<[^>]*>")
_ROLES = {
    "table": "table",
    "thead": "rowgroup",
    "tbody": "rowgroup",
    "tfoot": "rowgroup",
    "tr": "row",
    "th": "rowheader",
    "td": "cell",
}


def stackable(html: str) -> str:
    """The page, or part of one, with roles and labels in its tables. What came of this is left as
    it is, and a table without a head, which is small."""
    return _TABLE.sub(
        lambda found: _with_labels(found[0]) if _is_plain(found[0]) else found[0], html
    )


def _is_plain(table: str) -> bool:
    return "<thead" in table and 'role="table"' not in table


def _with_labels(table: str) -> str:
    """A row's first cell is what the row is of, and one that spans columns is about the row: they
    and what comes after need no label."""
    labels: list[str] = []
    is_head = False
    rest: list[str] = []  # of the labels, in a row

    def part(found: re.Match[str]) -> str:
        nonlocal is_head, rest
        closing, name, attributes = found.groups()
        if name == "thead":
            is_head = not closing
        if closing:
            return found[0]
        role, label = _ROLES[name], ""
        if name == "tr":
            rest = ["", *labels[1:]]
        elif name in ("th", "td") and is_head:
            role = "columnheader" if name == "th" else role
            content = table[found.end() : table.index(f"</{name}>", found.end())]
            labels.append(unescape(_TAG.sub("", content)).strip())
        elif name in ("th", "td"):
            rest = [] if "colspan" in attributes else rest
            label = rest.pop(0) if rest else ""
        if label and name == "td":
            attributes += f' data-label="{escape(label)}"'
        return f'<{name}{attributes} role="{role}">'

    return _PART.sub(part, table)
