"""The rows of every table of money, and their usual groupings. Reads SQL, no code of the app."""

from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

Row = dict[str, Any]
TABLES = (
    "account_balance",
    "budget_window",
    "credit_lot",
    "hold",
    "hold_window",
    "invoice",
    "invoice_line",
    "ledger_entry",
    "ledger_transaction",
    "lot_use",
    "seal",
    "sealed_transaction",
    "unsealed_transaction",
    "usage_event",
    "usage_hour",
    "usage_line",
    "usage_series",
)
SERIES = (
    *("organization_id", "api_key_id", "endpoint_name", "version_number", "service_class"),
    *("dimension", "disposition", "price_book_id", "price_nano", "unit_scale"),
)


class Books:
    """Every row of every table of money, read in one transaction, and the usual groupings."""

    def __init__(self, connection: Connection) -> None:
        self.rows: dict[str, list[Row]] = {
            table: [
                dict(row)
                for row in connection.exec_driver_sql(f"SELECT * FROM {table}").mappings()  # noqa: S608
            ]
            for table in TABLES
        }
        self.transactions = {row["id"]: row for row in self.rows["ledger_transaction"]}
        self.entries: dict[str, dict[str, int]] = defaultdict(dict)
        for row in self.rows["ledger_entry"]:
            self.entries[row["transaction_id"]][row["account"]] = row["amount_nano"]
        self.lines: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows["usage_line"]:
            self.lines[row["event_id"]].append(row)
        self.events: dict[str, list[Row]] = defaultdict(list)  # by ledger transaction
        for row in self.rows["usage_event"]:
            self.events[row["ledger_transaction_id"]].append(row)
        self.invoice_lines: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows["invoice_line"]:
            self.invoice_lines[row["invoice_id"]].append(row)

    def on_accounts(self, prefix: str) -> int:
        """What stands on an account and those below it."""
        return sum(
            amount
            for entries in self.entries.values()
            for account, amount in entries.items()
            if account == prefix or account.startswith(f"{prefix}:")
        )


def instant(value: datetime | str) -> datetime:
    """SQLite keeps UTC as text without saying so."""
    if isinstance(value, str):
        return datetime.fromisoformat(value).replace(tzinfo=UTC)
    return value.astimezone(UTC)


def instant_text(value: datetime | str) -> str:
    return instant(value).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
