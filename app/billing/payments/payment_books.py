"""The postings of one payment: credit, Stripe's fees, refunds and disputes.

Owns their keys: each is that of the object at Stripe that it is for, so that reading a payment
again, late, twice or in any order posts nothing twice. What is not a top-up's is on account: that
of an invoice, whose own payment `invoice_payments.py` posts.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.credits import add_lot, take_back
from app.billing.ledger import STRIPE_CLEARING, STRIPE_FEES, is_posted, on_account, post
from app.billing.payments.cents import NANO_PER_CENT
from app.billing.payments.notices import alarm
from app.billing.payments.returning import give_back
from app.billing.stripe_objects import BalanceTransaction, Dispute, Refund
from app.billing.tables import CreditLot


class PaymentBooks:
    """Of one payment, in a transaction that has locked its organization's account."""

    def __init__(
        self, session: AsyncSession, organization_id: str, payment_id: str, currency: str
    ) -> None:
        self._session = session
        self._organization_id = organization_id
        self._source = f"stripe:{payment_id}"
        self._currency = currency

    def is_own(self, currency: str) -> bool:
        """Whether it is the account's."""
        return currency.lower() == self._currency.lower()

    async def credit(self, cents: int) -> bool:
        """What came in becomes credit. Whether it did so now, and not before."""
        lot_id = await add_lot(
            self._session,
            self._organization_id,
            "paid",
            cents * NANO_PER_CENT,
            source=self._source,
            currency=self._currency,
            from_account=STRIPE_CLEARING,
        )
        return lot_id is not None

    async def pay_fee(self, movement: BalanceTransaction) -> None:
        """What Stripe kept of a movement, or gave back of what it kept of an earlier one."""
        fee_nano = movement.fee_cents * NANO_PER_CENT
        if not fee_nano:
            return
        if not self.is_own(movement.currency):
            await alarm(
                self._session,
                "stripe_currency",
                f"Stripe settles in {movement.currency.upper()} what is paid in "
                f"{self._currency.upper()}: its fees are not posted, and the books cannot be "
                "compared with its balance. Have Stripe settle in the currency of the box.",
                {"currency": movement.currency},
                subject=movement.currency,
            )
            return
        await post(
            self._session,
            key=f"fee:{movement.id}",
            kind="stripe_fee",
            organization_id=self._organization_id,
            currency=self._currency,
            entries={STRIPE_CLEARING: fee_nano, STRIPE_FEES: -fee_nano},
        )

    async def refund(self, refund: Refund) -> int:
        """Returns by how many cents the payment is refunded more than before."""
        key = f"refund:{refund.id}"
        if refund.status == "succeeded":
            return (
                refund.amount_cents if await self._take(key, "refund", refund.amount_cents) else 0
            )
        # Money that could not be sent is ours again, and so the customer's.
        if refund.status in ("failed", "canceled") and await is_posted(self._session, key):
            undone = await self._give([key], [], f"refund_failed:{refund.id}", refund.amount_cents)
            return -refund.amount_cents if undone else 0
        return 0

    async def dispute(self, dispute: Dispute) -> int:
        """Returns by how many cents more than before is disputed or lost."""
        change_cents = 0
        taken: list[str] = []
        given: list[str] = []
        for movement in sorted(dispute.balance_transactions, key=_when):
            key = f"dispute:{movement.id}"
            cents = -movement.amount_cents
            if not self.is_own(movement.currency):
                # What was paid, not what Stripe made of it in the currency of its balance.
                cents = dispute.amount_cents if cents > 0 else -dispute.amount_cents
            if cents > 0:
                taken.append(key)
                change_cents += cents if await self._take(key, "dispute", cents) else 0
            elif cents < 0 and taken:
                change_cents += cents if await self._give(taken, given, key, -cents) else 0
                given.append(key)
            await self.pay_fee(movement)
        return change_cents

    async def _take(self, key: str, kind: str, cents: int) -> bool:
        nano = cents * NANO_PER_CENT
        query = select(CreditLot.id).where(CreditLot.source == self._source)
        if await self._session.scalar(query) is not None:
            posted = await take_back(
                self._session,
                source=self._source,
                amount_nano=nano,
                key=key,
                kind=kind,
                to_account=STRIPE_CLEARING,
            )
        else:
            posted = await post(
                self._session,
                key=key,
                kind=kind,
                organization_id=self._organization_id,
                currency=self._currency,
                entries={STRIPE_CLEARING: nano, on_account(self._organization_id): -nano},
            )
        return posted is not None

    async def _give(
        self, taken_keys: Sequence[str], given_keys: Sequence[str], key: str, cents: int
    ) -> bool:
        posted = await give_back(
            self._session,
            taken_keys=taken_keys,
            given_keys=given_keys,
            amount_nano=cents * NANO_PER_CENT,
            key=key,
            kind=key.partition(":")[0],
            from_account=STRIPE_CLEARING,
        )
        return posted is not None


def _when(movement: BalanceTransaction) -> tuple[datetime, int]:
    """The earlier first, and of the same second what was taken before what was given back."""
    return movement.created_at, movement.amount_cents
