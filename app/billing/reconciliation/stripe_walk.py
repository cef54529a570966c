"""What is asked of Stripe for the comparison, how often, and what it means that it is away.

Blocks: runs on a thread, and holds no transaction of the database while it asks.
"""

import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, Engine, select

from app.billing.payments.following import EVENT_TYPES
from app.billing.payments.tables import Invoice, StripeMirror, TopUp
from app.billing.reconciliation.check import Check
from app.billing.reconciliation.dialects import snapshot
from app.billing.reconciliation.stripe_checks import (
    INVOICES,
    SUBJECTS,
    TOTAL_STATES,
    Facts,
    check_stripe,
)
from app.billing.stripe import Stripe
from app.billing.stripe_errors import StripeError, StripeRejected
from app.billing.stripe_objects import BalanceTransaction, Event
from app.billing.stripe_objects import Invoice as StripeInvoice
from app.core import clock

SECONDS = 600.0  # between comparisons while nothing differs
ALARM_AFTER = timedelta(hours=24)  # without an answer
WINDOW = timedelta(days=3)  # of movements that are looked at one by one
EVENT_WINDOW = timedelta(hours=6)
NUM_INVOICES = 20  # asked for in one comparison
NOT_CONFIGURED = "This box takes no payments through Stripe."
_LEDGERLESS = frozenset({"payout", "payout_cancel", "payout_failure", "stripe_fee", "transfer"})

Clearing = Callable[[Connection], int]


