"""Tables of money. Amounts are integer nano-units of the box's currency."""

from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.core.database import Base, one_of
from app.metering.tables import DIMENSIONS

MAX_HOLD_NANO = 10**15  # of one request
# What an account may owe and hold together. Sums and differences of two such amounts stay within
# 64 bits; beyond them SQLite would go on with a float and PostgreSQL would refuse.
MAX_BALANCE_NANO = 4 * 10**18


def _within(column: str, lowest: int) -> str:
    return f"{column} BETWEEN {lowest} AND {MAX_BALANCE_NANO}"


class PriceBook(Base):
    """An immutable set of prices in force from `effective_at` until the next book."""

    __tablename__ = "price_book"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    currency: Mapped[str] = mapped_column(String(3))
    sha256: Mapped[str] = mapped_column(String(64))
    effective_at: Mapped[datetime]
    created_at: Mapped[datetime]


class PriceItem(Base):
    """Nano-units per `unit_scale` of a dimension. `endpoint_name` `*` is the default."""

    __tablename__ = "price_item"
    __table_args__ = (
        UniqueConstraint("price_book_id", "endpoint_name", "dimension", "service_class"),
        CheckConstraint(one_of("dimension", DIMENSIONS), name="dimension"),
        CheckConstraint("price_nano >= 0 AND unit_scale > 0", name="price"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    price_book_id: Mapped[str] = mapped_column(ForeignKey("price_book.id"), index=True)
    endpoint_name: Mapped[str] = mapped_column(String(64), default="*")
    dimension: Mapped[str] = mapped_column(String(16))
    service_class: Mapped[str] = mapped_column(String(16), default="standard")
    price_nano: Mapped[int] = mapped_column(BigInteger)
    unit_scale: Mapped[int] = mapped_column(BigInteger)


class AccountBalance(Base):
    """What an organization owes or has. `posted_nano` falls with usage and rises with payments;
    `credit_limit_nano` is how far below zero it may go, NULL without limit. The constraint is what
    makes a limit a promise: no code path can spend past it."""

    __tablename__ = "account_balance"
    __table_args__ = (
        CheckConstraint(_within("held_nano", 0), name="held"),
        CheckConstraint(_within("posted_nano", -MAX_BALANCE_NANO), name="posted"),
        CheckConstraint(_within("credit_limit_nano", -MAX_BALANCE_NANO), name="credit_limit"),
        CheckConstraint(
            "credit_limit_nano IS NULL OR held_nano = 0"
            " OR posted_nano - held_nano >= -credit_limit_nano",
            name="limit",
        ),
    )

    organization_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    currency: Mapped[str] = mapped_column(String(3))
    posted_nano: Mapped[int] = mapped_column(BigInteger, default=0)
    held_nano: Mapped[int] = mapped_column(BigInteger, default=0)
    credit_limit_nano: Mapped[int | None] = mapped_column(BigInteger)


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
    """One balanced set of entries, posted at most once per `idempotency_key`."""

    __tablename__ = "ledger_transaction"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(String(120), unique=True)
    kind: Mapped[str] = mapped_column(String(24))
    currency: Mapped[str] = mapped_column(String(3))
    created_at: Mapped[datetime]


class LedgerEntry(Base):
    """A debit (negative) or credit (positive) on an account; entries of a transaction sum to
    zero. Accounts are named `customer:<organization>`, `revenue`, `stripe_clearing` and so on."""

    __tablename__ = "ledger_entry"
    __table_args__ = (Index("ix_ledger_entry_account_created_at", "account", "created_at"),)

    transaction_id: Mapped[str] = mapped_column(
        ForeignKey("ledger_transaction.id"), primary_key=True
    )
    account: Mapped[str] = mapped_column(String(80), primary_key=True)
    amount_nano: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]
