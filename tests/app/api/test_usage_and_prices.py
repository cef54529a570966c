"""`/api/usage` and `/api/prices` over HTTP."""

import asyncio
import csv
import io
from datetime import UTC, datetime, timedelta

import openai
import pytest

from app.api import usage
from app.billing.archiving import archive_before
from app.billing.tables import AccountBalance
from app.core.database import create_writer_engine
from app.metering.hours import Period
from app.metering.service import UsageCells
from app.organizations.keys import create_key
from app.organizations.principal import SCOPES
from tests.app.api.conftest import ORGANIZATION, OTHER, Box


async def test_usage_by_every_group(box: Box, client: openai.AsyncOpenAI) -> None:
    first_day = datetime.now(UTC).date().isoformat()
    for _ in range(2):
        await client.completions.create(model="tiny", prompt="a b c")
    async with box.http() as http:
        await http.post("/models/doubler/predict", json={"inputs": {"x": [[1, 2]], "k": [1]}})
        by = {
            name: (await http.get("/api/usage", params={"group_by": name})).json()
            for name in ("model", "key", "class", "day", "hour", "dimension")
        }
        quantity = {row["group"]: row for row in by["dimension"]["rows"]}
        assert quantity["output"]["output"] == 16
        assert quantity["request"]["requests"] == 3
    today = datetime.now(UTC).date().isoformat()
    # The first prompt is new; of the second, two of three tokens are cached.
    first, second, prediction = 300 + 3_200 + 100, 100 + 20 + 3_200 + 100, 556 + 100
    assert by["model"]["rows"] == [
        {
            "group": "tiny",
            "requests": 2,
            "input": 4,
            "cached_input": 2,
            "output": 16,
            "device_ms": 2,
            "amount_nano": first + second,
        },
        {
            "group": "doubler",
            "requests": 1,
            "input": 0,
            "cached_input": 0,
            "output": 0,
            "device_ms": 2,
            "amount_nano": prediction,
        },
    ]
    total = first + second + prediction
    for answer in by.values():
        assert answer["total_nano"] == answer["owed_nano"] == total
        assert sum(row["amount_nano"] for row in answer["rows"]) == total
        assert answer["spending_limit_nano"] is None
        assert answer["currency"] == "usd"
    assert {row["group"] for row in by["day"]["rows"]} <= {first_day, today}
    assert [row["group"] for row in by["key"]["rows"]] == ["all"]
    async with box.http(OTHER) as http:
        other = (await http.get("/api/usage")).json()
    assert (other["rows"], other["owed_nano"]) == ([], 0)


