"""What became of an invoice, in the ledger: paid, given up, or paid after it was given up.

Owns those postings and the order of an invoice's states, which it only goes forward through.
Every function expects the organization's account to be locked.
"""

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import BAD_DEBT, on_account, post
from app.billing.payments.cents import NANO_PER_CENT
from app.billing.payments.tables import Invoice
from app.billing.tables import LedgerEntry, LedgerTransaction
from app.core import clock

KEYS_PER_QUERY = 16
UNPAID_STATES = ("frozen", "pushed", "differs", "finalised", "past_due")
_RANK = {
    "frozen": 0,
    "pushed": 1,
    "differs": 2,
    "finalised": 3,
    "past_due": 4,
    "uncollectible": 5,
    "paid": 6,
    "void": 6,
    "settled": 6,
}


class Standing(msgspec.Struct, frozen=True):
    """What the ledger says of an invoice. `paid_nano` is all that came in for it, of that
    `recovered_nano` after it was given up; `open_nano` is what the customer owes of it still."""

    due_nano: int
    num_payments: int
    paid_nano: int
    recovered_nano: int
    written_off_nano: int

    @property
    def open_nano(self) -> int:
        paid_in_time = self.paid_nano - self.recovered_nano
        return max(0, self.due_nano - paid_in_time - self.written_off_nano)


def advance(invoice: Invoice, state: str) -> bool:
    """Moves the invoice on. False, and nothing done, where it is as far or farther already."""
    if _RANK[state] <= _RANK[invoice.state]:
        return False
    invoice.state = state
    if state == "paid":
        invoice.paid_at = clock.now()
    return True


async def standing(session: AsyncSession, invoice: Invoice) -> Standing:
    num_payments, paid_nano, recovered_nano = 0, 0, 0
    while True:  # payments are numbered without gaps
        keys = [_payment_key(invoice, num_payments + i) for i in range(KEYS_PER_QUERY)]
        payments = await _entries(session, keys)
        num_payments += len(payments)
        for entries in payments.values():
            recovered_nano += entries.get(BAD_DEBT, 0)
            paid_nano -= sum(nano for nano in entries.values() if nano < 0)
        if len(payments) < KEYS_PER_QUERY:
            break
    written_off = await _entries(session, [_write_off_key(invoice)])
    return Standing(
        due_nano=invoice.due_cents * NANO_PER_CENT,
        num_payments=num_payments,
        paid_nano=paid_nano,
        recovered_nano=recovered_nano,
        written_off_nano=sum(-entries[BAD_DEBT] for entries in written_off.values()),
    )


async def asked_for_nano(session: AsyncSession, organization_id: str) -> int:
    """What unpaid invoices ask the organization for."""
    unpaid = await session.scalars(
        select(Invoice).where(
            Invoice.organization_id == organization_id, Invoice.state.in_(UNPAID_STATES)
        )
    )
    return sum([(await standing(session, invoice)).open_nano for invoice in unpaid.all()])


async def post_payments(
    session: AsyncSession, invoice: Invoice, total_nano: int, from_account: str
) -> int:
    """Has the ledger hold that `total_nano` came in for the invoice altogether; posts what it
    lacks of that, and returns it. What was given up before is recovered, what is too much is the
    customer's, for the next invoice."""
    so_far = await standing(session, invoice)
    amount_nano = total_nano - so_far.paid_nano
    if amount_nano <= 0:
        return 0
    to_account = min(amount_nano, so_far.open_nano)
    recovered = min(amount_nano - to_account, so_far.written_off_nano - so_far.recovered_nano)
    entries = {
        from_account: -amount_nano,
        on_account(invoice.organization_id): amount_nano - recovered,
        BAD_DEBT: recovered,
    }
    await post(
        session,
        key=_payment_key(invoice, so_far.num_payments),
        kind="invoice_paid",
        organization_id=invoice.organization_id,
        currency=invoice.currency,
        entries={name: nano for name, nano in entries.items() if nano},
    )
    return amount_nano


async def write_off(session: AsyncSession, invoice: Invoice) -> int:
    """Gives up what is open of the invoice, once. Returns how much that was."""
    open_nano = (await standing(session, invoice)).open_nano
    if open_nano:
        await post(
            session,
            key=_write_off_key(invoice),
            kind="write_off",
            organization_id=invoice.organization_id,
            currency=invoice.currency,
            entries={BAD_DEBT: -open_nano, on_account(invoice.organization_id): open_nano},
        )
    return open_nano


def _payment_key(invoice: Invoice, index: int) -> str:
    return f"invoice_paid:{invoice.id}" + (f":{index + 1}" if index else "")


def _write_off_key(invoice: Invoice) -> str:
    return f"invoice_written_off:{invoice.id}"


async def _entries(session: AsyncSession, keys: list[str]) -> dict[str, dict[str, int]]:
    """Entries of those of the transactions that were posted, by key and account."""
    rows = await session.execute(
        select(LedgerTransaction.idempotency_key, LedgerEntry.account, LedgerEntry.amount_nano)
        .join(LedgerEntry, LedgerEntry.transaction_id == LedgerTransaction.id)
        .where(LedgerTransaction.idempotency_key.in_(keys))
    )
    found: dict[str, dict[str, int]] = {}
    for key, account, amount_nano in rows:
        found.setdefault(key, {})[account] = amount_nano
    return found
