"""The operator's books and earnings over HTTP and in the console, on the whole application."""

import csv
import io
import re
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import httpx
import msgspec
import pytest
from litestar import Litestar
from sqlalchemy import text

from app.billing.payments import mirror, steady_clock
from app.billing.rating import Settlement
from app.core import clock
from app.settings import Settings
from tests.app.billing.conftest import settlement  # noqa: F401 - a fixture
from tests.app.whole_app import URL, Tenant, add_tenant, client, running

NUM_REQUESTS = 120


class Office:
    """The box, its operator and somebody else."""

    def __init__(self, application: Litestar, http: httpx.AsyncClient) -> None:
        self.application = application
        self.http = http
        self.operator: Tenant
        self.other: Tenant

    async def get(self, path: str, tenant: Tenant | None = None) -> httpx.Response:
        return await self.http.get(path, headers=(tenant or self.operator).bearer)

    async def page(self, path: str, tenant: Tenant | None = None) -> httpx.Response:
        return await self.http.get(path, headers=_cookies(tenant or self.operator))

    async def send(self, path: str, fields: dict[str, str]) -> httpx.Response:
        return await self.http.post(
            path,
            data={"csrf_token": self.operator.csrf_token} | fields,
            headers={"Origin": URL} | _cookies(self.operator),
        )


def _cookies(tenant: Tenant) -> dict[str, str]:
    return {"Cookie": "; ".join(f"{name}={value}" for name, value in tenant.cookies.items())}


@pytest.fixture
async def office(
    settings: Settings,
    settlement: Callable[..., Settlement],  # noqa: F811
) -> AsyncIterator[Office]:
    """A box that has answered 120 requests, a second of device time and 410,100 nano each."""
    async with running(settings) as application, client(application) as http:
        office = Office(application, http)
        office.operator = await add_tenant(application, "operator", is_operator=True)
        office.other = await add_tenant(application, "other")
        for n in range(NUM_REQUESTS):
            application.state.accounts.settle(_long(settlement(f"req_{n}")))
        await application.state.relay.settled()
        yield office


def _long(settled: Settlement) -> Settlement:
    lines = [
        msgspec.structs.replace(line, quantity=1000) if line.dimension == "device_ms" else line
        for line in settled.lines
    ]
    return msgspec.structs.replace(settled, lines=lines)


async def test_only_the_operator_sees_books_and_earnings(office: Office) -> None:
    for path in ("/api/reconciliation/", "/api/reconciliation/history", "/api/earnings"):
        assert (await office.get(path, office.other)).status_code == 403, path
        assert (await office.get(path)).status_code == 200, path
    answer = await office.http.post("/api/reconciliation/", headers=office.other.bearer)
    assert answer.status_code == 403
    body = {"hour_nano": 1}
    answer = await office.http.put("/api/device-cost", json=body, headers=office.other.bearer)
    assert answer.status_code == 403
    for path in ("/console/books", "/console/earnings", "/console/earnings.csv"):
        assert (await office.page(path, office.other)).status_code == 403, path
        assert (await office.page(path)).status_code == 200, path


async def test_the_books_are_compared_when_asked(office: Office) -> None:
    answer = await office.http.post("/api/reconciliation/", headers=office.operator.bearer)
    run = answer.json()
    assert (run["num_differences"], run["is_alarm"]) == (0, False)
    checks = {check["name"]: check for check in run["checks"]}
    assert checks["usage"]["left"] <= NUM_REQUESTS * 410_100
    assert checks["balances"]["left"] == checks["balances"]["right"] == -NUM_REQUESTS * 410_100
    assert checks["stripe"]["skipped"] == "This box takes no payments through Stripe."
    assert (await office.get("/api/reconciliation/")).json()["id"] == run["id"]
    page = (await office.page("/console/books")).text
    assert "$0.049212000" in page
    assert "The books differ" not in page


async def test_a_difference_is_on_the_page_and_in_its_history(office: Office) -> None:
    async with office.application.state.database.write() as session:
        await session.execute(
            text("UPDATE account_balance SET posted_nano = 7 WHERE organization_id = 'org_1'")
        )
    sent = await office.send("/console/books", {})
    assert sent.headers["location"] == "/console/books?notice=compared"
    once = (await office.page("/console/books")).text
    assert "looking again" in once
    await office.send("/console/books", {})
    page = (await office.page("/console/books")).text
    assert "The books differ." in page
    assert "org_1" in page
    history = (await office.get("/api/reconciliation/history")).json()["runs"]
    assert history[0]["found"] == ["Balances = ledger: org_1"]
    assert history[0]["num_confirmed"] == 1


