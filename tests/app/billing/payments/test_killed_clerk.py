"""A process that closes months, sends invoices, ends credit and tells people is killed at every
failpoint of that, and the next one brings it to the one right end."""

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from sqlalchemy import select

from app.billing.ledger import PROMOTIONAL_COST, STRIPE_CLEARING, lock_account, on_account
from app.billing.payments.profile import open_profile
from app.billing.payments.tables import Notice
from app.core.database import Database
from app.settings import Settings
from tests.app.billing.payments.clerk_lives import Life
from tests.app.billing.payments.months import CENT, OPERATOR, ORGANIZATION, Clock, Months
from tests.app.billing.payments.test_notices import Receiver
from tests.evidence.failpoint_names import failpoint_names
from tests.stripe_stand_in.server import StandIn

MODULES = ("expiry", "invoice_books", "invoice_push", "invoices", "notice_delivery", "watches")
OWN = [name for name in failpoint_names() if name.partition(".")[0] in MODULES]
# Of every operation on the way of an invoice to Stripe: customer, draft, lines, finalising.
SENDING = [f"outbox.after_call:{number}" for number in range(1, 5)]
CLOSED_AT = datetime(2026, 2, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def lives() -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.app.billing.payments.clerk_lives"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
async def months(
    database: Database, settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Months]:
    """One organization owes for January, and has credit that ended with it; the operator's own is
    prepaid, has little left, and wants to be told."""
    months = Months(database, settings.sync_database_url, Clock(monkeypatch, "2026-01-10"))
    await months.add_organizations(ORGANIZATION)
    months.use(123 * CENT + 7)
    await months.credit(40 * CENT, expires_at=datetime(2026, 2, 1, tzinfo=UTC))
    await months.credit(CENT, "paid", OPERATOR)
    await months.limit(0, OPERATOR)
    async with database.write() as session:
        for organization_id in (ORGANIZATION, OPERATOR):
            await lock_account(session, organization_id, "usd")
            profile = await open_profile(session, organization_id)
            profile.email = "ada@example.com"
            profile.notify_url, profile.notify_secret = receiver.url, "nsec_test"
    yield months
    months.close()


@pytest.mark.parametrize("place", [*OWN, *SENDING])
async def test_a_killed_clerk_loses_and_doubles_nothing(
    lives: "subprocess.Popen[str]",
    months: Months,
    settings: Settings,
    stripe_stand_in: StandIn,
    receiver: Receiver,
    place: str,
) -> None:
    stripe = stripe_stand_in
    stripe.clock.freeze(int(CLOSED_AT.timestamp()))

    def live(hours: int, failpoint: str = "") -> int:
        life = Life(
            settings.database_url,
            stripe.url,
            stripe.api_key,
            CLOSED_AT + timedelta(hours=hours),
            failpoint,
        )
        assert lives.stdin is not None
        assert lives.stdout is not None
        lives.stdin.write(msgspec.json.encode(life).decode() + "\n")
        lives.stdin.flush()
        return int(lives.stdout.readline())

    assert live(0, place) == -signal.SIGKILL
    assert live(2) == 0
    (there,) = stripe.account.all("invoice")
    assert (there["status"], there["total"]) == ("open", 123)
    stripe.pay_invoice(there["id"])
    assert live(4) == 0

    invoice = await months.invoice()
    assert (invoice.state, invoice.number, invoice.due_cents) == ("paid", 1, 123)
    assert await months.entries(on_account(ORGANIZATION)) == -7
    assert await months.entries(STRIPE_CLEARING) == -123 * CENT
    assert await months.entries(PROMOTIONAL_COST) == 0  # given, and back
    await months.check_books()
    async with months.database.read() as session:
        (told,) = await session.scalars(select(Notice).where(Notice.kind == "low_balance"))
    assert told.delivered_at is not None
    ids = [json.loads(body)["id"] for _, body in receiver.received]
    assert ids.count(told.id) in (1, 2)
