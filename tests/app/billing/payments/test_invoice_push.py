"""An invoice gets to Stripe once, whole and unaltered, or not at all; what becomes of it there
comes into the books."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import select

from app.billing.ledger import BAD_DEBT, OTHER_CLEARING, STRIPE_CLEARING, lock_account, on_account
from app.billing.payments import invoice_ending
from app.billing.payments.calls import Calls
from app.billing.payments.invoice_books import refresh_invoice
from app.billing.payments.invoice_lines import MAX_USAGE_LINES, whole_cents
from app.billing.payments.invoice_push import CreateInvoice, push_invoices
from app.billing.payments.operations import operation_of
from app.billing.payments.profile import set_email
from app.billing.payments.service import Payments
from app.billing.payments.tables import Invoice, Notice, StripeOperation
from app.billing.stripe_objects import Invoice as StripeInvoice
from app.billing.stripe_objects import InvoiceLine
from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, NotFound
from app.core.failpoints import Countdown, Reached, observed
from app.settings import Settings
from tests.app.billing.payments.months import (
    CENT,
    OPERATOR,
    ORGANIZATION,
    Clock,
    Months,
    settlement,
)
from tests.stripe_stand_in.errors import Object
from tests.stripe_stand_in.server import StandIn


class Post:
    """Invoices on their way between a box and its Stripe."""

    def __init__(self, months: Months, settings: Settings, stripe: StandIn) -> None:
        self.months, self.stripe = months, stripe
        self._settings = settings
        self.calls = Calls()
        self.payments = self._new()

    def _new(self) -> Payments:
        async def follow(stripe_invoice_id: str) -> None:
            stripe = self.payments.link.stripe
            await refresh_invoice(self.months.database, stripe, self.calls, stripe_invoice_id)

        kinds = invoice_ending.kinds()
        return Payments(self.months.database, self._settings, kinds, follow)

    async def restart(self) -> None:
        await self.payments.close()
        self.payments = self._new()
        await self.payments.link.outbox.resume()

    async def address(self, email: str = "ada@example.com") -> None:
        async with self.months.database.write() as session:
            await lock_account(session, ORGANIZATION, "usd")
            await set_email(session, ORGANIZATION, email)

    async def close(self, *amounts_nano: int) -> Invoice:
        """January, of these requests."""
        self.months.use(*amounts_nano)
        self.months.clock.set("2026-02-01T01:00:00")
        await self.months.close_months(has_stripe=True)
        return await self.months.invoice()

    async def work(self, rounds: int = 4, minutes: int = 6) -> Invoice:
        """Turns of the clerk, with time between them."""
        for _ in range(rounds):
            await push_invoices(self.months.database, has_stripe=True)
            await self.payments.link.outbox.turn()
            self.months.clock.at += timedelta(minutes=minutes)
        return await self.months.invoice()

    async def sent(self, *amounts_nano: int) -> Invoice:
        await self.address()
        await self.close(*amounts_nano)
        return await self.work()

    async def hear(self) -> Invoice:
        """What Stripe says of it now."""
        invoice = await self.months.invoice()
        assert invoice.stripe_invoice_id is not None
        stripe, id = self.payments.link.stripe, invoice.stripe_invoice_id
        for _ in range(2):  # twice does no harm
            await refresh_invoice(self.months.database, stripe, self.calls, id)
        return await self.months.invoice()

    def at_stripe(self) -> list[Object]:
        found = self.stripe.account.all("invoice")
        return [each for each in found if each["status"] != "draft"]

    def drafts(self) -> list[Object]:
        found = self.stripe.account.all("invoice")
        return [each for each in found if each["status"] == "draft"]

    def lines(self, there: Object) -> list[InvoiceLine]:
        return self.payments.link.stripe.list_invoice_lines(there["id"])

    async def notices(self, kind: str) -> list[Notice]:
        async with self.months.database.read() as session:
            rows = await session.scalars(select(Notice).where(Notice.kind == kind))
            return list(rows)

    async def owed(self) -> int:
        return -await self.months.entries(on_account(ORGANIZATION))


@pytest.fixture
async def post(
    database: Database,
    settings: Settings,
    stripe_stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Post]:
    import msgspec

    settings = msgspec.structs.replace(
        settings,
        stripe_api_key=stripe_stand_in.api_key,
        stripe_api_base=stripe_stand_in.url,
        stripe_webhook_secrets=(stripe_stand_in.webhook_secret,),
    )
    months = Months(database, settings.sync_database_url, Clock(monkeypatch, "2026-01-10"))
    monkeypatch.setattr(stripe_stand_in.clock, "now", lambda: int(clock.now().timestamp()))
    await months.add_organizations(ORGANIZATION)
    post = Post(months, settings, stripe_stand_in)
    yield post
    await months.check_books()
    await post.payments.close()
    post.calls.close()
    months.close()


@given(
    amounts=st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=40),
)
def test_cents_of_lines_add_up_and_none_is_off_by_a_cent(amounts: list[int]) -> None:
    total_cents = sum(amounts) // CENT
    cents = whole_cents(amounts, total_cents)
    assert sum(cents) == total_cents
    assert all(abs(each * CENT - nano) < CENT for each, nano in zip(cents, amounts, strict=True))


async def test_an_invoice_gets_to_stripe_with_our_lines(post: Post) -> None:
    await post.months.credit(10 * CENT + 5)
    await post.address()
    post.months.settle([settlement(33 * CENT + 3_400_000, endpoint_name="big, or so")])
    frozen = await post.close(80 * CENT + 3_400_000, 3_400_000)
    assert frozen.state == "frozen"
    invoice = await post.work()
    assert (invoice.state, invoice.error) == ("finalised", "")
    (there,) = post.at_stripe()
    assert there["id"] == invoice.stripe_invoice_id
    assert there["total"] == invoice.due_cents == 104
    assert there["collection_method"] == "send_invoice"
    assert there["metadata"]["invoice_id"] == invoice.id
    assert invoice.hosted_url == there["hosted_invoice_url"]
    lines = {line.metadata["position"]: line for line in post.lines(there)}
    assert {position: line.amount_cents for position, line in lines.items()} == {
        "1": 33,
        "2": 81,
        "credit": -10,
    }
    assert lines["1"].description == (
        "big, or so, output, standard: 333,400,000 at $0.000000001 per 1 = $0.333400000"
    )
    assert post.drafts() == []


async def test_an_invoice_waits_for_an_address(post: Post) -> None:
    await post.close(100 * CENT)
    assert (await post.work()).state == "frozen"
    (asked,) = await post.notices("invoice_address")
    assert asked.organization_id == ORGANIZATION
    await post.address()
    assert (await post.work()).state == "finalised"
    (asked,) = await post.notices("invoice_address")
    assert asked.ended_at is not None


async def test_hundreds_of_lines_become_as_many_as_stripe_takes(post: Post) -> None:
    post.months.settle(
        [settlement(CENT + i, endpoint_name=f"model-{i:03d}") for i in range(MAX_USAGE_LINES + 60)]
    )
    invoice = await post.sent(100 * CENT)
    assert invoice.state == "finalised"
    (there,) = post.at_stripe()
    lines = post.lines(there)
    assert len(lines) == MAX_USAGE_LINES
    assert there["total"] == invoice.due_cents == sum(line.amount_cents for line in lines)
    assert len(await post.months.lines(invoice)) == MAX_USAGE_LINES + 61


FAULTS = [
    ("lose_request", "invoices$", 1),
    ("lose_reply", "invoices$", 4),
    ("fail_before", "invoices$", 1),
    ("fail_saved", "invoices$", 4),
    ("busy", "invoices$", 4),
    ("lose_reply", "add_lines", 1),
    ("lose_reply", "add_lines", 4),
    ("fail_after", "add_lines", 1),
    ("fail_saved", "add_lines", 4),
    ("bad_gateway", "add_lines", 1),
    ("lose_reply", "finalize", 4),
    ("fail_after", "finalize", 1),
    ("fail_before", "finalize", 4),
    ("locked", "finalize", 4),
    ("lose_reply", "customers", 1),
]


@pytest.mark.parametrize(("fault", "path", "times"), FAULTS)
async def test_whatever_fails_on_the_way_one_invoice_is_finalised(
    post: Post, fault: Any, path: str, times: int
) -> None:
    num_lines = 120 if path == "add_lines" else 2  # in two calls, or in one
    post.stripe.faults.add(fault, path, times=times)
    post.months.settle([settlement(CENT, endpoint_name=f"model-{i}") for i in range(num_lines)])
    await post.address()
    await post.close(100 * CENT)
    await post.work(rounds=2)
    await post.restart()
    for _ in range(12):  # long enough for Stripe to forget its keys in between
        invoice = await post.work(rounds=1, minutes=400)
        if invoice.state == "finalised":
            break
    post.stripe.prune_keys()
    invoice = await post.work(rounds=2, minutes=400)
    assert (invoice.state, invoice.error) == ("finalised", "")
    (there,) = post.at_stripe()
    assert there["total"] == invoice.due_cents == 100 + num_lines
    assert len(post.lines(there)) == num_lines + 1


async def test_stripe_away_for_three_days(post: Post) -> None:
    await post.address()
    await post.close(100 * CENT)
    post.stripe.go_away()
    for _ in range(9):
        assert (await post.work(rounds=1, minutes=480)).state == "frozen"
    post.stripe.start()
    assert (await post.work()).state == "finalised"
    assert len(post.at_stripe()) == 1


PLACES = [
    "invoice_push.before_plan_commit",
    "invoice_push.before_finalise",
    *(
        f"outbox.{place}:{n}"
        for place in ("after_claim_commit", "before_call", "after_call", "before_result_commit")
        for n in (2, 3, 4)
    ),
]


@pytest.mark.parametrize("place", PLACES)
async def test_a_crash_on_the_way_ends_in_one_invoice(post: Post, place: str) -> None:
    def crash(name: str) -> None:
        raise Reached(name)

    await post.address()
    await post.close(100 * CENT)
    crashed = False
    with observed(Countdown(place, crash)):
        for _ in range(6):
            try:
                await post.work(rounds=1)
            except (Reached, BaseExceptionGroup):
                crashed = True
                await post.restart()
    assert crashed
    invoice = await post.work()
    assert invoice.state == "finalised"
    (there,) = post.at_stripe()
    assert there["total"] == 100
    assert len(post.lines(there)) == 1


async def test_an_altered_draft_is_not_finalised(post: Post) -> None:
    await post.address()
    await post.close(100 * CENT)

    altered: list[str] = []

    def alter(name: str) -> None:
        """As soon as our lines are there, before they are compared."""
        for draft in post.drafts():
            if name == "outbox.after_claim_commit" and draft["total"] and not altered:
                altered.append(name)
                post.stripe.add_line_by_hand(draft["id"], 500)

    with observed(alter):
        invoice = await post.work()
    assert invoice.state == "differs"
    assert "600 cents, not 100" in invoice.error
    (draft,) = post.drafts()
    assert post.at_stripe() == []
    (alarm,) = await post.notices("invoice_differs")
    assert alarm.organization_id == OPERATOR

    # A person removes the line, and has it compared again.
    (extra,) = [line for line in post.lines(draft) if not line.metadata]
    post.stripe.account.remove(extra.id)
    draft |= {"total": 100, "subtotal": 100, "amount_due": 100, "amount_remaining": 100}
    async with post.months.database.write() as session:
        await invoice_ending.try_again(session, invoice.id)
    invoice = await post.work()
    assert (invoice.state, invoice.error) == ("finalised", "")
    (alarm,) = await post.notices("invoice_differs")
    assert alarm.ended_at is not None
    assert len(post.at_stripe()) == 1


async def test_what_stripe_refuses_waits_for_a_person(post: Post) -> None:
    post.stripe.faults.add("reject", "invoices$")
    invoice = await post.sent(100 * CENT)
    assert invoice.state == "frozen"
    assert invoice.error
    assert len(await post.notices("invoice_differs")) == 1
    async with post.months.database.write() as session:
        await invoice_ending.try_again(session, invoice.id)
    assert (await post.work()).state == "finalised"
    async with post.months.database.write() as session:
        with pytest.raises(Conflict):
            await invoice_ending.try_again(session, invoice.id)


async def test_a_deleted_draft_can_be_made_again(post: Post) -> None:
    post.stripe.faults.add("reject", "finalize")
    invoice = await post.sent(100 * CENT)
    assert invoice.state == "differs"
    post.payments.link.stripe.delete_draft(invoice.stripe_invoice_id or "")
    invoice = await post.work()
    async with post.months.database.write() as session:
        await invoice_ending.try_again(session, invoice.id)
    invoice = await post.work()  # finds nothing where the draft was
    assert (invoice.state, invoice.stripe_invoice_id) == ("frozen", None)
    async with post.months.database.write() as session:
        await invoice_ending.try_again(session, invoice.id)
    assert (await post.work()).state == "finalised"
    assert len(post.at_stripe()) == 1


async def test_a_draft_made_beside_the_invoice_s_own_is_deleted(post: Post) -> None:
    """By an operation that was long in doubt, whose answer comes after the next one's."""
    await post.address()
    await post.close(100 * CENT)
    while (invoice := await post.work(rounds=1)).stripe_invoice_id is None:
        pass
    async with post.months.database.read() as session:
        query = select(StripeOperation).where(StripeOperation.kind == CreateInvoice.name)
        operation = operation_of((await session.scalars(query)).one())
    stray = CreateInvoice().send(
        post.payments.link.stripe, replace(operation, id=f"{operation.id}~2")
    )
    assert isinstance(stray, StripeInvoice)
    assert stray.id != invoice.stripe_invoice_id
    async with post.months.database.write() as session:
        await lock_account(session, ORGANIZATION, "usd")
        await CreateInvoice().confirmed(session, operation, stray)
    sent = await post.work()
    assert (sent.state, sent.stripe_invoice_id) == ("finalised", invoice.stripe_invoice_id)
    assert post.drafts() == []
    assert [each["id"] for each in post.at_stripe()] == [invoice.stripe_invoice_id]


