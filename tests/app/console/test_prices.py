"""The operator's pages of prices: reading, editing with a preview, scheduling and taking back."""

import html
import re
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy import update

from app.billing.prices import Item, PriceTable, draft_book, first_items
from app.console.prices_form import PriceForm, Row, fields_of, form_of, read_form
from app.console.prices_view import amount_and_unit, read_book
from app.core import clock
from app.core.errors import InvalidRequest
from app.organizations.tables import Organization
from tests.app.console.conftest import Answer, Console

PRICES, EDIT = "/console/prices", "/console/prices/edit"


@pytest.fixture
async def priced(owned: Console) -> AsyncIterator[Console]:
    """A console with the books that a box begins with."""
    prices = PriceTable(owned.database)
    await prices.start()
    owned.client.app.state["prices"] = prices
    yield owned
    await prices.close()


def table(console: Console) -> PriceTable:
    prices: PriceTable = console.client.app.state["prices"]
    return prices


def sent_fields(console: Console, **changes: str) -> dict[str, str]:
    """The form of the last book with some fields changed."""
    last = table(console).books[0]
    return {**fields_of(form_of(last, last.id)), **changes}


def hidden_fields(answer: Answer) -> dict[str, str]:
    found = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', answer.text)
    return {name: html.unescape(value) for name, value in found}


async def test_the_book_in_force_is_readable(priced: Console) -> None:
    page = await priced.client.get(PRICES)
    assert page.status_code == 200
    for text in ("Any model", "$0.40", "million tokens", "$1.00", "hour", "Priority", "active"):
        assert text in page.text
    assert "style=" not in page.text


async def test_a_change_is_previewed_and_then_put_into_force(priced: Console) -> None:
    fields = sent_fields(priced, **{"price-2": "0.75", "above_tokens-2": "", "price-0": ""})
    preview = await priced.post(EDIT, EDIT, action="preview", **fields)
    assert preview.status == 200, preview.text
    assert "Nothing has changed yet" in preview.text
    assert "Any model, output" in preview.text
    assert "$0.75 per million tokens" in preview.text
    assert table(priced).active.number == 1

    kept = hidden_fields(preview)
    kept.pop("csrf_token")
    done = await priced.post(EDIT, EDIT, action="confirm", **kept)
    assert (done.status, done.location) == (303, f"{PRICES}?notice=prices-changed"), done.text
    active = table(priced).active
    assert active.number == 2
    rates = active.rates("any", "standard")
    assert rates.prices["output"].price_nano == 750_000_000
    assert "input" not in rates.prices  # its row was emptied

    again = await priced.post(EDIT, EDIT, action="confirm", **kept)
    assert again.status == 409
    assert "changed since you began" in again.text


async def test_a_book_for_later_is_scheduled_and_taken_back(priced: Console) -> None:
    later = (clock.now() + timedelta(days=3)).strftime("%Y-%m-%dT%H:%M")
    fields = sent_fields(priced, effective_at=later, exceptions="cancelled.output: waived")
    preview = await priced.post(EDIT, EDIT, action="preview", **fields)
    row = preview.text[preview.text.index("Cancelled by the caller: output") :]
    assert re.findall(r"<td[^>]*>([^<]+)</td>", row)[:2] == ["as the rest of its outcome", "waived"]
    done = await priced.post(EDIT, EDIT, action="confirm", **fields)
    assert done.location == f"{PRICES}?notice=prices-scheduled"
    book = table(priced).books[0]
    assert book.policy == {"cancelled.output": "waived"}
    assert table(priced).active.number == 1
    path = f"{PRICES}/books/{book.id}"
    assert "scheduled" in (await priced.client.get(path)).text
    assert "must start after it" in (await priced.client.get(EDIT)).text
    done = await priced.post(f"{path}/cancel", f"{path}/cancel")
    assert done.location == f"{PRICES}?notice=prices-cancelled"
    assert [each.number for each in table(priced).books] == [1]
    assert (await priced.client.get(path)).status_code == 404


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"price-1": "1,50"}, "Row 2: the price is an amount such as 12.50"),
        ({"per-3": "0"}, "Row 4: unit scale must be 1 to 10^15"),
        ({"from-0": "25:00"}, "Row 1: &#39;25:00&#39; is no time of day"),
        ({"above_tokens-3": "5"}, "Row 4: above tokens must be 0 except for input"),
        ({"dimension-1": "input"}, "Row 2: dimension must be a combination that is not listed"),
        ({"exceptions": "cancelled waived"}, "is no exception such as"),
        ({"effective_at": "2020-01-01T00:00"}, "cannot take effect in the past"),
        ({"effective_at": "soon"}, "is no date and time"),
    ],
)
async def test_a_mistake_is_shown_at_its_row_and_nothing_is_lost(
    priced: Console, changes: dict[str, str], message: str
) -> None:
    fields = sent_fields(priced, **{"price-2": "0.123456"}, **changes)
    answer = await priced.post(EDIT, EDIT, action="preview", **fields)
    assert answer.status == 400
    assert message in answer.text
    assert "0.123456" in answer.text
    assert ('class="wrong"' in answer.text) == message.startswith("Row")


