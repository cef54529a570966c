"""Balances, credit and its lots against the ledger's entries."""

from collections import defaultdict

from sqlalchemy import Connection, text

from app.billing.reconciliation.check import Check, Difference, Subject, differing
from app.billing.reconciliation.sums import LedgerTotals

BALANCES = Subject(
    name="balances",
    title="Balances = ledger",
    description="What each organization has or owes, as limits are decided by, against the sum of "
    "its entries in the ledger.",
    left_label="Balances",
    right_label="Sum of entries",
)
CREDIT = Subject(
    name="credit",
    title="Credit = lots",
    description="Credit accounts in the ledger against what is left of the lots that make them up, "
    "by organization and kind.",
    left_label="Credit in the ledger",
    right_label="Left in lots",
)
LOTS = Subject(
    name="lots",
    title="Lots = credited - used",
    description="What is left of each open lot against what was credited less what was used of it.",
    left_label="Left in lots",
    right_label="Credited less used",
)


def check_balances(connection: Connection, totals: LedgerTotals) -> Check:
    rows = connection.execute(text("SELECT organization_id, posted_nano FROM account_balance"))
    balances = {organization_id: int(nano) for organization_id, nano in rows}
    entries = totals.balances()
    found = differing(balances, entries)
    return BALANCES.compared(sum(balances.values()), sum(entries.values()), found)


def check_credit(connection: Connection, totals: LedgerTotals) -> Check:
    rows = connection.execute(
        text(
            "SELECT organization_id, kind, sum(remaining_nano) FROM credit_lot"
            " GROUP BY organization_id, kind"
        )
    )
    lots = {f"customer:{organization}:{kind}": int(nano) for organization, kind, nano in rows}
    accounts = {
        account: nano
        for account, nano in totals.by_account.items()
        if account.endswith((":paid", ":promotional"))
    }
    found = differing(accounts, lots)
    return CREDIT.compared(sum(accounts.values()), sum(lots.values()), found)


def check_lots(connection: Connection, lot_uses: dict[str, int]) -> Check:
    """Every lot: there is one for each payment or grant, far fewer than there are requests."""
    rows = connection.execute(
        text(
            "SELECT l.id, l.remaining_nano, coalesce(sum(e.amount_nano), 0) FROM credit_lot l"
            " LEFT JOIN ledger_transaction t ON t.idempotency_key = 'credit:' || l.source"
            " LEFT JOIN ledger_entry e ON e.transaction_id = t.id"
            " AND e.account = 'customer:' || l.organization_id || ':' || l.kind"
            " GROUP BY l.id, l.remaining_nano"
        )
    )
    left: dict[str, int] = {}
    right: dict[str, int] = defaultdict(int)
    for lot_id, remaining_nano, credited_nano in rows:
        left[lot_id] = int(remaining_nano)
        right[lot_id] = int(credited_nano) - lot_uses.get(lot_id, 0)
    unknown = [
        Difference(lot_id, 0, nano, "is used in the ledger, but there is no such lot")
        for lot_id, nano in lot_uses.items()
        if lot_id not in left
    ]
    found = differing(left, right) + unknown
    return LOTS.compared(sum(left.values()), sum(right.values()), found)
