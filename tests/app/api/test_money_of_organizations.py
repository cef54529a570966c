"""The operator makes organizations, trusts them with money and gives them credit; each sees its
own invoices, credit and notices."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import httpx
import pytest
from litestar import Litestar

from app.billing.archiving import archive_before
from app.billing.payments import steady_clock
from app.billing.payments.invoices import MonthCloser
from app.billing.rating import Settlement
from app.core import clock
from app.core.database import Database, create_writer_engine
from app.settings import Settings
from tests.app import whole_app
from tests.app.billing.payments.months import CENT, Clock, Months, settlement
from tests.app.conftest import ADMIN_KEY

OPERATOR = {"Authorization": f"Bearer {ADMIN_KEY}"}


class Box:
    """The whole application, and its operator at the other end."""

    def __init__(self, application: Litestar, client: httpx.AsyncClient, months: Months) -> None:
        self.application, self.client, self.months = application, client, months

    async def get(self, path: str, headers: dict[str, str] = OPERATOR) -> httpx.Response:
        return await self.client.get(f"/api/{path}", headers=headers)

    async def send(
        self, path: str, body: Any, headers: dict[str, str] = OPERATOR, method: str = "POST"
    ) -> httpx.Response:
        return await self.client.request(method, f"/api/{path}", headers=headers, json=body)

    async def make(self, name: str, **body: Any) -> tuple[str, dict[str, str]]:
        """An organization's id and what its owner sends."""
        made = (await self.send("organizations", {"name": name, **body})).json()
        return made["organization"]["id"], {"Authorization": f"Bearer {made['secret']}"}

    async def close_january(self) -> None:
        self.months.clock.set("2026-02-01T01:00:00")
        await MonthCloser(self.months.database, "usd", has_stripe=False).turn()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """On a thread: what the application writes meanwhile needs the event loop to end."""
        await asyncio.to_thread(self.months.settle, settlements)

    async def archive(self) -> None:
        """All that there is."""
        state = self.application.state
        await state.sealer.turn()
        engine = create_writer_engine(state.settings.sync_database_url)
        before = clock.now() + timedelta(days=2)
        assert await asyncio.to_thread(archive_before, engine, state.records.archive, before)
        engine.dispose()


@pytest.fixture
async def box(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Box]:
    stopped = Clock(monkeypatch, "2026-01-10")
    async with (
        whole_app.running(settings) as application,
        whole_app.client(application) as client,
    ):
        # The tests themselves have done what the clerk would do beside them.
        await application.state.clerk.close()
        database: Database = application.state.database
        months = Months(database, settings.sync_database_url, stopped)
        yield Box(application, client, months)
        months.close()


async def test_an_organization_is_made_prepaid_with_a_key_of_its_owner(box: Box) -> None:
    made = await box.send("organizations", {"name": " acme "})
    assert made.status_code == 201
    standing = made.json()["organization"]
    assert (standing["name"], standing["mode"], standing["balance_nano"]) == ("acme", "prepaid", 0)
    owner = {"Authorization": f"Bearer {made.json()['secret']}"}
    own = (await box.get("organization", owner)).json()
    assert (own["id"], own["spending_limit"]) == (standing["id"], "0.00")
    assert (await box.send("keys", {"name": "second"}, owner)).status_code == 201
    again = await box.send("organizations", {"name": "acme"})
    assert (again.status_code, again.json()["error"]["param"]) == (409, "name")
    for name in ("", " ", "x" * 81, "a\nb"):
        assert (await box.send("organizations", {"name": name})).status_code == 400
    for path in ("organizations", f"organizations/{standing['id']}/credits"):
        refused = await box.send(path, {"name": "b", "amount_nano": 1}, owner)
        assert refused.status_code in (400, 403)
    assert (await box.get("organizations", owner)).status_code == 403