async def test_an_address_that_comes_after_the_customer_gets_to_stripe(post: Post) -> None:
    # Makes the customer, without an address.
    await post.payments.open_portal(post.months.database.write(), ORGANIZATION)
    await post.address("late@example.com")
    await post.close(500 * CENT)
    assert (await post.work()).state == "finalised"
    await post.address("later@example.com")
    await post.work()
    (customer,) = post.stripe.account.all("customer")
    assert customer["email"] == "later@example.com"


async def test_an_address_that_changes_while_the_customer_is_made(post: Post) -> None:
    await post.address("first@example.com")

    def change(name: str) -> None:
        raise Reached(name)

    with observed(Countdown("outbox.after_call", change)), suppress(Reached):
        await post.payments.open_portal(post.months.database.write(), ORGANIZATION)
    await post.address("second@example.com")
    await post.close(500 * CENT)
    assert (await post.work()).state == "finalised"
    (customer,) = post.stripe.account.all("customer")
    assert customer["email"] == "second@example.com"


async def test_what_an_invoice_asks_for_is_not_paid_by_a_top_up_too(post: Post) -> None:
    """Postpaid until it had an invoice, and prepaid from then on."""
    months, top_up_nano = post.months, 150 * CENT
    invoice = await post.sent(100 * CENT)
    months.clock.set("2026-02-02T00:00:00")
    months.use(20 * CENT)  # on no invoice yet
    await months.limit(0)
    await months.credit(top_up_nano, "paid")
    assert await post.owed() == 100 * CENT
    assert (await months.account()).posted_nano == 30 * CENT
    post.stripe.pay_invoice(invoice.stripe_invoice_id or "")
    await post.hear()
    assert await post.owed() == 0
    assert (await months.account()).posted_nano == 130 * CENT


