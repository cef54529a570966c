"""Payments over HTTP: who may do what, what is refused, and the webhook as Stripe posts it."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from litestar import Litestar
from litestar.datastructures import State

from app.api import billing, payments
from app.api.arriving import ArrivingBodies
from app.api.errors import EXCEPTION_HANDLERS
from app.billing.clerk import Clerk
from app.billing.payments.service import Payments
from app.billing.payments.tables import StripeEvent
from app.core.database import Database
from app.organizations.keys import KeyRing
from app.organizations.service import create_organization
from app.settings import Settings
from tests.app.api.management.callers import Caller, make_caller
from tests.app.billing.payments.cashier import Cashier
from tests.app.conftest import ADMIN_KEY

OPERATOR = {"Authorization": f"Bearer {ADMIN_KEY}"}
ROUTES = [
    ("GET", "/api/billing", None),
    ("POST", "/api/billing/top-ups", {"amount": "25"}),
    ("GET", "/api/billing/top-ups/top_1", None),
    ("POST", "/api/billing/portal", {}),
    ("PUT", "/api/billing/recharge", {"below": "5", "amount": "25"}),
    ("PUT", "/api/billing/contact", {"email": "a@b.example"}),
    ("POST", "/api/billing/refunds", {"top_up_id": "top_1", "amount": "1"}),
]


@pytest.fixture
async def client(cashier: Cashier) -> AsyncIterator[httpx.AsyncClient]:
    async with served(cashier.database, cashier.settings, cashier.payments) as client:
        yield client


def served(database: Database, settings: Settings, service: Payments) -> httpx.AsyncClient:
    state: dict[str, Any] = {
        "settings": settings,
        "database": database,
        "key_ring": KeyRing(database),
        "payments": service,
        "clerk": Clerk(),
        "arriving": ArrivingBodies(settings.max_request_bytes),
    }
    app = Litestar(
        route_handlers=[billing.router, billing.webhook_router, payments.router],
        exception_handlers=EXCEPTION_HANDLERS,  # type: ignore[arg-type]
        state=State(state),
        request_max_body_size=settings.max_request_bytes,
        logging_config=None,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://box")


@pytest.fixture
async def caller(cashier: Cashier) -> Caller:
    return await make_caller(cashier.database, cashier.organization_id)


@pytest.fixture
async def stranger(cashier: Cashier) -> Caller:
    async with cashier.database.write() as session:
        organization = await create_organization(session, "other")
    return await make_caller(cashier.database, organization.id)


async def test_from_paying_ahead_to_the_refund(
    cashier: Cashier, client: httpx.AsyncClient, caller: Caller
) -> None:
    made = await client.post(
        "/api/billing/top-ups", json={"amount": "25.00"}, headers=caller.headers
    )
    assert made.status_code == 201
    top_up = made.json()
    assert (top_up["state"], top_up["amount"]) == ("pending", "25.00")
    assert top_up["url"].startswith(cashier.stripe.url)
    (session,) = cashier.stripe.account.all("checkout.session")
    cashier.stripe.pay_checkout(session["id"])
    for delivery in cashier.stripe.webhooks.take():
        answer = await client.post(
            "/webhooks/stripe", content=delivery.body, headers=delivery.headers
        )
        assert answer.status_code == 200
    await cashier.payments.link.inbox.turn()

    path = f"/api/billing/top-ups/{top_up['id']}"
    seen = (await client.get(path, headers=caller.headers)).json()
    assert (seen["state"], seen["url"]) == ("paid", None)
    refund = await client.post(
        "/api/billing/refunds",
        json={"top_up_id": top_up["id"], "amount": "5"},
        headers=OPERATOR,
    )
    assert refund.json()["state"] == "confirmed"
    state = (await client.get("/api/billing", headers=caller.headers)).json()
    assert state["balance_nano"] == 20 * 10**9
    assert state["card"] == "Visa ending 4242"
    assert [lot["remaining_nano"] for lot in state["lots"]] == [20 * 10**9]
    assert [(each["id"], each["refunded"]) for each in state["top_ups"]] == [(top_up["id"], "5.00")]
    await cashier.hear()
    await cashier.check()


async def test_settings_are_kept(client: httpx.AsyncClient, caller: Caller) -> None:
    recharge = {"below": "5.00", "amount": "25.00"}
    answer = await client.put("/api/billing/recharge", json=recharge, headers=caller.headers)
    assert answer.json() == recharge | {"paused": ""}
    email = {"email": "bills@acme.example"}
    answer = await client.put("/api/billing/contact", json=email, headers=caller.headers)
    assert answer.json() == email
    state = (await client.get("/api/billing", headers=caller.headers)).json()
    assert state["recharge"] == recharge | {"paused": ""}
    assert state["email"] == "bills@acme.example"
    ended = {"below": None, "amount": None}
    answer = await client.put("/api/billing/recharge", json=ended, headers=caller.headers)
    assert answer.json() == ended | {"paused": ""}


async def test_the_portal_opens_for_who_never_paid(
    cashier: Cashier, client: httpx.AsyncClient, caller: Caller
) -> None:
    answer = await client.post("/api/billing/portal", headers=caller.headers)
    assert answer.json()["url"].startswith(cashier.stripe.url)
    assert len(cashier.stripe.account.all("customer")) == 1


async def test_while_stripe_is_away_the_portal_says_so(
    cashier: Cashier, client: httpx.AsyncClient, caller: Caller
) -> None:
    cashier.stripe.go_away()
    answer = await client.post("/api/billing/portal", headers=caller.headers)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "60"
    assert answer.json()["error"]["code"] == "stripe_unavailable"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("top-ups", {"amount": "4.99"}, "amount"),
        ("top-ups", {"amount": "10000.01"}, "amount"),
        ("top-ups", {"amount": "25.001"}, "amount"),
        ("top-ups", {"amount": "-25"}, "amount"),
        ("top-ups", {"amount": "1e3"}, "amount"),
        ("top-ups", {"amount": 25}, "amount"),
        ("recharge", {"below": "5", "amount": None}, "amount"),
        ("recharge", {"below": "5", "amount": "1"}, "amount"),
        ("recharge", {"below": "-1", "amount": "25"}, "below"),
        ("contact", {"email": "nobody"}, "email"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    client: httpx.AsyncClient, caller: Caller, path: str, body: dict[str, Any], param: str
) -> None:
    method = "POST" if path == "top-ups" else "PUT"
    answer = await client.request(method, f"/api/billing/{path}", json=body, headers=caller.headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_nobody_sees_or_pays_for_another(
    cashier: Cashier, client: httpx.AsyncClient, caller: Caller, stranger: Caller
) -> None:
    top_up = await cashier.pay()
    answer = await client.get(f"/api/billing/top-ups/{top_up.id}", headers=stranger.headers)
    assert answer.status_code == 404
    state = (await client.get("/api/billing", headers=stranger.headers)).json()
    assert (state["balance_nano"], state["lots"], state["top_ups"]) == (0, [], [])
    refund = {"top_up_id": top_up.id, "amount": "1"}
    for headers in (stranger.headers, caller.headers):
        answer = await client.post("/api/billing/refunds", json=refund, headers=headers)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "operator_only"


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_a_key_without_the_scope_may_nothing(
    cashier: Cashier, client: httpx.AsyncClient, method: str, path: str, body: Any
) -> None:
    scopes = frozenset({"inference", "read", "write"})
    lacking = await make_caller(cashier.database, cashier.organization_id, scopes)
    answer = await client.request(method, path, json=body, headers=lacking.headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "missing_scope"
    assert (await client.request(method, path, json=body)).status_code == 401


@pytest.mark.parametrize(
    ("content", "header", "status"),
    [
        (b"{}", None, 400),
        (b"{}", "t=1,v1=00", 400),
        (b"x" * (billing.MAX_WEBHOOK_BYTES + 1), "t=1,v1=00", 413),
    ],
)
async def test_a_webhook_that_stripe_did_not_sign_is_refused(
    cashier: Cashier, client: httpx.AsyncClient, content: bytes, header: str | None, status: int
) -> None:
    headers = {} if header is None else {"Stripe-Signature": header}
    answer = await client.post("/webhooks/stripe", content=content, headers=headers)
    assert answer.status_code == status
    assert await cashier.events() == []


async def test_without_stripe_the_operator_is_told_what_to_set(
    cashier: Cashier, caller: Caller
) -> None:
    settings = msgspec.structs.replace(cashier.settings, stripe_api_key="")
    service = Payments(cashier.database, settings)
    async with served(cashier.database, settings, service) as client:
        state = (await client.get("/api/billing", headers=caller.headers)).json()
        assert state["takes_payments"] is False
        for method, path, body in ROUTES[1:]:
            if "top-ups/" in path or "contact" in path:
                continue
            headers = OPERATOR if "refunds" in path else caller.headers
            answer = await client.request(method, path, json=body, headers=headers)
            assert answer.status_code == 409, path
            assert answer.json()["error"]["code"] == "stripe_not_configured"
            assert "TAPEOUT_STRIPE_API_KEY" in answer.json()["error"]["message"]
        answer = await client.post("/webhooks/stripe", content=b"{}")
        assert answer.status_code == 409
    await service.recharge()
    await service.resume()
    await service.close()


async def test_the_operator_decides_what_is_in_doubt(
    cashier: Cashier, client: httpx.AsyncClient, caller: Caller
) -> None:
    top_up = await cashier.pay()
    cashier.stripe.faults.add("lose_reply", "/v1/refunds$")
    operation = await cashier.refund(top_up.id, 100)
    async with cashier.database.write() as session:
        (await session.merge(operation)).state = "quarantined"
        (event_id, *_) = [each.id for each in await cashier.events()]
        (await session.get_one(StripeEvent, event_id)).state = "dead"
    unfinished = (await client.get("/api/payments/unfinished", headers=OPERATOR)).json()
    assert [each["state"] for each in unfinished["operations"]] == ["quarantined"]
    assert [each["state"] for each in unfinished["events"]] == ["dead"]

    decide, revive = f"/api/payments/operations/{operation.id}", f"/api/payments/events/{event_id}"
    assert (await client.get("/api/payments/unfinished", headers=caller.headers)).status_code == 403
    for path in (decide, revive):
        answer = await client.post(path, json={"action": "look"}, headers=caller.headers)
        assert answer.status_code == 403
    answer = await client.post(decide, json={"action": "look"}, headers=OPERATOR)
    assert answer.json()["state"] == "confirmed"
    answer = await client.post(decide, json={"action": "abandon"}, headers=OPERATOR)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_in_doubt")
    assert (await client.post(revive, headers=OPERATOR)).json()["state"] == "done"
    assert (await client.post(revive, headers=OPERATOR)).status_code == 404
    await cashier.hear()
    await cashier.check()
