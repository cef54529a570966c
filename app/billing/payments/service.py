"""Payments as the rest of the box uses them: top-ups, saved cards, refunds, and what Stripe tells.

Owns the client of Stripe and what runs beside the requests. Without an API key of Stripe's there
are no payments: what needs them raises `StripeNotConfigured`.
"""

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from app.billing.ledger import lock_account
from app.billing.payments import following, refunds, top_ups
from app.billing.payments.calls import Calls
from app.billing.payments.inbox import FollowInvoice, Inbox
from app.billing.payments.operations import Kind
from app.billing.payments.outbox import Outbox
from app.billing.payments.profile import CreateCustomer, UpdateCustomer, need_customer, read_profile
from app.billing.payments.recharge import ChargeCard, Recharging
from app.billing.payments.refunds import MakeRefund
from app.billing.payments.tables import StripeOperation, TopUp
from app.billing.payments.top_ups import CreateCheckout
from app.billing.stripe import Stripe
from app.billing.stripe_errors import StripeBusy, StripeError, StripeUnknown
from app.core.database import Database, Transaction
from app.core.errors import Conflict, Unavailable
from app.settings import Settings

# How long a caller is kept waiting for Stripe; what is not done by then goes on behind its back.
PATIENCE_SECONDS = 8
CONSOLE_PATH = "/console/billing"


class StripeNotConfigured(Conflict):
    """Says what the operator has to set."""

    default_code = "stripe_not_configured"

    def __init__(self) -> None:
        super().__init__(
            "This box takes no payments yet: its operator must set TAPEOUT_STRIPE_API_KEY and "
            "TAPEOUT_STRIPE_WEBHOOK_SECRET, and restart it."
        )


class Link(NamedTuple):
    """What needs Stripe."""

    stripe: Stripe
    outbox: Outbox
    inbox: Inbox


async def _no_invoices(_: str) -> None:
    """For a box that sends none."""


class Payments:
    """One per process. `kinds` are operations of others than payments, and `follow_invoice` what
    is done about an invoice that Stripe tells of."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        kinds: Iterable[Kind] = (),
        follow_invoice: FollowInvoice = _no_invoices,
    ) -> None:
        self._database = database
        self._settings = settings
        self._calls = Calls()
        self._tasks: set[asyncio.Task[None]] = set()
        self.recharging = Recharging(database, settings.currency)
        self._link: Link | None = None
        if settings.stripe_api_key:
            stripe = Stripe(settings.stripe_api_key, settings.stripe_api_base)
            own = (CreateCustomer(), UpdateCustomer(), CreateCheckout(), ChargeCard(), MakeRefund())
            self._link = Link(
                stripe,
                Outbox(database, stripe, self._calls, (*own, *kinds), settings.currency),
                Inbox(database, stripe, self._calls, follow_invoice),
            )

    @property
    def is_configured(self) -> bool:
        return self._link is not None

    @property
    def link(self) -> Link:
        """Raises `StripeNotConfigured`."""
        if self._link is None:
            raise StripeNotConfigured
        return self._link

    async def resume(self) -> None:
        """At the start: what an earlier process was at is taken up at once."""
        if self._link is not None:
            await self._link.outbox.resume()
            await self._link.inbox.resume()

    async def close(self) -> None:
        """Leaves what is under way to the next start."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._calls.close()

    # What people ask for is planned in a transaction of theirs, which knows whether they may.

    async def begin_top_up(
        self, transaction: Transaction, organization_id: str, amount_cents: int
    ) -> TopUp:
        """With the address of the page where it is paid, if Stripe gives one soon; else that comes
        later. Raises `StripeNotConfigured`, `Conflict`, `RateLimited`."""
        _ = self.link
        async with transaction as session:
            top_up = await top_ups.begin(
                session,
                organization_id,
                amount_cents,
                self._settings.currency,
                self._settings.url + CONSOLE_PATH,
            )
        await self.hurry(organization_id)
        return await self._read_top_up(organization_id, top_up.id)

    async def refresh_top_up(self, organization_id: str, top_up_id: str) -> TopUp:
        """The top-up after a look at Stripe, unless that says nothing new or is away: for who comes
        back from paying before Stripe's webhook does. Raises `NotFound`."""
        top_up = await self._read_top_up(organization_id, top_up_id)
        if self._link is None or top_up.state not in ("created", "pending"):
            return top_up
        if top_up.checkout_session_id is None:
            await self.hurry(organization_id)
        else:
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self._look_again(top_up.checkout_session_id)
            except (TimeoutError, StripeError):
                return top_up
        return await self._read_top_up(organization_id, top_up_id)

    async def open_portal(self, transaction: Transaction, organization_id: str) -> str:
        """The address of a page at Stripe where cards and invoices are looked after. Raises
        `StripeNotConfigured`, `Unavailable`."""
        stripe = self.link.stripe
        async with transaction as session:
            await lock_account(session, organization_id, self._settings.currency)
            customer_id = await need_customer(session, organization_id)
        if customer_id is None:
            await self.hurry(organization_id)
            async with self._database.read() as session:
                profile = await read_profile(session, organization_id)
            customer_id = profile.stripe_customer_id
        if customer_id is None:
            raise _away()
        try:
            return await self._calls(
                stripe.create_portal,
                customer_id=customer_id,
                return_url=self._settings.url + CONSOLE_PATH,
            )
        except (StripeBusy, StripeUnknown) as error:
            raise _away() from error
        except StripeError as error:
            raise Conflict(f"{error}", code="stripe_refused") from error

    async def refund(
        self, transaction: Transaction, top_up_id: str, amount_cents: int
    ) -> StripeOperation:
        """What became of it so far. Raises `StripeNotConfigured`, `NotFound`, `Conflict`,
        `InvalidRequest`."""
        _ = self.link
        async with transaction as session:
            key = await refunds.ask_refund(session, top_up_id, amount_cents)
            top_up = await session.get_one(TopUp, top_up_id)
        await self.hurry(top_up.organization_id)
        async with self._database.read() as session:
            return await session.get_one(StripeOperation, key)

    async def receive(self, body: bytes, header: str) -> str:
        """Stores a webhook; it is followed up later. Raises `BadSignature`,
        `StripeNotConfigured`."""
        return await self.link.inbox.receive(body, header, self._settings.stripe_webhook_secrets)

    async def hurry(self, organization_id: str) -> None:
        """Has an organization's operations done now, and waits for that, but not for long."""
        task = asyncio.create_task(self.link.outbox.turn(organization_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_SECONDS)
        for each in done:
            each.result()  # raises what the turn raised

    async def recharge(self) -> None:
        """A turn: charges the cards of who has little left."""
        if self._link is not None:
            for organization_id in await self.recharging.turn():
                await self._link.outbox.turn(organization_id)

    async def _look_again(self, checkout_id: str) -> None:
        stripe = self.link.stripe
        found = await self._calls(following.look_up_checkout, stripe, checkout_id)
        async with self._database.write() as session:
            await following.apply_found(session, found)

    async def _read_top_up(self, organization_id: str, top_up_id: str) -> TopUp:
        async with self._database.read() as session:
            return await top_ups.get_top_up(session, organization_id, top_up_id)


def _away() -> Unavailable:
    return Unavailable(
        "Stripe does not answer at the moment. Nothing is lost; try again in a minute.",
        code="stripe_unavailable",
        retry_after_seconds=60,
    )
