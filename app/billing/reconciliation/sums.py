"""The ledger added up, without adding it all up every time.

Owns running sums over transactions that are sealed: their order is fixed and nothing is ever put
between them. What is not sealed yet is read each time.
"""

from collections import defaultdict
from typing import NamedTuple, TypeVar

from sqlalchemy import Connection, text

from app.billing.reconciliation.dialects import join_in_order, month_of

USAGE = "usage"
CUSTOMER = "customer:"

Key = TypeVar("Key")


class SumKey(NamedTuple):
    """What the ledger's entries are added up by."""

    currency: str
    kind: str
    month: str  # YYYY-MM of the posting, UTC
    account: str


class LedgerTotals:
    """All entries of the ledger at one moment, by kind, month and account."""

    def __init__(self, sums: dict[SumKey, int]) -> None:
        self.sums = sums
        self.by_account: dict[str, int] = defaultdict(int)
        for key, nano in sums.items():
            self.by_account[key.account] += nano

    def by_currency(self) -> dict[str, int]:
        totals: dict[str, int] = defaultdict(int)
        for key, nano in self.sums.items():
            totals[key.currency] += nano
        return totals

    def balances(self) -> dict[str, int]:
        """By organization: what its accounts add up to."""
        totals: dict[str, int] = defaultdict(int)
        for account, nano in self.by_account.items():
            if account.startswith(CUSTOMER):
                totals[organization_of(account)] += nano
        return totals

    def usage(self) -> dict[str, int]:
        """By `organization month`: what usage took from its accounts."""
        totals: dict[str, int] = defaultdict(int)
        for key, nano in self.sums.items():
            if key.kind == USAGE and key.account.startswith(CUSTOMER):
                totals[f"{organization_of(key.account)} {key.month}"] -= nano
        return totals


def organization_of(account: str) -> str:
    return account.split(":")[1]


class LedgerSums:
    """Keeps the sums of all seals up to one, and of the lots' uses in them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The next `read` adds everything up from the start."""
        self.until = 0  # number of the last seal that is added up
        self._sums: dict[SumKey, int] = defaultdict(int)
        self._lot_uses: dict[str, int] = defaultdict(int)

    def read(self, connection: Connection) -> tuple[LedgerTotals, dict[str, int]]:
        """The ledger's totals, and how much of each lot is used up, as the transaction sees
        them."""
        newest = connection.scalar(text("SELECT max(number) FROM seal")) or 0
        if newest > self.until:
            bounds = {"after": self.until, "until": newest}
            _add(self._sums, _entry_sums(connection, SEALED, bounds))
            _add(self._lot_uses, _lot_sums(connection, SEALED, bounds))
            self.until = newest
        sums, lot_uses = self._sums.copy(), self._lot_uses.copy()
        _add(sums, _entry_sums(connection, UNSEALED, {}))
        _add(lot_uses, _lot_sums(connection, UNSEALED, {}))
        return LedgerTotals(sums), lot_uses


SEALED = "sealed_transaction s WHERE s.seal_number > :after AND s.seal_number <= :until"
UNSEALED = "unsealed_transaction s"


def _add(sums: dict[Key, int], more: dict[Key, int]) -> None:
    for key, value in more.items():
        sums[key] += value


def _entry_sums(connection: Connection, source: str, bounds: dict[str, int]) -> dict[SumKey, int]:
    month, join = month_of(connection, "t.created_at"), join_in_order(connection)
    rows = connection.execute(
        text(
            f"SELECT t.currency, t.kind, {month} AS month, e.account, sum(e.amount_nano)"  # noqa: S608
            f" FROM (SELECT ledger_transaction_id AS id FROM {source}) q"
            f" {join} ledger_transaction t ON t.id = q.id"
            f" {join} ledger_entry e ON e.transaction_id = t.id"
            " GROUP BY t.currency, t.kind, month, e.account"
        ),
        bounds,
    )
    return {SumKey(*key): int(nano) for *key, nano in rows}


def _lot_sums(connection: Connection, source: str, bounds: dict[str, int]) -> dict[str, int]:
    join = join_in_order(connection)
    rows = connection.execute(
        text(
            "SELECT u.lot_id, sum(u.amount_nano)"  # noqa: S608 - nothing of a caller's
            f" FROM (SELECT ledger_transaction_id AS id FROM {source}) q"
            f" {join} lot_use u ON u.ledger_transaction_id = q.id GROUP BY u.lot_id"
        ),
        bounds,
    )
    return {lot_id: int(nano) for lot_id, nano in rows}