async def test_the_preview_warns_of_what_is_free_and_who_is_unknown(priced: Console) -> None:
    fields = sent_fields(priced, **{"from-2": "16:30", "until-2": "00:30"})
    answer = await priced.post(EDIT, EDIT, action="preview", **fields)
    assert "free of charge otherwise: Any model, output (16:30 to 00:30 UTC)." in answer.text
    fields = sent_fields(priced, **{"endpoint_name-3": "lama"})
    answer = await priced.post(EDIT, EDIT, action="preview", **fields)
    assert "No endpoint has the name lama." in answer.text
    assert "free of charge otherwise" not in answer.text


async def test_rows_are_added_without_losing_what_was_typed(priced: Console) -> None:
    num_rows = len(form_of(table(priced).active, "").rows)
    fields = sent_fields(priced, **{"price-0": "9.87"})
    answer = await priced.post(EDIT, EDIT, action="edit", **fields)
    assert "9.87" in answer.text
    assert f'name="price-{num_rows + 1}"' in answer.text


async def test_only_the_operator_passes(priced: Console) -> None:
    token = await priced.csrf_token(EDIT)
    async with priced.database.write() as session:
        await session.execute(update(Organization).values(is_operator=False))
    book_id = table(priced).active.id
    for path in ("", "/edit", f"/books/{book_id}", f"/books/{book_id}/cancel"):
        assert (await priced.client.get(PRICES + path)).status_code == 403
    for path in ("/edit", f"/books/{book_id}/cancel"):
        answer = await priced.client.post(
            PRICES + path,
            data={"csrf_token": token},
            headers={"Origin": "http://testserver.local"},
        )
        assert answer.status_code == 403


def test_a_form_means_the_book_that_it_was_made_of() -> None:
    items = [
        *first_items(),
        item("own", "output", price_nano=7, unit_scale=3, above_tokens=200_000),
        item("own", "output", price_nano=8, from_minute=30, until_minute=990),
        item("own", "output", price_nano=9, from_minute=1_200, until_minute=1_440),
        item("own", "input", price_nano=0, from_minute=1_380, until_minute=60),
    ]
    book = draft_book(items, "usd", clock.now(), {"lost": "billed", "cancelled.output": "waived"})
    form = read_form(fields_of(form_of(book, "pb_1")))
    draft = form.draft()
    again = draft_book(draft.items, "usd", clock.now(), draft.policy)
    assert again.sha256 == book.sha256
    assert form.based_on == "pb_1"


def item(name: str, dimension: str, price_nano: int, unit_scale: int = 1, **rest: int) -> Item:
    return Item(
        endpoint_name=name,
        dimension=dimension,
        service_class="standard",
        price_nano=price_nano,
        unit_scale=unit_scale,
        **rest,
    )


def test_rows_without_a_price_are_left_out_but_count() -> None:
    form = PriceForm(rows=[Row(), Row(price="1"), Row(), Row(price="x")], outcomes={})
    with pytest.raises(InvalidRequest, match="Row 4") as caught:
        form.draft()
    assert caught.value.param == "rows[3]"


def test_prices_are_quoted_as_people_do_where_that_is_exact() -> None:
    cases = (
        (item("*", "output", 75, 10), ("$0.0075", "million tokens")),
        (item("*", "output", 1, 3), ("$0.000000001", "3 counted")),
        (item("*", "device_ms", 1_000_000_000, 3_600_000), ("$1.00", "hour")),
        (item("*", "kv_disk", 1, 3_600), ("$0.001", "million tokens for an hour")),
    )
    for priced_item, wanted in cases:
        assert amount_and_unit(priced_item, "usd") == wanted


def test_conditions_are_said_in_words() -> None:
    items = [
        item("*", "output", 1),
        item("*", "output", 2, above_tokens=200_000),
        item("*", "output", 3, from_minute=30, until_minute=1_440),
    ]
    [model] = read_book(draft_book(items, "usd", clock.now()))
    conditions = [row.condition for row in model.rows]
    assert conditions == ["", "00:30 to 24:00 UTC", "prompts above 200,000 tokens"]
