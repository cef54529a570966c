"""Tables of money: prices, accounts, budgets, holds, credit and the ledger.

Amounts are integer nano-units of the box's currency. What is paid through Stripe is in
`payments/tables.py`.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.core.database import Base, one_of
from app.metering.tables import DIMENSIONS

MINUTES_PER_DAY = 1440
BUDGET_SCOPES = ("organization", "key", "model")
BUDGET_PERIODS = ("day", "month")
CREDIT_KINDS = ("paid", "promotional")
MAX_HOLD_NANO = 10**15  # of one request
# What an account may owe and hold together. Sums and differences of two such amounts stay within
# 64 bits; beyond them SQLite would go on with a float and PostgreSQL would refuse.
MAX_BALANCE_NANO = 4 * 10**18


def _within(column: str, lowest: int) -> str:
    return f"{column} BETWEEN {lowest} AND {MAX_BALANCE_NANO}"


class PriceBook(Base):
    """An immutable set of prices in force from `effective_at` until the next book. `policy` says
    which outcomes are charged: see `policy.py`. One that was cancelled before it was in force
    stays: where the clock was set back, requests may have been admitted under it all the same."""

    __tablename__ = "price_book"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    currency: Mapped[str] = mapped_column(String(3))
    sha256: Mapped[str] = mapped_column(String(64))
    policy: Mapped[dict[str, Any]] = mapped_column(server_default="{}", default=dict)
    effective_at: Mapped[datetime]
    created_at: Mapped[datetime]
    cancelled_at: Mapped[datetime | None]


class PriceItem(Base):
    """Nano-units per `unit_scale` of a dimension. `endpoint_name` `*` is the default.
    It holds for requests whose prompt has more than `above_tokens`, and which are admitted between
    `from_minute` and `until_minute` of the day (UTC; until may lie before from: over midnight)."""

    __tablename__ = "price_item"
    __table_args__ = (
        UniqueConstraint(
            "price_book_id",
            "endpoint_name",
            "dimension",
            "service_class",
            "above_tokens",
            "from_minute",
            "until_minute",
            name="uq_price_item",
        ),
        CheckConstraint(one_of("dimension", DIMENSIONS), name="dimension"),
        CheckConstraint("price_nano >= 0 AND unit_scale > 0", name="price"),
        CheckConstraint("above_tokens >= 0", name="above_tokens"),
        CheckConstraint(
            "from_minute BETWEEN 0 AND 1439 AND until_minute BETWEEN 1 AND 1440", name="window"
        ),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    price_book_id: Mapped[str] = mapped_column(ForeignKey("price_book.id"), index=True)
    endpoint_name: Mapped[str] = mapped_column(String(64), default="*")
    dimension: Mapped[str] = mapped_column(String(16))
    service_class: Mapped[str] = mapped_column(String(16), default="standard")
    above_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0", default=0)
    from_minute: Mapped[int] = mapped_column(server_default="0", default=0)
    until_minute: Mapped[int] = mapped_column(server_default="1440", default=MINUTES_PER_DAY)
    price_nano: Mapped[int] = mapped_column(BigInteger)
    unit_scale: Mapped[int] = mapped_column(BigInteger)


class AccountBalance(Base):
    """What an organization owes or has. `posted_nano` falls with usage and rises with payments;
    `credit_limit_nano` is how far below zero it may go: 0 for a prepaid account, NULL without
    limit. The constraint is what makes a limit a promise: no code path can spend past it.

    `forced_nano` is how far a refund, a dispute or an expiry, which happen whether we like it or
    not, took the account below what running requests had been promised. `closed_until` is the end
    of the last invoiced period: nothing is posted before it. Every transaction that moves an
    organization's money locks this row first, so that one organization's money moves in order."""

    __tablename__ = "account_balance"
    __table_args__ = (
        CheckConstraint(_within("held_nano", 0), name="held"),
        CheckConstraint(_within("posted_nano", -MAX_BALANCE_NANO), name="posted"),
        CheckConstraint(_within("credit_limit_nano", -MAX_BALANCE_NANO), name="credit_limit"),
        CheckConstraint(
            "credit_limit_nano IS NULL OR held_nano = 0"
            " OR posted_nano - held_nano + forced_nano >= -credit_limit_nano",
            name="limit",
        ),
        CheckConstraint(_within("forced_nano", 0), name="forced"),
    )

    organization_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    currency: Mapped[str] = mapped_column(String(3))
    posted_nano: Mapped[int] = mapped_column(BigInteger, default=0)
    held_nano: Mapped[int] = mapped_column(BigInteger, default=0)
    credit_limit_nano: Mapped[int | None] = mapped_column(BigInteger)
    forced_nano: Mapped[int] = mapped_column(BigInteger, server_default="0", default=0)
    closed_until: Mapped[datetime | None]


class Budget(Base):
    """What may be spent in a day or a month (UTC) by an organization, one of its keys or on one
    model. `subject` is the key's id, the endpoint's name, or empty."""

    __tablename__ = "budget"
    __table_args__ = (
        UniqueConstraint("organization_id", "scope", "subject", "period"),
        CheckConstraint(one_of("scope", BUDGET_SCOPES), name="scope"),
        CheckConstraint(one_of("period", BUDGET_PERIODS), name="period"),
        CheckConstraint(_within("limit_nano", 0), name="limit"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    organization_id: Mapped[str] = mapped_column(String(40))
    scope: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str] = mapped_column(String(64), default="")
    subject_name: Mapped[str] = mapped_column(String(80), default="")
    period: Mapped[str] = mapped_column(String(8))
    limit_nano: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class BudgetWindow(Base):
    """One day or month of a budget: what requests admitted in it have spent and still hold.
    `limit_nano` is at least what was promised to those that run, and follows the budget's."""

    __tablename__ = "budget_window"
    __table_args__ = (
        CheckConstraint(_within("held_nano", 0), name="held"),
        CheckConstraint(_within("posted_nano", 0), name="posted"),
        CheckConstraint("held_nano = 0 OR posted_nano + held_nano <= limit_nano", name="limit"),
    )

    budget_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    starts_on: Mapped[str] = mapped_column(String(10), primary_key=True)  # YYYY-MM-DD
    organization_id: Mapped[str] = mapped_column(String(40))
    limit_nano: Mapped[int] = mapped_column(BigInteger)
    posted_nano: Mapped[int] = mapped_column(BigInteger, default=0)
    held_nano: Mapped[int] = mapped_column(BigInteger, default=0)


