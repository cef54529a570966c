"""One of everything that an organization can own, under names and amounts that nobody else has;
and the whole database as it is, to see what was moved."""

import asyncio
import json
import re
from datetime import timedelta
from typing import Any

import msgspec
from litestar import Litestar
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.budgets import set_budget
from app.billing.credits import add_lot
from app.billing.ledger import STRIPE_CLEARING, lock_account
from app.billing.payments.notices import notify
from app.billing.payments.profile import open_profile
from app.billing.payments.tables import (
    Invoice,
    InvoiceLine,
    StripeEvent,
    StripeOperation,
    TopUp,
)
from app.core import clock
from app.core.database import Base, Database
from app.core.ids import new_id
from app.deployments.service import CHANGED
from app.deployments.tables import Deployment, Replica
from app.metering.tables import UsageEvent
from app.organizations.invitations import invite
from app.organizations.keys import create_key
from app.organizations.people import create_person
from app.organizations.principal import SCOPES, Principal
from app.registry.tables import Artifact, Upload
from tests.app.console.samples import add_model, add_usage
from tests.app.whole_app import Tenant

MARK = "quibble"  # in every name
AMOUNT_NANO = 7_123_456_000
AMOUNT_CENTS = 712_345
# As money and as numbers.
AMOUNT_MARKS = ("7.123456", "7123456", "712345", "7,123.45")
_ID = re.compile(r"[a-z]+_[0-9a-hjkmnp-tv-z]{26}")

Row = tuple[Any, ...]
Rows = dict[tuple[str, Row], str]


class Owned(msgspec.Struct, frozen=True):
    """Values of path parameters, by their names; all are the organization's own."""

    name: str
    endpoint: str
    key_id: str
    upload_id: str
    request_id: str
    budget_id: str
    notice_id: str
    top_up_id: str
    invoice_id: str
    organization_id: str
    operation_id: str
    event_id: str
    user_id: str
    invitation_id: str


async def add_objects(application: Litestar, tenant: Tenant) -> Owned:
    """The tenant's name and key are marked by the caller."""
    database: Database = application.state.database
    name = f"{MARK}-model"
    async with database.write() as session:
        artifact = Artifact(
            id=new_id("artifact"), digest="0" * 64, size_bytes=1, created_at=clock.now()
        )
        session.add(artifact)
        await session.flush()
        version = await add_model(session, name, owner=tenant.name, artifact_id=artifact.id)
        for deployment in await session.scalars(select(Deployment)):
            deployment.is_stopped = True  # or the box would try to run it
        await session.execute(delete(Replica))
        request_id = await _add_request(session, tenant, name)
        await lock_account(session, tenant.id, "usd")
        await _add_credit(session, tenant)
        budget_id = await set_budget(
            session,
            tenant.id,
            scope="model",
            subject=name,
            subject_name=name,
            period="month",
            limit_nano=AMOUNT_NANO,
        )
        key, _ = await create_key(session, tenant.id, f"{MARK} spare key", frozenset({"inference"}))
        notice_id = await notify(
            session, tenant.id, "low_balance", f"{MARK} has 7.123456 left.", {"left": AMOUNT_NANO}
        )
        assert notice_id is not None
        profile = await open_profile(session, tenant.id)
        profile.email, profile.notify_url = f"{MARK}@example.com", f"https://{MARK}.example/"
        profile.notify_secret = f"nsec_{MARK}"
        profile.card_label = f"{MARK} ending 4242"
        upload = _upload(tenant)
        top_up = _top_up(tenant)
        invoice = _invoice(tenant)
        operation, event = _operation(tenant), _event()
        session.add_all((upload, top_up, invoice, operation, event))
        await session.flush()
        session.add(_line(invoice.id, name))
        user = await create_person(session, tenant.id, f"{MARK}@people.example", "-", "member")
        by = Principal(
            organization_id=tenant.id,
            organization_name=tenant.name,
            cache_salt=b"",
            is_operator=False,
            scopes=SCOPES,
            api_key_id=tenant.key_id,
            api_key_name=f"{MARK} key",
        )
        invitation, _ = await invite(session, by, "member", f"{MARK} friend", 1)
    application.state.storage.upload(upload.id).write_bytes(b"quib")
    assert version.number == 1
    await _seen_by_the_fleet(application, tenant)
    return Owned(
        name=name,
        endpoint=name,
        key_id=key.id,  # calls limit and revoke it: not the caller's own
        upload_id=upload.id,
        request_id=request_id,
        budget_id=budget_id,
        notice_id=notice_id,
        top_up_id=top_up.id,
        invoice_id=invoice.id,
        organization_id=tenant.id,
        operation_id=operation.id,
        event_id=event.id,
        user_id=user.id,
        invitation_id=invitation.id,
    )