@contextmanager
def unknown_to_stripe(post: Post, stripe_invoice_id: str) -> Iterator[None]:
    """As under the key of another account."""
    objects = post.stripe.account._objects
    kept = objects.pop(stripe_invoice_id)
    yield
    objects[stripe_invoice_id] = kept


async def test_what_is_to_be_paid_is_never_taken_for_deleted(post: Post) -> None:
    invoice = await post.sent(100 * CENT)
    with unknown_to_stripe(post, invoice.stripe_invoice_id or ""):
        held_back = await post.hear()
    assert (held_back.state, held_back.stripe_invoice_id) == (
        "finalised",
        invoice.stripe_invoice_id,
    )
    assert "Stripe does not know it" in held_back.error
    (alarm,) = await post.notices("invoice_differs")
    assert alarm.organization_id == OPERATOR
    async with post.months.database.write() as session:
        with pytest.raises(Conflict):
            await invoice_ending.try_again(session, invoice.id)
    invoice = await post.hear()
    assert (invoice.state, invoice.error) == ("finalised", "")
    (alarm,) = await post.notices("invoice_differs")
    assert alarm.ended_at is not None
    assert len(post.at_stripe()) == 1


async def test_what_is_to_be_paid_is_not_void_because_it_is_not_found(post: Post) -> None:
    invoice = await post.sent(100 * CENT)
    async with post.months.database.write() as session:
        await invoice_ending.give_up(session, invoice.id, "void")
    with unknown_to_stripe(post, invoice.stripe_invoice_id or ""):
        invoice = await post.work()
    assert invoice.state == "finalised"
    assert "No such invoice" in invoice.error
    assert await post.owed() == 100 * CENT


