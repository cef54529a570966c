"""What tests of payments do again and again, and what must hold after any of it."""

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from app.billing.ledger import STRIPE_CLEARING, STRIPE_FEES
from app.billing.payments.cents import NANO_PER_CENT
from app.billing.payments.service import Payments
from app.billing.payments.tables import BillingProfile, Notice, StripeEvent, StripeOperation, TopUp
from app.billing.tables import AccountBalance, CreditLot, LedgerEntry, LotUse
from app.core.database import Database
from app.settings import Settings
from tests.stripe_stand_in.errors import Object
from tests.stripe_stand_in.server import StandIn

if TYPE_CHECKING:
    from tests.app.billing.payments.conftest import Time

CENTS = 2500


class Cashier:
    """Payments of one organization, and the Stripe that they go through."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        stand_in: StandIn,
        time: "Time",
        organization_id: str,
    ) -> None:
        self.database = database
        self.settings = settings
        self.stripe = stand_in
        self.time = time
        self.organization_id = organization_id
        self.payments = Payments(database, settings)

    async def restart(self) -> None:
        """A new process, which knows only what the database does."""
        await self.payments.close()
        self.payments = Payments(self.database, self.settings)
        await self.payments.resume()

    async def begin(self, cents: int = CENTS) -> TopUp:
        return await self.payments.begin_top_up(self.database.write(), self.organization_id, cents)

    async def refund(self, top_up_id: str, cents: int) -> StripeOperation:
        return await self.payments.refund(self.database.write(), top_up_id, cents)

    async def pay(self, cents: int = CENTS) -> TopUp:
        """A top-up that was paid, and that we know of."""
        top_up = await self.begin(cents)
        self.stripe.pay_checkout(top_up.checkout_session_id or "")
        await self.hear()
        return await self.top_up(top_up.id)

    async def hear(self) -> None:
        """All webhooks that are due arrive, and are followed up."""
        await self.receive()
        await self.payments.link.inbox.turn()

    async def receive(self) -> None:
        for delivery in self.stripe.webhooks.take():
            assert delivery.headers is not None
            await self.payments.receive(delivery.body, delivery.headers["Stripe-Signature"])

    async def work(self) -> None:
        """A turn of each job."""
        await self.payments.recharge()
        await self.payments.link.outbox.turn()
        await self.hear()

    async def work_until_idle(self, minutes: int = 6, rounds: int = 12) -> None:
        """Turns with time between them, which is more than any wait between attempts."""
        for _ in range(rounds):
            await self.work()
            self.time.passes(minutes=minutes)

    async def save_card(self, below_cents: int | None = None, cents: int = CENTS) -> None:
        """A first payment that keeps the card; with `below_cents`, recharging is on."""
        await self.pay(cents)
        if below_cents is not None:
            await self.recharge_below(below_cents, cents)

    async def recharge_below(self, below_cents: int, cents: int = CENTS) -> None:
        from app.billing.payments.recharge import set_recharge

        async with self.database.write() as session:
            await set_recharge(
                session, self.organization_id, below_cents * NANO_PER_CENT, cents, "usd"
            )

    # What there is

    async def top_up(self, top_up_id: str) -> TopUp:
        async with self.database.read() as session:
            return await session.get_one(TopUp, top_up_id)

    async def top_ups(self) -> list[TopUp]:
        async with self.database.read() as session:
            rows = await session.scalars(select(TopUp).order_by(TopUp.created_at, TopUp.id))
            return list(rows)

    async def operations(self, kind: str = "") -> list[StripeOperation]:
        query = select(StripeOperation).order_by(StripeOperation.created_at)
        async with self.database.read() as session:
            rows = await session.scalars(query)
            return [row for row in rows if not kind or row.kind == kind]

    async def operation(self, kind: str) -> StripeOperation:
        (row,) = await self.operations(kind)
        return row

    async def events(self, state: str = "") -> list[StripeEvent]:
        async with self.database.read() as session:
            rows = await session.scalars(select(StripeEvent))
            return [row for row in rows if not state or row.state == state]

    async def profile(self) -> BillingProfile:
        async with self.database.read() as session:
            return await session.get_one(BillingProfile, self.organization_id)

    async def notices(self, kind: str) -> list[Notice]:
        async with self.database.read() as session:
            rows = await session.scalars(select(Notice).where(Notice.kind == kind))
            return list(rows)

    async def balance_cents(self) -> int:
        """Of the organization: what it has paid ahead, less what it owes."""
        async with self.database.read() as session:
            row = await session.get_one(AccountBalance, self.organization_id)
            cents, rest = divmod(row.posted_nano, NANO_PER_CENT)
            assert rest == 0
            return cents

    def payments_made(self) -> list[Object]:
        """At Stripe: what came in."""
        found = self.stripe.account.all("payment_intent")
        return [each for each in found if each["status"] == "succeeded"]

    async def accounts(self) -> dict[str, int]:
        async with self.database.read() as session:
            rows = await session.execute(
                select(LedgerEntry.account, func.sum(LedgerEntry.amount_nano)).group_by(
                    LedgerEntry.account
                )
            )
            return {row[0]: int(row[1]) for row in rows}

    # What must hold

    async def check(self, *, is_settled: bool = True) -> None:
        """The books balance, and when all was heard of, agree with Stripe's to the cent."""
        accounts = await self.accounts()
        assert sum(accounts.values()) == 0
        own = f"customer:{self.organization_id}"
        of_customer = sum(
            nano for name, nano in accounts.items() if name == own or name.startswith(own + ":")
        )
        assert of_customer == await self.balance_cents() * NANO_PER_CENT
        await self._check_lots(accounts)
        if is_settled:
            moves = self.stripe.account.all("balance_transaction")
            held_cents = sum(move["net"] for move in moves)
            assert accounts.get(STRIPE_CLEARING, 0) == -held_cents * NANO_PER_CENT
            fee_cents = sum(move["fee"] for move in moves)
            assert accounts.get(STRIPE_FEES, 0) == -fee_cents * NANO_PER_CENT

    async def _check_lots(self, accounts: dict[str, int]) -> None:
        async with self.database.read() as session:
            lots = (await session.scalars(select(CreditLot))).all()
            uses = (await session.scalars(select(LotUse))).all()
        left_nano = accounts.get(f"customer:{self.organization_id}:paid", 0)
        assert sum(lot.remaining_nano for lot in lots) == left_nano
        for lot in lots:
            used_nano = sum(use.amount_nano for use in uses if use.lot_id == lot.id)
            assert 0 <= lot.remaining_nano <= lot.amount_nano - used_nano