async def test_usage_for_spreadsheets(box: Box, client: openai.AsyncOpenAI) -> None:
    async with box.database.write() as session:
        _, secret = await create_key(session, ORGANIZATION, '=1+1,"x"', SCOPES)
    async with box.client() as client:
        client.api_key = secret
        await client.completions.create(model="tiny", prompt="a b c")
    async with box.http() as http:
        params = {"group_by": "key"}
        response = await http.get("/api/usage.csv", params=params)
        same = await http.get("/api/usage", params=params | {"format": "csv"})
        refused = await http.get("/api/usage", params=params | {"format": "xml"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    assert response.headers["content-disposition"].endswith('-by-key.csv"')
    assert list(csv.reader(io.StringIO(response.text))) == [
        ["key", "requests", "input", "cached_input", "output", "device_ms", "amount", "currency"],
        ['\'=1+1,"x"', "1", "3", "0", "8", "1", "0.0000036", "usd"],
    ]
    assert same.text == response.text
    assert refused.json()["error"]["param"] == "format"
    async with box.http(OTHER) as http:
        assert len((await http.get("/api/usage.csv")).text.splitlines()) == 1


async def test_amounts_are_in_the_currency_of_the_account(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    await client.completions.create(model="tiny", prompt="a b c")
    await box.relay.settled()
    async with box.database.write() as session:
        account = await session.get_one(AccountBalance, ORGANIZATION)
        account.currency = "eur"  # of before the box's own was changed
    async with box.http() as http:
        answer = (await http.get("/api/usage")).json()
        rows = list(csv.DictReader(io.StringIO((await http.get("/api/usage.csv")).text)))
    assert answer["currency"] == "eur"
    assert [row["currency"] for row in rows] == ["eur"]


async def test_the_range_of_usage(box: Box, client: openai.AsyncOpenAI) -> None:
    await client.completions.create(model="tiny", prompt="a")
    now = datetime.now(UTC)
    async with box.http("read") as http:

        async def rows(**params: str) -> int:
            response = await http.get("/api/usage", params=params)
            assert response.status_code == 200, response.text
            return len(response.json()["rows"])

        hour = timedelta(hours=1)
        assert await rows(**{"from": (now - hour).isoformat()}) == 1
        assert await rows(**{"to": "0001-01-05T00:00:00Z"}) == 0
        assert (
            await rows(**{"from": (now + hour).isoformat(), "to": (now + 2 * hour).isoformat()})
            == 0
        )
        for params, param in (
            ({"from": "2026-01-01T00:00:00"}, "from"),
            ({"from": now.isoformat(), "to": (now - hour).isoformat()}, "from"),
            ({"from": "yesterday"}, "from"),
            ({"from": "0001-01-01T00:00:00+23:59"}, "from"),
            ({"to": "9999-12-31T23:59:59-23:59"}, "to"),
            ({"group_by": "colour"}, "group_by"),
        ):
            response = await http.get("/api/usage", params=params)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param


async def test_usage_that_was_archived_is_in_every_range(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    """As after `TAPEOUT_USAGE_DETAIL_DAYS` was raised: 62 are to be kept, and few are."""
    started = datetime.now(UTC)
    await client.completions.create(model="tiny", prompt="a b c")
    async with box.http() as http:
        whole = (await http.get("/api/usage")).json()
        await box.sealer.turn()
        engine = create_writer_engine(box.settings.sync_database_url)
        later = datetime.now(UTC) + timedelta(days=2)
        assert await asyncio.to_thread(archive_before, engine, box.records.archive, later) == 1
        engine.dispose()
        params = {"from": started.isoformat(), "to": datetime.now(UTC).isoformat()}
        answer = (await http.get("/api/usage", params=params)).json()
        assert answer["rows"] == whole["rows"]
        assert answer["total_nano"] == whole["total_nano"] > 0
        assert answer["from"] == started.replace(
            minute=0, second=0, microsecond=0
        ).isoformat().replace("+00:00", "Z")
        items = [{"dimension": "output", "price_nano": 3_000, "unit_scale": 1}]
        preview = (await http.post("/api/prices/preview", json={"items": items})).json()
    assert (preview["is_estimate"], preview["old_nano"]) == (True, whole["total_nano"])


async def test_the_running_hour_is_not_split(
    box: Box, client: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until now, given or not, is the whole of it: also what was posted ahead of the clock."""
    await client.completions.create(model="tiny", prompt="a b c")
    periods: list[Period] = []

    async def read(session: object, name: str, within: Period, by: str) -> UsageCells:
        periods.append(within)
        return UsageCells([])

    monkeypatch.setattr(usage, "read_usage", read)
    async with box.http() as http:
        await http.get("/api/usage")
        await http.get("/api/usage", params={"to": "2999-01-01T00:00:00Z"})
        await http.get("/api/usage.csv")
    assert [within.edges for within in periods] == [(), (), ()]


async def test_the_operator_changes_prices(box: Box, client: openai.AsyncOpenAI) -> None:
    items = [{"dimension": "output", "price_nano": 3_000, "unit_scale": 1}]
    async with box.http() as http, box.http(OTHER) as other, box.http("read") as reader:
        before = (await other.get("/api/prices")).json()
        assert before["number"] == 1
        assert len(before["items"]) == 15
        assert (await other.post("/api/prices", json={"items": items})).status_code == 403
        assert (await reader.post("/api/prices", json={"items": items})).status_code == 403
        response = await http.post("/api/prices", json={"items": [{"dimension": "x"}]})
        assert response.json()["error"]["param"] == "items[...].price_nano".replace("...", "0")
        response = await http.post("/api/prices", json={"items": items})
        assert response.status_code == 201, response.text
        assert response.json()["number"] == 2
    raw = await client.completions.with_raw_response.create(model="tiny", prompt="a")
    receipt = await box.receipt(raw.headers["x-request-id"])
    assert receipt["amount_nano"] == 24_000
    assert receipt["price_book"]["number"] == 2