async def test_a_lost_ending_is_not_taken_for_a_deleted_draft(post: Post) -> None:
    """An earlier attempt may have reached Stripe: the invoice is looked for, and not found."""
    invoice = await post.sent(100 * CENT)
    async with post.months.database.write() as session:
        await invoice_ending.give_up(session, invoice.id, "void")
        (row,) = await session.scalars(
            select(StripeOperation).where(StripeOperation.kind == "end_invoice")
        )
        row.state, row.first_sent_at = "unknown", clock.now()
    with unknown_to_stripe(post, invoice.stripe_invoice_id or ""):
        assert (await post.work()).state == "finalised"
    assert (await post.work()).state == "void"


async def test_a_credit_note_is_not_cash(post: Post) -> None:
    invoice = await post.sent(500 * CENT)
    there = post.stripe.account.get("invoice", invoice.stripe_invoice_id or "")
    there |= {"status": "paid", "amount_due": 300, "amount_paid": 300, "amount_remaining": 0}
    there |= {"pre_payment_credit_notes_amount": 200}
    assert (await post.hear()).state == "paid"
    assert await post.owed() == 0
    assert await post.months.entries(STRIPE_CLEARING) == -300 * CENT
    assert await post.months.entries(OTHER_CLEARING) == 0
    assert await post.months.entries(BAD_DEBT) == -200 * CENT
    (alarm,) = await post.notices("invoice_short")
    assert "2.00" in alarm.message