async def test_how_much_is_owed_is_the_operators_to_say(box: Box) -> None:
    acme, owner = await box.make("acme", spending_limit="10")
    for limit, mode in ((None, "unlimited"), ("25.50", "limited"), ("0", "prepaid")):
        changed = await box.send(f"organizations/{acme}", {"spending_limit": limit}, method="PATCH")
        assert (changed.status_code, changed.json()["mode"]) == (200, mode)
    for body in ({"spending_limit": "x"}, {"spending_limit": "-1"}, {}):
        refused = await box.send(f"organizations/{acme}", body, method="PATCH")
        assert refused.status_code == 400
    body = {"spending_limit": None}
    assert (await box.send("organizations/org_x", body, method="PATCH")).status_code == 404
    assert (await box.send(f"organizations/{acme}", body, owner, method="PATCH")).status_code == 403
    assert (await box.send("organization", body, owner, method="PATCH")).status_code == 403


async def test_credit_is_given_once_for_each_key(box: Box) -> None:
    acme, owner = await box.make("acme")
    body = {"amount_nano": 500 * CENT, "expires_at": "2026-06-01T00:00:00Z", "note": "Welcome"}
    key = OPERATOR | {"Idempotency-Key": "gift 1"}
    path = f"organizations/{acme}/credits"
    first = await box.send(path, body, key)
    assert first.status_code == 201
    assert (await box.send(path, body, key)).json() == first.json()
    other = await box.send(path, body | {"amount_nano": 1}, key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    for change in ({"priority": 49}, {"expires_at": "2026-06-02T00:00:00Z"}, {"note": "Hi"}):
        other = await box.send(path, body | change, key)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert "until 2026-06-01 00:00 UTC, note 'Welcome'" in other.json()["error"]["message"]
    paid = await box.send(
        path, {"amount_nano": 7, "kind": "paid"}, OPERATOR | {"Idempotency-Key": "2"}
    )
    assert paid.status_code == 201
    (standing,) = [
        each
        for each in (await box.get("organizations")).json()["organizations"]
        if each["id"] == acme
    ]
    assert standing["credit_nano"] == standing["balance_nano"] == 500 * CENT + 7
    lots = (await box.get("credits", owner)).json()["credits"]
    assert sorted(lot["amount_nano"] for lot in lots) == [7, 500 * CENT]
    assert (await box.get("credits")).json() == {"credits": []}  # the operator's own
    for wrong in (
        {"amount_nano": 0},
        {"amount_nano": -1},
        {"amount_nano": 10**19},
        {"amount_nano": 1, "kind": "stolen"},
        {"amount_nano": 1, "priority": 101},
        {"amount_nano": 1, "note": "x" * 201},
        {"amount_nano": 1, "expires_at": "2026-01-01T00:00:00Z"},
        {"amount_nano": 1, "expires_at": "2027-01-01T00:00:00"},
    ):
        another = OPERATOR | {"Idempotency-Key": "3"}
        assert (await box.send(path, wrong, another)).status_code == 400, wrong
    assert (await box.send(path, body)).status_code == 400  # no key
    assert (await box.send("organizations/org_x/credits", body, key)).status_code == 404


async def test_credit_that_has_ended_is_answered_as_it_was_given(box: Box) -> None:
    acme, _ = await box.make("acme")
    body = {"amount_nano": 500 * CENT, "expires_at": "2026-06-01T00:00:00Z"}
    key = OPERATOR | {"Idempotency-Key": "gift 1"}
    first = await box.send(f"organizations/{acme}/credits", body, key)
    box.months.clock.set("2026-06-01T00:00:00")
    again = await box.send(f"organizations/{acme}/credits", body, key)
    assert (again.status_code, again.json()) == (201, first.json())
    late = await box.send(
        f"organizations/{acme}/credits", body, OPERATOR | {"Idempotency-Key": "gift 2"}
    )
    assert (late.status_code, late.json()["error"]["param"]) == (400, "expires_at")


async def test_an_invoice_is_read_down_to_its_requests(box: Box) -> None:
    acme, owner = await box.make("acme", spending_limit=None)
    _, stranger = await box.make("other")
    await box.settle(
        [settlement(10 * CENT + i, acme, request_id=f"req_{i:03d}") for i in range(7)]
        + [settlement(90 * CENT, acme, endpoint_name="big", waived_nano=11)]
    )
    await box.close_january()
    await box.settle([settlement(1, acme)])  # February's
    (shown,) = (await box.get("invoices", owner)).json()["invoices"]
    assert (shown["period"], shown["due_cents"], shown["state"]) == ("2026-01", 160, "finalised")
    path = f"invoices/{shown['id']}"
    invoice = (await box.get(path, owner)).json()
    assert [line["endpoint_name"] for line in invoice["lines"]] == ["big", "tiny"]
    assert [(line["dimension"], line["quantity"]) for line in invoice["waived"]] == [("input", 11)]
    assert invoice["open_nano"] == 160 * CENT

    found: list[str] = []
    after = ""
    while True:
        query = f"{path}/lines/2/requests?limit=3&after={after}"
        page = (await box.get(query, owner)).json()
        assert page["is_complete"]
        found += [request["request_id"] for request in page["requests"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert found == [f"req_{6 - i:03d}" for i in range(7)]  # they ended at the same instant
    for wrong in ("req_003", "2026-01-01~req_003", "~"):
        refused = await box.get(f"{path}/lines/2/requests?after={wrong}", owner)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "after")

    await box.archive()  # as while fewer days were kept than now
    page = (await box.get(f"{path}/lines/2/requests", owner)).json()
    assert (page["requests"], page["is_complete"]) == ([], False)

    csv = await box.get(f"{path}.csv", owner)
    assert csv.headers["content-type"].startswith("text/csv")
    rows = csv.text.replace('"', "").splitlines()
    assert rows[1].startswith("1,big,standard,output,900000000,0.000000001,1,0.90,usd")
    assert rows[-1].startswith("due,,,,,,,1.60,usd")

    for foreign in (path, f"{path}.csv", f"{path}/lines/1/requests", "invoices/inv_x"):
        assert (await box.get(foreign, stranger)).status_code == 404
    assert (await box.get(f"{path}/lines/9/requests", owner)).status_code == 404
    assert (await box.get(path)).status_code == 200  # the operator
    assert (await box.get("invoices", stranger)).json() == {"invoices": [], "next": None}
    assert (await box.get("invoices?all=true", owner)).status_code == 403
    assert len((await box.get("invoices?all=true")).json()["invoices"]) == 1


@pytest.mark.parametrize("was_posted", [True, False])
async def test_what_was_in_the_journal_while_the_box_was_off_is_behind_its_line(
    box: Box, was_posted: bool
) -> None:
    acme, owner = await box.make("acme", spending_limit=None)
    late = settlement(100 * CENT, acme, request_id="req_late")  # it ended in January
    if was_posted:
        await box.settle([settlement(1, acme)])
    box.months.clock.set("2026-03-20T00:00:00")
    await box.settle([late, settlement(5 * CENT, acme, request_id="req_march")])
    async with box.months.database.write() as session:
        await steady_clock.confirm(session, clock.now())
    box.months.clock.set("2026-04-01T01:00:00")
    await MonthCloser(box.months.database, "usd", has_stripe=False).turn()
    invoices = (await box.get("invoices", owner)).json()["invoices"]
    (march,) = [shown for shown in invoices if shown["period"] == "2026-03"]
    page = (await box.get(f"invoices/{march['id']}/lines/1/requests", owner)).json()
    assert [each["request_id"] for each in page["requests"]] == ["req_march", "req_late"]


async def test_the_operator_ends_invoices(box: Box) -> None:
    ids = [(await box.make(name, spending_limit=None))[0] for name in ("a", "b", "c")]
    for organization_id in ids:
        await box.settle([settlement(100 * CENT, organization_id)])
    await box.close_january()
    found = (await box.get("invoices?all=true")).json()["invoices"]
    a, b, c = sorted(each["id"] for each in found)
    paid = await box.send(f"invoices/{a}/paid", None)
    assert (paid.status_code, paid.json()["state"], paid.json()["open_nano"]) == (200, "paid", 0)
    void = await box.send(f"invoices/{b}/end", {"state": "void"})
    assert void.json()["state"] == "void"
    given_up = await box.send(f"invoices/{c}/end", {"state": "uncollectible"})
    assert given_up.json()["state"] == "uncollectible"
    assert (await box.send(f"invoices/{c}/paid", None)).json()["state"] == "paid"
    assert (await box.send(f"invoices/{a}/end", {"state": "void"})).status_code == 409
    assert (await box.send(f"invoices/{a}/end", {"state": "lost"})).status_code == 400
    assert (await box.send(f"invoices/{a}/retry", None)).status_code == 409
    assert (await box.send("invoices/inv_x/paid", None)).status_code == 404
    owing = [
        each["owed_nano"]
        for each in (await box.get("organizations")).json()["organizations"]
        if each["id"] in ids
    ]
    assert owing == [0, 0, 0]


async def test_an_organization_cannot_end_its_own_invoice(box: Box) -> None:
    acme, owner = await box.make("acme", spending_limit=None)
    await box.settle([settlement(100 * CENT, acme)])
    await box.close_january()
    (shown,) = (await box.get("invoices", owner)).json()["invoices"]
    for act, body in (("paid", None), ("end", {"state": "void"}), ("retry", None)):
        refused = await box.send(f"invoices/{shown['id']}/{act}", body, owner)
        assert refused.status_code == 403


async def test_notices_are_listed_dismissed_and_sent_on(box: Box) -> None:
    acme, owner = await box.make("acme", spending_limit=None)
    _, stranger = await box.make("other")
    await box.settle([settlement(100 * CENT, acme)])
    await box.close_january()
    (notice,) = (await box.get("notices?shown=true", owner)).json()["notices"]
    assert notice["kind"] == "invoice"
    assert "$1.00" in notice["message"]
    path = f"notices/{notice['id']}/dismiss"
    assert (await box.send(path, None, stranger)).status_code == 404
    assert (await box.send(path, None, owner)).status_code == 200
    assert (await box.get("notices?shown=true", owner)).json() == {"notices": []}
    assert len((await box.get("notices", owner)).json()["notices"]) == 1

    body = {"url": "https://example.com/hook", "low_balance": "12.50"}
    kept = (await box.send("notices/settings", body, owner, method="PUT")).json()
    assert (kept["url"], kept["low_balance"]) == (body["url"], "12.50")
    assert (await box.get("notices/settings", owner)).json() == kept
    again = (await box.send("notices/settings", body, owner, method="PUT")).json()
    assert again["secret"] == kept["secret"] != ""
    new = body | {"is_new_secret": True}
    assert (await box.send("notices/settings", new, owner, method="PUT")).json()["secret"] != (
        kept["secret"]
    )
    for wrong in ({"url": "http://example.com"}, {"url": "", "low_balance": "much"}):
        refused = await box.send("notices/settings", wrong, owner, method="PUT")
        assert refused.status_code == 400


async def test_the_month_so_far_is_shown_to_the_operator(box: Box) -> None:
    acme, _ = await box.make("acme", spending_limit=None)
    await box.settle([settlement(5 * CENT, acme)])
    assert clock.now().month == 1
    (standing,) = [
        each
        for each in (await box.get("organizations")).json()["organizations"]
        if each["id"] == acme
    ]
    assert (standing["month_nano"], standing["owed_nano"]) == (5 * CENT, 5 * CENT)