class StripeWalk:
    """`positions` are kept with each run: how much Stripe's movements of our payments came to
    before a time, so that they are not listed from the start each time."""

    def __init__(self, engine: Engine, stripe: Stripe, since: datetime) -> None:
        self._engine = engine
        self._stripe = stripe
        self._foreign: set[str] = set()  # payments that are none of ours
        self._checks: list[Check] = []
        self._next_at_seconds = 0.0
        self._invoice_id = ""
        self.differing_invoices: list[str] = []  # by our ids, that were found last
        self.compared_at = clock.now()
        self._since = since
        self._until, self._earlier_cents = since, 0

    @property
    def positions(self) -> dict[str, int]:
        until_seconds = int(self._until.timestamp())
        return {"stripe_until": until_seconds, "stripe_cents": self._earlier_cents}

    def go_on(self, positions: dict[str, int]) -> None:
        """Where an earlier process stopped."""
        if "stripe_until" in positions:
            self._until = datetime.fromtimestamp(positions["stripe_until"], UTC)
            self._earlier_cents = positions["stripe_cents"]

    def check(self, clearing: Clearing) -> list[Check]:
        """`clearing` reads what the ledger says Stripe holds. What differed is compared again each
        time, what agreed every ten minutes."""
        if time.monotonic() < self._next_at_seconds:
            return self._checks
        try:
            facts = self._ask()
        except StripeError as error:
            return self._away(error)
        with snapshot(self._engine) as connection:
            checks = check_stripe(connection, facts, clearing(connection))
        self.compared_at = facts.at
        self._checks = checks
        self.differing_invoices = [
            difference.name
            for check in checks
            if check.name == INVOICES.name
            for difference in check.differences
        ]
        is_clean = all(check.is_clean for check in checks)
        self._next_at_seconds = time.monotonic() + (SECONDS if is_clean else 0)
        if is_clean:
            self._advance(facts)
        return checks

    def _away(self, error: StripeError) -> list[Check]:
        since = f"{self.compared_at:%Y-%m-%d %H:%M} UTC"
        reason = f"Not compared since {since}: {error}"
        if clock.now() - self.compared_at >= ALARM_AFTER:
            return [subject.failed(reason) for subject in SUBJECTS]
        return [subject.not_compared(reason) for subject in SUBJECTS]

    def _advance(self, facts: Facts) -> None:
        """What is some days old and agreed is only a sum from now on."""
        until = (facts.at - WINDOW).replace(microsecond=0)
        if until > self._until:
            old = [move.net_cents for move in facts.moves if move.created_at < until]
            self._until, self._earlier_cents = until, self._earlier_cents + sum(old)

    # --- what Stripe says -----------------------------------------------------------------

    def _ask(self) -> Facts:
        at = clock.now()
        if self._until > max(self._since, at):  # set by a clock that was ahead
            self._until, self._earlier_cents = self._since, 0
        moves = [
            move
            for move in self._stripe.list_balance_transactions(self._until)
            if move.created_at >= self._until and move.type not in _LEDGERLESS
        ]
        ours, unheard_of = self._ours(moves)
        own = [move for move in moves if move.payment_id in ours]
        return Facts(
            at=at,
            earlier_cents=self._earlier_cents,
            moves=own,
            num_foreign=len(moves) - len(own),
            unheard_of=unheard_of,
            invoices=self._ask_invoices(),
            events=self._ask_events(at),
        )

    def _ours(self, moves: list[BalanceTransaction]) -> tuple[set[str], set[str]]:
        """Payments of this box, also those that it should know of and does not; and of these the
        ones for top-ups."""
        ids = {move.payment_id for move in moves} - self._foreign - {""}
        with snapshot(self._engine) as connection:
            known = set(_known(connection, ids))
        unheard_of: set[str] = set()
        for payment_id in ids - known:
            payment = self._stripe.get_payment(payment_id)
            invoice_id = "" if payment.top_up_id else self._stripe.find_paid_invoice(payment_id)
            with snapshot(self._engine) as connection:
                is_own = _is_own(connection, payment.top_up_id, invoice_id)
            if is_own:
                known.add(payment_id)
                unheard_of |= {payment_id} if payment.top_up_id else set()
            else:
                self._foreign.add(payment_id)
        return known, unheard_of

    def _ask_invoices(self) -> list[StripeInvoice]:
        """Those that were found last, and the next few, in turn."""
        query = (
            select(Invoice.id, Invoice.stripe_invoice_id)
            .where(Invoice.stripe_invoice_id.is_not(None), Invoice.state.in_(TOTAL_STATES))
            .order_by(Invoice.id)
        )
        again = query.where(Invoice.id.in_(self.differing_invoices))
        next_ones = query.where(Invoice.id > self._invoice_id).limit(NUM_INVOICES)
        with snapshot(self._engine) as connection:
            rows = connection.execute(next_ones).all()
            again_rows = connection.execute(again).all()
        self._invoice_id = rows[-1][0] if len(rows) == NUM_INVOICES else ""
        seen: list[StripeInvoice] = []
        for _, stripe_invoice_id in dict.fromkeys([*again_rows, *rows]):
            assert stripe_invoice_id is not None, "asked for in the query"
            try:
                seen.append(self._stripe.get_invoice(stripe_invoice_id))
            except StripeRejected:
                continue  # gone at Stripe, which its own events tell
        return seen

    def _ask_events(self, at: datetime) -> list[Event]:
        return [
            event
            for types in EVENT_TYPES
            for event in self._stripe.list_events(at - EVENT_WINDOW, types=types)
        ]


def _known(connection: Connection, payment_ids: Collection[str]) -> list[str]:
    """Of these payments, those that are in our books."""
    ids = list(payment_ids)
    mirrored = connection.scalars(select(StripeMirror.id).where(StripeMirror.id.in_(ids)))
    paid = connection.scalars(
        select(TopUp.payment_intent_id).where(TopUp.payment_intent_id.in_(ids))
    )
    return [*mirrored, *(payment_id for payment_id in paid if payment_id)]


def _is_own(connection: Connection, top_up_id: str, stripe_invoice_id: str) -> bool:
    """Not what else a customer of ours paid through the account."""
    top_up = connection.scalar(select(TopUp.id).where(TopUp.id == top_up_id))
    invoice = connection.scalar(
        select(Invoice.id).where(Invoice.stripe_invoice_id == stripe_invoice_id)
    )
    return top_up is not None or invoice is not None