class HoldWindow(Base):
    """A budget's window in which a hold is counted as well. Gone with the hold."""

    __tablename__ = "hold_window"

    request_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    budget_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    starts_on: Mapped[str] = mapped_column(String(10))
    amount_nano: Mapped[int] = mapped_column(BigInteger)


class Hold(Base):
    """Money set aside for a running request: its uncached worst case. Gone once settled.
    `journal_id` names the process that took it, so that its next start can free what is left."""

    __tablename__ = "hold"

    request_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    organization_id: Mapped[str] = mapped_column(String(40), index=True)
    journal_id: Mapped[str] = mapped_column(String(40), index=True)
    amount_nano: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class LedgerTransaction(Base):
    """One balanced set of entries, posted at most once per `idempotency_key` and never changed:
    triggers refuse it. Requests settled together for one organization share one transaction;
    `content_sha256` is then the Merkle root of their receipts (`sealing.py`), else of nothing."""

    __tablename__ = "ledger_transaction"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(String(120), unique=True)
    kind: Mapped[str] = mapped_column(String(24))
    organization_id: Mapped[str] = mapped_column(String(40), server_default="", default="")
    currency: Mapped[str] = mapped_column(String(3))
    content_sha256: Mapped[str] = mapped_column(String(64), server_default="", default="")
    created_at: Mapped[datetime]


class LedgerEntry(Base):
    """A debit (negative) or credit (positive) on an account; entries of a transaction sum to
    zero. Accounts are named by `ledger.py`."""

    __tablename__ = "ledger_entry"
    __table_args__ = (Index("ix_ledger_entry_account_created_at", "account", "created_at"),)

    transaction_id: Mapped[str] = mapped_column(
        ForeignKey("ledger_transaction.id"), primary_key=True
    )
    account: Mapped[str] = mapped_column(String(80), primary_key=True)
    amount_nano: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class UnsealedTransaction(Base):
    """A transaction that no seal covers yet, written with it. A queue rather than a position:
    the order of ids is not the order of commits."""

    __tablename__ = "unsealed_transaction"

    ledger_transaction_id: Mapped[str] = mapped_column(String(40), primary_key=True)


class Seal(Base):
    """A batch of ledger transactions under one hash, chained to the batch before."""

    __tablename__ = "seal"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    previous_sha256: Mapped[str] = mapped_column(String(64))
    root_sha256: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    signature: Mapped[str] = mapped_column(String(128))  # Ed25519 of `sha256`, hexadecimal
    num_transactions: Mapped[int]
    created_at: Mapped[datetime]


class SealedTransaction(Base):
    """Where a transaction stands among the leaves of its seal."""

    __tablename__ = "sealed_transaction"
    __table_args__ = (UniqueConstraint("seal_number", "position"),)

    ledger_transaction_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    seal_number: Mapped[int] = mapped_column(BigInteger)
    position: Mapped[int]


class CreditLot(Base):
    """Credit paid ahead or given. Used up in the order of priority (0 first), expiry, creation;
    what is left at `expires_at` is lost. `source` names the one payment or grant behind it."""

    __tablename__ = "credit_lot"
    __table_args__ = (
        CheckConstraint(one_of("kind", CREDIT_KINDS), name="kind"),
        CheckConstraint("remaining_nano BETWEEN 0 AND amount_nano", name="remaining"),
        CheckConstraint(_within("amount_nano", 0), name="amount"),
        Index("ix_credit_lot_organization_id_remaining_nano", "organization_id", "remaining_nano"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    organization_id: Mapped[str] = mapped_column(String(40))
    kind: Mapped[str] = mapped_column(String(16))
    amount_nano: Mapped[int] = mapped_column(BigInteger)
    remaining_nano: Mapped[int] = mapped_column(BigInteger)
    priority: Mapped[int] = mapped_column(default=50)
    source: Mapped[str] = mapped_column(String(120), unique=True)
    note: Mapped[str] = mapped_column(String(200), default="")
    expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime]


class LotUse(Base):
    """How much of a lot one ledger transaction used up (positive) or gave back (negative)."""

    __tablename__ = "lot_use"

    ledger_transaction_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    lot_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    amount_nano: Mapped[int] = mapped_column(BigInteger)
