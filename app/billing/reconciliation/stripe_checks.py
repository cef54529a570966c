"""Our books of payments against what Stripe says of the same: balance, top-ups, invoices, events.

Pure but for reading the database. Asking Stripe, and when, is `stripe_walk.py`'s.
"""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

import msgspec
from sqlalchemy import BindParameter, Connection, bindparam, select

from app.billing.ledger import STRIPE_CLEARING
from app.billing.payments.cents import NANO_PER_CENT
from app.billing.payments.tables import Invoice, StripeEvent, TopUp
from app.billing.reconciliation.check import Check, Difference, Subject
from app.billing.stripe_objects import BalanceTransaction, Event
from app.billing.stripe_objects import Invoice as StripeInvoice
from app.billing.tables import LedgerEntry, LedgerTransaction

CLEARING = Subject(
    name="stripe",
    title="Held by Stripe = ledger",
    description="Payments, refunds, disputes and fees as Stripe's balance has them (without "
    "payouts, and what is none of this box's) against the account of Stripe in the ledger.",
    left_label="Stripe's balance",
    right_label="Ledger",
    unit="cents",
)
TOP_UPS = Subject(
    name="stripe_top_ups",
    title="Top-ups = Stripe's payments",
    description="Payments for top-ups that Stripe took in the last days against the top-ups that "
    "we hold for paid.",
    left_label="Paid at Stripe",
    right_label="Paid top-ups",
    unit="cents",
)
INVOICES = Subject(
    name="stripe_invoices",
    title="Invoices = Stripe's invoices",
    description="What invoices ask for here and at Stripe, some of them in each comparison.",
    left_label="Total at Stripe",
    right_label="Due in our books",
    unit="cents",
)
EVENTS = Subject(
    name="stripe_events",
    title="Stripe's events = received",
    description="What Stripe lists as having happened to payments and invoices against what "
    "reached us, by webhook or asked for.",
    left_label="Listed by Stripe",
    right_label="Received",
    unit="count",
)
SUBJECTS = (CLEARING, TOP_UPS, INVOICES, EVENTS)
GRACE = timedelta(minutes=15)  # for webhooks to come, or to be asked for
LATE = timedelta(hours=1)  # for a payment to appear among Stripe's movements
MATCHED = timedelta(days=1)  # in which our postings are looked for one by one among Stripe's
TOTAL_STATES = ("finalised", "past_due", "paid")  # in which totals have been agreed on


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What Stripe says. `moves` are of our payments, since some days ago; those before come to
    `earlier_cents`. `num_foreign` more are of somebody else's payments through the account.
    `unheard_of` are payments that Stripe has under the name of a top-up, and we do not know."""

    at: datetime
    earlier_cents: int
    moves: Sequence[BalanceTransaction]
    num_foreign: int
    unheard_of: Collection[str]
    invoices: Sequence[StripeInvoice]
    events: Sequence[Event]


_IDS: BindParameter[list[str]] = bindparam("ids", expanding=True)


def check_stripe(connection: Connection, facts: Facts, clearing_nano: int) -> list[Check]:
    """`clearing_nano` is what the ledger's account of Stripe adds up to: below zero for what
    Stripe holds."""
    top_ups = dict.fromkeys(facts.unheard_of, (0, False))
    top_ups |= _top_ups(connection, {move.payment_id for move in facts.moves})
    return [
        _check_clearing(connection, facts, clearing_nano, top_ups),
        _check_top_ups(facts, top_ups),
        _check_invoices(connection, facts.invoices),
        _check_events(connection, facts),
    ]


def _top_ups(connection: Connection, payment_ids: Collection[str]) -> dict[str, tuple[int, bool]]:
    """By payment: the amount, and whether we hold it for paid."""
    query = select(TopUp.payment_intent_id, TopUp.amount_cents, TopUp.paid_at)
    rows = connection.execute(
        query.where(TopUp.payment_intent_id.in_(_IDS)), {"ids": list(payment_ids)}
    )
    return {row[0] or "": (row[1], row[2] is not None) for row in rows}


def _keys(move: BalanceTransaction, is_top_up: bool) -> dict[str, int]:
    """The postings that a movement leads to, by key, and their cents. A payment for an invoice is
    posted under the invoice's key, together with others for it."""
    keys: dict[str, int] = {}
    if move.type in ("charge", "payment"):
        if is_top_up:
            keys[f"credit:stripe:{move.payment_id}"] = move.amount_cents
    elif move.type in ("refund", "payment_refund"):
        keys[f"refund:{move.source_id}"] = move.amount_cents
    elif move.type in ("refund_failure", "payment_failure_refund"):
        keys[f"refund_failed:{move.source_id}"] = move.amount_cents
    else:
        keys[f"dispute:{move.id}"] = move.amount_cents
    if move.fee_cents:
        keys[f"fee:{move.id}"] = -move.fee_cents
    return keys


