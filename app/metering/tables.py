"""Tables of usage. Rows keep names and prices by value and refer to nothing that can be deleted."""

from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.core.database import Base, one_of

DIMENSIONS = (
    "input",
    "cached_input",
    "cache_write",
    "kv_device",
    "kv_host",
    "kv_disk",
    "output",
    "request",
    "device_ms",
)
DISPOSITIONS = ("billed", "waived", "free")


class UsageEvent(Base):
    """One attempt of one request, written once when it is settled. `outcome` is `completed`,
    `cancelled` (the client left, or a prediction ran in vain by what it asked for: its finish
    reason says why), `failed` (our fault, or refused) or `lost` (the box went down)."""

    __tablename__ = "usage_event"
    __table_args__ = (
        CheckConstraint(
            one_of("outcome", ("completed", "cancelled", "failed", "lost")), name="outcome"
        ),
        Index("ix_usage_event_organization_id_finished_at", "organization_id", "finished_at"),
        Index(
            "ix_usage_event_organization_id_endpoint_name_finished_at",
            *("organization_id", "endpoint_name", "finished_at"),
        ),
    )

    id: Mapped[str] = mapped_column(String(48), primary_key=True)  # <request id>:<attempt>
    request_id: Mapped[str] = mapped_column(String(40), index=True)
    ledger_transaction_id: Mapped[str] = mapped_column(
        String(40), index=True, server_default="", default=""
    )
    organization_id: Mapped[str] = mapped_column(String(40))
    api_key_id: Mapped[str] = mapped_column(String(40))
    api_key_name: Mapped[str] = mapped_column(String(80))
    endpoint_name: Mapped[str] = mapped_column(String(64))
    version_number: Mapped[int]
    route: Mapped[str] = mapped_column(String(40))
    service_class: Mapped[str] = mapped_column(String(16))
    outcome: Mapped[str] = mapped_column(String(16))
    finish_reason: Mapped[str] = mapped_column(String(32))
    price_book_id: Mapped[str] = mapped_column(String(40))
    currency: Mapped[str] = mapped_column(String(3))
    amount_nano: Mapped[int] = mapped_column(BigInteger)  # sum of the billed lines
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime]
    duration_ns: Mapped[int] = mapped_column(BigInteger)
    first_token_ns: Mapped[int | None] = mapped_column(BigInteger)


class UsageLine(Base):
    """One dimension of an event: quantity x price = amount, rounded once."""

    __tablename__ = "usage_line"
    __table_args__ = (
        CheckConstraint(one_of("dimension", DIMENSIONS), name="dimension"),
        CheckConstraint(one_of("disposition", DISPOSITIONS), name="disposition"),
    )

    event_id: Mapped[str] = mapped_column(ForeignKey("usage_event.id"), primary_key=True)
    dimension: Mapped[str] = mapped_column(String(16), primary_key=True)
    quantity: Mapped[int] = mapped_column(BigInteger)
    price_nano: Mapped[int] = mapped_column(BigInteger)
    unit_scale: Mapped[int] = mapped_column(BigInteger)
    amount_nano: Mapped[int] = mapped_column(BigInteger)
    disposition: Mapped[str] = mapped_column(String(8))


class UsageSeries(Base):
    """One combination of who used what at which price, so that the rows which add it up by the
    hour are small."""

    __tablename__ = "usage_series"
    __table_args__ = (
        UniqueConstraint(
            "organization_id",
            "api_key_id",
            "endpoint_name",
            "version_number",
            "service_class",
            "dimension",
            "disposition",
            "price_book_id",
            "price_nano",
            "unit_scale",
            name="uq_usage_series",
        ),
        CheckConstraint(one_of("dimension", DIMENSIONS), name="dimension"),
        CheckConstraint(one_of("disposition", DISPOSITIONS), name="disposition"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)  # see `series.py`
    organization_id: Mapped[str] = mapped_column(String(40))
    api_key_id: Mapped[str] = mapped_column(String(40))
    api_key_name: Mapped[str] = mapped_column(String(80))
    endpoint_name: Mapped[str] = mapped_column(String(64))
    version_number: Mapped[int]
    service_class: Mapped[str] = mapped_column(String(16))
    dimension: Mapped[str] = mapped_column(String(16))
    disposition: Mapped[str] = mapped_column(String(8))
    price_book_id: Mapped[str] = mapped_column(String(40))
    price_nano: Mapped[int] = mapped_column(BigInteger)
    unit_scale: Mapped[int] = mapped_column(BigInteger)


class UsageHour(Base):
    """What one series added up to in one hour, written in the transaction that settles. The hour
    is that of the posting to the ledger, so both agree on every period to the last nano-unit.
    `saved_nano`: what cached tokens would have cost more at the input price."""

    __tablename__ = "usage_hour"
    # Rows lie in the order of their key, so that a month of a series is read in one go.
    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012

    series_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    hour: Mapped[int] = mapped_column(primary_key=True)  # since 1970, UTC
    quantity: Mapped[int] = mapped_column(BigInteger)
    amount_nano: Mapped[int] = mapped_column(BigInteger)
    saved_nano: Mapped[int] = mapped_column(BigInteger, default=0)