async def test_paying_brings_the_money_into_the_books(post: Post) -> None:
    invoice = await post.sent(100 * CENT + 7)
    assert await post.owed() == 100 * CENT + 7
    post.stripe.pay_invoice(invoice.stripe_invoice_id or "")
    invoice = await post.hear()
    assert invoice.state == "paid"
    assert invoice.paid_at is not None
    assert await post.owed() == 7
    assert await post.months.entries(STRIPE_CLEARING) == -100 * CENT
    (told,) = await post.notices("invoice")
    assert told.ended_at is not None


@pytest.mark.parametrize("is_reversed", [False, True])
async def test_webhooks_in_any_order_and_number_come_to_the_same(
    post: Post, is_reversed: bool
) -> None:
    invoice = await post.sent(100 * CENT)
    id = invoice.stripe_invoice_id or ""
    post.stripe.pay_invoice(id, "4000000000000002")
    post.stripe.pay_invoice(id)
    told = list(post.stripe.webhooks.take())
    for delivery in [*told, *told][:: -1 if is_reversed else 1]:
        assert delivery.headers is not None
        await post.payments.receive(delivery.body, delivery.headers["Stripe-Signature"])
        await post.payments.link.inbox.turn()
    invoice = await post.months.invoice()
    assert invoice.state == "paid"
    assert await post.owed() == 0
    # All that is at Stripe is what was paid less its fee.
    balance = sum(each["net"] for each in post.stripe.account.all("balance_transaction"))
    assert -await post.months.entries(STRIPE_CLEARING) == balance * CENT
    assert balance < 100


async def test_a_refund_of_a_paid_invoice_is_on_the_next(post: Post) -> None:
    invoice = await post.sent(100 * CENT)
    post.stripe.pay_invoice(invoice.stripe_invoice_id or "")
    assert (await post.hear()).state == "paid"
    (payment,) = post.stripe.account.all("payment_intent")
    post.stripe.refund_by_hand(payment["id"], 60)
    for delivery in post.stripe.webhooks.take():
        assert delivery.headers is not None
        await post.payments.receive(delivery.body, delivery.headers["Stripe-Signature"])
    await post.payments.link.inbox.turn()
    post.months.clock.set("2026-03-01T01:00:00")
    await post.months.close_months(has_stripe=True)
    _, second = await post.months.invoices()
    assert (second.usage_nano, second.carry_in_nano, second.due_cents) == (0, 60 * CENT, 60)


