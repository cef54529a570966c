"""The pages of usage: days, filters, what a bar is made of, waived requests, and the files."""

import csv
import io
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.metering.hours import hour_of
from app.metering.series import SeriesKey
from app.metering.tables import UsageEvent, UsageHour, UsageSeries
from tests.app.console.conftest import Console
from tests.app.console.samples import add_usage, organization_id


async def page_of(console: Console, address: str) -> str:
    answer = await console.client.get(address)
    assert answer.status_code == 200, answer.text
    return " ".join(answer.text.split())


async def rows_of(console: Console, address: str) -> list[dict[str, str]]:
    answer = await console.client.get(address)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/csv")
    assert "attachment" in answer.headers["content-disposition"]
    return list(csv.DictReader(io.StringIO(answer.text)))


async def test_caching_is_told_in_plain_words(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_usage(session)
        await add_usage(session, model="fresh", cached=0)
    page = await page_of(owned, "/console/usage")
    assert "You paid in full for <strong>1,000 of 2,000</strong> prompt tokens." in page
    assert "which saved <strong>$0.000090</strong>" in page
    caching = page.split("What caching saved")[1].split("</table>")[0]
    assert "llama" in caching
    assert "fresh" not in caching


async def test_filters_leave_what_is_of_the_model_and_the_key(owned: Console) -> None:
    async with owned.database.write() as session:
        request_id = await add_usage(session)
        other_id = await add_usage(session, model="other")
    for address in ("/console/usage?model=other", "/console/requests?model=other"):
        page = await page_of(owned, address)
        assert other_id in page
        assert request_id not in page
    assert "Nothing of this model" in await page_of(owned, "/console/usage?key=key_2")
    page = await page_of(owned, "/console/usage?key=key_1")
    assert other_id in page
    assert '<option value="key_1" selected>Web shop' in page
    # Links of the page keep the choice.
    assert "/console/usage?period=month&amp;key=key_1" in page


async def test_days_are_chosen_and_bars_parted(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_usage(session)
        await add_usage(session, model="other")
    today = clock.now().date()
    custom = f"/console/usage?period=custom&from={today - timedelta(days=2)}&to={today}"
    page = await page_of(owned, f"{custom}&split=model")
    assert page.count('class="hover"') == 2 * 3  # wide and narrow
    assert '<ul class="legend"><li>llama</li><li>other</li></ul>' in page
    for period in ("month", "7d"):
        assert "<h2>No requests" not in await page_of(owned, f"/console/usage?period={period}")
    for address in (
        "/console/usage?period=last-month",
        "/console/usage?period=custom&to=2020-01-01",
    ):
        assert "No requests in this period" in await page_of(owned, address)


@pytest.mark.parametrize(
    "days",
    ["from=yesterday", "from=2026-05-02&to=2026-05-01", "from=2020-01-01&to=2026-01-01",
     "to=9999-12-31", "from=0001-01-01&to=0001-01-02"],
)  # fmt: skip
async def test_days_that_are_none_are_refused(owned: Console, days: str) -> None:
    for path in ("usage", "usage.csv", "requests", "requests.csv"):
        answer = await owned.client.get(f"/console/{path}?period=custom&{days}")
        assert answer.status_code == 400, path


async def test_waived_usage_is_seen_and_not_charged(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_usage(session)
        await add_waived(session, num_requests=2, num_tokens=100_000_000)
    page = await page_of(owned, "/console/usage")
    gauge = page.split("<dt>Not charged</dt>")[1].split("</div>")[0]
    assert "$10.000000" in gauge
    assert "2 requests that failed on our side" in gauge
    assert "<dd>$0.000100" in page.split("<dt>Spent</dt>")[1]
    assert "Not charged" not in await page_of(owned, "/console/usage?model=other")


async def add_waived(session: AsyncSession, *, num_requests: int, num_tokens: int) -> None:
    prices = [("request", num_requests, 100_000_000), ("input", num_tokens, 100_000_000)]
    for dimension, quantity, price_nano in prices:
        names = {
            "organization_id": await organization_id(session, "default"),
            "api_key_id": "key_1",
            "endpoint_name": "llama",
            "version_number": 1,
            "service_class": "standard",
            "dimension": dimension,
            "disposition": "waived",
            "price_book_id": "book_1",
            "price_nano": price_nano,
            "unit_scale": 1_000_000,
        }
        series_id = SeriesKey(**names).id  # type: ignore[arg-type]
        session.add(UsageSeries(id=series_id, api_key_name="Web shop", **names))
        session.add(
            UsageHour(
                series_id=series_id,
                hour=hour_of(clock.now()),
                quantity=quantity,
                amount_nano=0,
                saved_nano=0,
            )
        )


async def test_the_files_hold_what_is_shown(owned: Console) -> None:
    async with owned.database.write() as session:
        ids = {await add_usage(session), await add_usage(session, cached=0)}
        await add_usage(session, model="other")
    (row,) = await rows_of(owned, "/console/usage.csv?by=model&model=llama")
    assert (row["model"], row["requests"], row["input"]) == ("llama", "2", "1000")
    assert row["amount"] == "0.0001902"
    rows = await rows_of(owned, "/console/requests.csv?model=llama")
    assert {row["request_id"] for row in rows} == ids
    assert {row["cached_input"] for row in rows} == {"0", "1000"}
    assert all(row["amount"].startswith("0.000") for row in rows)
    for by in ("day", "key", "class", "dimension"):
        assert await rows_of(owned, f"/console/usage.csv?by={by}")


async def test_no_name_is_a_formula_in_a_spreadsheet(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_usage(session, model="=1+1")
    for address in ("/console/usage.csv?by=model", "/console/requests.csv"):
        (row,) = await rows_of(owned, address)
        assert row["model"] == "'=1+1"


async def test_pages_of_requests_lose_and_repeat_none(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.console.usage.PAGE_REQUESTS", 2)
    monkeypatch.setattr("app.console.usage_csv.PAGE_ROWS", 2)
    async with owned.database.write() as session:
        moment = clock.now()
        for index in range(5):  # of which some ended at the same instant
            request_id = await add_usage(session)
            event = await session.get(UsageEvent, f"{request_id}:1")
            assert event is not None
            event.finished_at = moment - timedelta(seconds=index // 3)
    seen: list[str] = []
    address = "/console/requests"
    for _ in range(4):
        page = (await owned.client.get(address)).text
        seen += [part.split('"')[0] for part in page.split("/console/receipts/")[1:]]
        if 'rel="next"' not in page:
            break
        address = page.split('rel="next"')[0].rsplit('href="', 1)[1].split('"')[0]
        address = address.replace("&amp;", "&")
    assert len(seen) == len(set(seen)) == 5
    rows = await rows_of(owned, "/console/requests.csv")
    assert [row["request_id"] for row in rows] == seen
    assert (await owned.client.get("/console/requests?before=now&id=x")).status_code == 400