def _check_clearing(
    connection: Connection, facts: Facts, clearing_nano: int, top_ups: dict[str, tuple[int, bool]]
) -> Check:
    expected = {move.id: _keys(move, move.payment_id in top_ups) for move in facts.moves}
    keys = [key for own in expected.values() for key in own]
    query = select(LedgerTransaction.idempotency_key)
    posted = set(
        connection.scalars(query.where(LedgerTransaction.idempotency_key.in_(_IDS)), {"ids": keys})
    )
    young_cents = 0
    found: list[Difference] = []
    for move in facts.moves:
        missing = {key: cents for key, cents in expected[move.id].items() if key not in posted}
        if missing and move.created_at > facts.at - GRACE:
            young_cents += sum(missing.values())
        elif missing:
            note = f"{move.type} of {move.payment_id}: not in the ledger"
            found += [Difference(key, cents, 0, note) for key, cents in missing.items()]
    own = _postings(connection, facts.at - MATCHED)
    for key in own.keys() & {key for keys in expected.values() for key in keys}:
        del own[key]
    invoice_moves = [move for move in facts.moves if _is_for_invoice(move, top_ups)]
    young_cents += _match(own, invoice_moves, facts.at)
    # Not listed by Stripe: it may yet come, or was paid since Stripe was asked.
    young_nano = sum(nano for nano, at in own.values() if at > facts.at - LATE)
    left = facts.earlier_cents + sum(move.net_cents for move in facts.moves) - young_cents
    right, rest = divmod(-clearing_nano - young_nano, NANO_PER_CENT)
    if rest:
        found.append(Difference("less than a cent", 0, rest, "in the ledger, in nano-units"))
    if left != right and not found:
        found = [
            Difference(key, 0, nano // NANO_PER_CENT, "in the ledger, but not listed by Stripe")
            for key, (nano, at) in own.items()
            if at <= facts.at - LATE
        ]
    note = f"{len(facts.moves)} movements of the last days looked at one by one."
    if young_cents:
        note += f" {young_cents} cents are under way."
    if young_nano:
        note += f" {young_nano // NANO_PER_CENT} cents of ours are not listed by Stripe yet."
    if facts.num_foreign:
        note += f" {facts.num_foreign} movements are none of this box's payments."
    return CLEARING.compared(left, right, found, note=note)


def _is_for_invoice(move: BalanceTransaction, top_ups: Collection[str]) -> bool:
    return move.type in ("charge", "payment") and move.payment_id not in top_ups


def _postings(connection: Connection, since: datetime) -> dict[str, tuple[int, datetime]]:
    """To the account of Stripe, by key: the nano-units that came in, and when."""
    rows = connection.execute(
        select(LedgerTransaction.idempotency_key, LedgerEntry.amount_nano, LedgerEntry.created_at)
        .join(LedgerEntry, LedgerEntry.transaction_id == LedgerTransaction.id)
        .where(LedgerEntry.account == STRIPE_CLEARING, LedgerEntry.created_at > since)
        .order_by(LedgerEntry.created_at)
    )
    return {key: (-nano, at) for key, nano, at in rows}


def _match(
    own: dict[str, tuple[int, datetime]], moves: Sequence[BalanceTransaction], at: datetime
) -> int:
    """Payments of invoices are not posted under their own names, so those of one amount are taken
    for each other, and leave `own`. Returns what young movements without a posting come to."""
    young_cents = 0
    for move in moves:
        if move.created_at <= at - MATCHED:
            continue
        nano = move.amount_cents * NANO_PER_CENT
        is_its = (k for k in own if k.startswith("invoice_paid:") and own[k][0] == nano)
        if (key := next(is_its, None)) is not None:
            del own[key]
        elif move.created_at > at - GRACE:
            young_cents += move.amount_cents
    return young_cents


def _check_top_ups(facts: Facts, top_ups: dict[str, tuple[int, bool]]) -> Check:
    left = right = 0
    found: list[Difference] = []
    for move in facts.moves:
        if move.type not in ("charge", "payment") or move.payment_id not in top_ups:
            continue
        amount_cents, is_paid = top_ups[move.payment_id]
        paid_cents = amount_cents if is_paid else 0
        if paid_cents != move.amount_cents and move.created_at > facts.at - GRACE:
            continue
        left, right = left + move.amount_cents, right + paid_cents
        if paid_cents != move.amount_cents:
            found.append(Difference(move.payment_id, move.amount_cents, paid_cents))
    return TOP_UPS.compared(left, right, found)


def _check_invoices(connection: Connection, seen: Sequence[StripeInvoice]) -> Check:
    query = select(Invoice.stripe_invoice_id, Invoice.id, Invoice.due_cents, Invoice.state)
    rows = connection.execute(
        query.where(Invoice.stripe_invoice_id.in_(_IDS)), {"ids": [each.id for each in seen]}
    )
    ours = {row[0]: row for row in rows}
    left = right = 0
    found: list[Difference] = []
    for each in seen:
        row = ours.get(each.id)
        if row is None or row.state not in TOTAL_STATES:
            continue
        left, right = left + each.total_cents, right + row.due_cents
        if each.total_cents != row.due_cents:
            found.append(Difference(row.id, each.total_cents, row.due_cents))
        elif row.state == "paid" and each.status != "paid":
            note = f"paid in our books, {each.status} at Stripe"
            found.append(Difference(row.id, 0, row.due_cents, note))
    return INVOICES.compared(left, right, found, note=f"{len(seen)} looked at.")


def _check_events(connection: Connection, facts: Facts) -> Check:
    due = [event for event in facts.events if event.created_at <= facts.at - GRACE]
    query = select(StripeEvent.id)
    known = set(
        connection.scalars(
            query.where(StripeEvent.id.in_(_IDS)), {"ids": [event.id for event in due]}
        )
    )
    found = [Difference(event.id, 1, 0, event.type) for event in due if event.id not in known]
    return EVENTS.compared(len(due), len(due) - len(found), found)