async def test_a_declined_card_makes_it_past_due_until_it_is_paid(post: Post) -> None:
    invoice = await post.sent(100 * CENT)
    id = invoice.stripe_invoice_id or ""
    post.stripe.pay_invoice(id, "4000000000000002")
    assert (await post.hear()).state == "past_due"
    (told,) = await post.notices("invoice_past_due")
    assert "declined" in told.message
    post.stripe.pay_invoice(id)
    assert (await post.hear()).state == "paid"
    (told,) = await post.notices("invoice_past_due")
    assert told.ended_at is not None
    assert await post.owed() == 0


async def test_what_is_not_paid_in_time_is_past_due(post: Post) -> None:
    await post.sent(100 * CENT)
    assert (await post.hear()).state == "finalised"
    post.months.clock.at += timedelta(days=31)
    assert (await post.hear()).state == "past_due"


async def test_void_at_stripe_is_written_off(post: Post) -> None:
    invoice = await post.sent(100 * CENT)
    post.stripe.void_by_hand(invoice.stripe_invoice_id or "")
    assert (await post.hear()).state == "void"
    assert await post.owed() == 0
    assert await post.months.entries(BAD_DEBT) == -100 * CENT


async def test_given_up_and_paid_after_all(post: Post) -> None:
    invoice = await post.sent(100 * CENT)
    async with post.months.database.write() as session:
        await invoice_ending.give_up(session, invoice.id, "uncollectible")
    invoice = await post.work()
    assert invoice.state == "uncollectible"
    assert await post.months.entries(BAD_DEBT) == -100 * CENT
    post.stripe.pay_invoice(invoice.stripe_invoice_id or "")
    assert (await post.hear()).state == "paid"
    assert await post.months.entries(BAD_DEBT) == 0
    assert await post.months.entries(STRIPE_CLEARING) == -100 * CENT
    assert await post.owed() == 0


async def test_a_draft_that_is_voided_here_is_deleted_there(post: Post) -> None:
    post.stripe.faults.add("reject", "finalize")
    invoice = await post.sent(100 * CENT)
    async with post.months.database.write() as session:
        await invoice_ending.give_up(session, invoice.id, "void")
    invoice = await post.work()
    assert (invoice.state, invoice.error) == ("void", "")
    assert post.drafts() == post.at_stripe() == []
    assert await post.owed() == 0


async def test_paid_another_way(post: Post) -> None:
    invoice = await post.close(100 * CENT)  # no address: never gets to Stripe
    for _ in range(2):
        async with post.months.database.write() as session:
            await invoice_ending.mark_paid(session, invoice.id)
    await post.address()
    invoice = await post.work()
    assert invoice.state == "paid"
    assert await post.owed() == 0
    assert await post.months.entries(OTHER_CLEARING) == -100 * CENT
    assert post.drafts() == post.at_stripe() == []
    async with post.months.database.write() as session:
        with pytest.raises(Conflict):
            await invoice_ending.give_up(session, invoice.id, "void")
        with pytest.raises(NotFound):
            await invoice_ending.mark_paid(session, "inv_x")


async def test_what_is_at_stripe_is_marked_paid_there(post: Post) -> None:
    invoice = await post.sent(100 * CENT)
    async with post.months.database.write() as session:
        with pytest.raises(Conflict, match="at Stripe"):
            await invoice_ending.mark_paid(session, invoice.id)
    there = post.stripe.account.get("invoice", invoice.stripe_invoice_id or "")
    there |= {"status": "paid", "amount_paid": 0, "amount_remaining": 0}
    assert (await post.hear()).state == "paid"
    assert await post.months.entries(OTHER_CLEARING) == -100 * CENT


async def test_without_stripe_an_invoice_is_ready_as_it_is(post: Post) -> None:
    await post.close(100 * CENT)
    assert await push_invoices(post.months.database, has_stripe=False) == 1
    assert (await post.months.invoice()).state == "finalised"
