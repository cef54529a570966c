"""Tables say what each of their values is, wherever the browser puts it."""

import re

from app.console.tables import stackable

HEAD = """<table class="lines"><thead><tr>
  <th scope="col">Model</th><th scope="col"><span>Paid &amp; owed</span></th>
  <td></td><th>Of &#34;all&#34;</th>
</tr></thead>"""


def test_values_are_labelled_by_their_columns_and_parts_have_roles() -> None:
    table = stackable(
        f'{HEAD}<tbody><tr><th scope="row">llama</th><td class="number">1</td>'
        "<td>Remove</td><td>2</td></tr></tbody></table>"
    )
    assert table.startswith('<table class="lines" role="table">')
    assert re.findall(r'role="(\w+)"', table) == [
        *("table", "rowgroup", "row", "columnheader", "columnheader", "cell", "columnheader"),
        *("rowgroup", "row", "rowheader", "cell", "cell", "cell"),
    ]
    assert '<td class="number" data-label="Paid &amp; owed" role="cell">1</td>' in table
    assert '<td role="cell">Remove</td>' in table
    assert '<td data-label="Of &#34;all&#34;" role="cell">2</td>' in table


def test_what_spans_columns_and_what_follows_it_has_no_label() -> None:
    table = stackable(
        f'{HEAD}<tfoot><tr><th scope="row" colspan="3">Sum</th><td>3</td></tr></tfoot></table>'
    )
    assert "data-label" not in table


def test_a_part_within_a_page_is_done_once_and_a_table_without_a_head_never() -> None:
    table = stackable(f"{HEAD}<tbody><tr><td>llama</td><td>1</td></tr></tbody></table>")
    plain = "<table><tbody><tr><td>1</td></tr></tbody></table>"
    assert stackable(f"<p>{table}</p>{plain}") == f"<p>{table}</p>{plain}"