async def test_a_leapt_clock_is_confirmed_on_the_page(office: Office) -> None:
    seen_at = clock.now() - timedelta(days=50)
    assert "Is it " not in (await office.page("/console/books")).text
    async with office.application.state.database.write() as session:
        data = {"seen_at": seen_at.isoformat(), "is_alarmed": False}
        await mirror.put(session, steady_clock.ROW_ID, "cursor", data)
        assert not await steady_clock.is_steady(session)
    assert "Is it " in (await office.page("/console/books")).text
    for wrong in ("", "soon", "2020-01-01T00:00", "2020-01-01T00:00Z"):
        assert (await office.send("/console/books/clock", {"now": wrong})).status_code in (400, 409)
    assert "Is it " in (await office.page("/console/books")).text
    sent = await office.send("/console/books/clock", {"now": clock.now().isoformat()})
    assert sent.headers["location"] == "/console/books?notice=clock-confirmed"
    assert "Is it " not in (await office.page("/console/books")).text


async def test_earnings_follow_from_the_price_of_the_hour(office: Office) -> None:
    """120 requests of a second at $3.60 an hour cost $0.12."""
    before = (await office.get("/api/earnings")).json()
    assert before["hour_nano"] is None
    assert before["models"][0]["cost_nano"] is None
    body = {"hour_nano": 3_600_000_000}
    set_ = await office.http.put("/api/device-cost", json=body, headers=office.operator.bearer)
    assert set_.json() == {"device": "cpu", "hour_nano": 3_600_000_000, "currency": "usd"}
    found = (await office.get("/api/earnings?utilisation_percent=50&margin_percent=0")).json()
    (model,) = found["models"]
    assert (model["num_requests"], model["device_ms"]) == (120, 120_000)
    assert model["revenue_nano"] == 49_212_000
    assert model["cost_nano"] == 120_000_000
    assert model["margin_nano"] == -70_788_000
    assert model["cost_per_million_output_nano"] == 1_000_000_000
    suggestion = model["suggestion"]
    assert suggestion["required_nano"] == 240_000_000
    output = next(
        price
        for price in suggestion["prices"]
        if (price["dimension"], price["service_class"]) == ("output", "standard")
    )
    assert output["price_nano"] == -(-400_000_000 * 240_000_000 // 49_212_000)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("utilisation_percent=0", "utilisation_percent"),
        ("margin_percent=-1", "margin_percent"),
        ("from=soon", "from"),
        ("from=2026-02-01&to=2026-01-01", "from"),
    ],
)
async def test_what_cannot_be_asked_is_named(office: Office, query: str, param: str) -> None:
    answer = await office.get(f"/api/earnings?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_the_suggested_prices_lead_to_a_preview(office: Office) -> None:
    sent = await office.send("/console/earnings/device-cost", {"hour": "3.60"})
    assert sent.headers["location"] == "/console/earnings?notice=device-cost"
    page = (await office.page("/console/earnings?margin=0")).text
    assert "Suggested for tiny" in page
    form = page[page.index('action="/console/prices/edit"') :]
    fields = dict(
        re.findall(
            r'<input type="hidden" name="([^"]+)" value="([^"]*)">', form[: form.index("</form>")]
        )
    )
    fields.pop("csrf_token")
    preview = await office.send("/console/prices/edit", fields)
    assert preview.status_code == 200
    assert "tiny" in preview.text
    assert (await office.send("/console/prices/edit", fields | {"action": "confirm"})).headers[
        "location"
    ] == "/console/prices?notice=prices-changed"
    items = (await office.get("/api/prices")).json()["items"]
    own = {(i["dimension"], i["service_class"]) for i in items if i["endpoint_name"] == "tiny"}
    assert ("output", "standard") in own


async def test_the_file_has_a_row_for_each_model(office: Office) -> None:
    await office.send("/console/earnings/device-cost", {"hour": "3.60"})
    for file in (
        (await office.page("/console/earnings.csv")).text,
        (await office.get("/api/earnings?format=csv")).text,
    ):
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(file)))
        (row,) = rows
        assert row["model"] == "tiny"
        assert (row["revenue"], row["device_cost"]) == ("0.049212", "0.12")
        assert row["margin_nano"] == "-70788000"