async def _seen_by_the_fleet(application: Litestar, tenant: Tenant) -> None:
    """So that it is for the stranger's sake that a call is refused."""
    state = application.state
    state.broadcast.publish(CHANGED)
    principal = (await state.sign_ins.authenticate(tenant.cookies["tapeout_session"])).principal
    async with asyncio.timeout(30):
        while not state.fleet.visible_endpoints(principal):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def _add_request(session: AsyncSession, tenant: Tenant, model: str) -> str:
    request_id = await add_usage(session, owner=tenant.name, model=model)
    event = await session.get_one(UsageEvent, f"{request_id}:1")
    event.api_key_id, event.api_key_name = tenant.key_id, f"{MARK} key"
    event.amount_nano = AMOUNT_NANO
    return request_id


async def _add_credit(session: AsyncSession, tenant: Tenant) -> None:
    await add_lot(
        session,
        tenant.id,
        "paid",
        AMOUNT_NANO,
        source=f"grant:{MARK}",
        currency="usd",
        from_account=STRIPE_CLEARING,
        note=f"{MARK} credit",
    )


def _upload(tenant: Tenant) -> Upload:
    return Upload(
        id=new_id("upload"),
        organization_id=tenant.id,
        filename=f"{MARK}.pt2",
        length_bytes=8,
        received_bytes=4,
        status="receiving",
        created_at=clock.now(),
        expires_at=clock.now() + timedelta(days=1),
    )


def _top_up(tenant: Tenant) -> TopUp:
    return TopUp(
        id=new_id("top"),
        organization_id=tenant.id,
        kind="checkout",
        state="failed",
        amount_cents=AMOUNT_CENTS,
        currency="usd",
        refunded_cents=0,
        disputed_cents=0,
        checkout_session_id=f"cs_{MARK}",
        error=f"{MARK} was declined",
        created_at=clock.now(),
    )


def _invoice(tenant: Tenant) -> Invoice:
    return Invoice(
        id=new_id("inv"),
        number=1,
        organization_id=tenant.id,
        organization_name=tenant.name,
        period=f"{clock.now() - timedelta(days=40):%Y-%m}",
        state="finalised",
        currency="usd",
        usage_nano=AMOUNT_NANO,
        credit_nano=0,
        carry_in_nano=0,
        due_cents=AMOUNT_CENTS,
        carry_out_nano=0,
        error="",
        created_at=clock.now(),
    )


def _operation(tenant: Tenant) -> StripeOperation:
    return StripeOperation(
        id=f"{MARK}-operation",
        kind="charge_card",
        organization_id=tenant.id,
        subject_id="",
        params={},
        state="quarantined",
        next_at=clock.now(),
        error=f"{MARK} is in doubt",
        created_at=clock.now(),
    )


def _event() -> StripeEvent:
    return StripeEvent(
        id=f"evt_{MARK}",
        type="payment_intent.succeeded",
        object_id=f"pi_{MARK}",
        raw=b"{}",
        state="dead",
        next_at=clock.now(),
        received_at=clock.now(),
    )


def _line(invoice_id: str, model: str) -> InvoiceLine:
    return InvoiceLine(
        invoice_id=invoice_id,
        position=1,
        endpoint_name=model,
        dimension="input",
        service_class="standard",
        price_nano=1,
        unit_scale=1,
        quantity=AMOUNT_NANO,
        amount_nano=AMOUNT_NANO,
    )


# --- everything there is ------------------------------------------------------------------


async def read_rows(database: Database) -> Rows:
    """Every row of every table as text, by table and primary key."""
    rows: Rows = {}
    async with database.read() as session:
        for table in Base.metadata.sorted_tables:
            keys = [column.name for column in table.primary_key]
            for row in (await session.execute(select(table))).mappings():
                values = {name: _plain(value) for name, value in row.items()}
                key = tuple(values[name] for name in keys)
                rows[table.name, key] = json.dumps(values, sort_keys=True, default=str)
    return rows


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value


def ids_in(rows: Rows, marks: set[str]) -> set[str]:
    """The ids of rows that mention one of the marks, and of those that mention these."""
    found = set(marks)
    while True:
        more = {
            id
            for (_, key), text in rows.items()
            if any(mark in text for mark in found)
            for id in _ID.findall(str(key[0]))
        }
        if more <= found:
            return found
        found |= more


def differences(before: Rows, after: Rows, marks: set[str]) -> list[str]:
    """Rows that mention one of the marks and are new, changed or gone."""
    told: list[str] = []
    for key in before.keys() | after.keys():
        old, new = before.get(key, ""), after.get(key, "")
        if old != new and any(mark in old + new for mark in marks):
            told.append(f"{key[0]} {key[1]}: {old[:300]} -> {new[:300]}")
    return told
