"""Tables of payments: profiles, top-ups, invoices, what was asked of Stripe and what it told us.

Amounts in cents are what Stripe deals in; nano-units everywhere else.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Index, LargeBinary, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from app.core.database import Base, one_of

# planned -> sent -> confirmed | rejected; sent -> unknown when no answer came, and then confirmed
# by a search, or quarantined for a person once Stripe no longer knows the key.
OPERATION_STATES = ("planned", "sent", "unknown", "confirmed", "rejected", "quarantined")
EVENT_STATES = ("received", "done", "parked", "dead")
TOP_UP_STATES = ("created", "pending", "paid", "failed", "expired", "refunded", "disputed")
TOP_UP_KINDS = ("checkout", "recharge")
INVOICE_STATES = (
    "frozen",  # lines and total are fixed
    "pushed",  # Stripe has a draft with our lines
    "finalised",  # the totals agreed
    "paid",
    "past_due",
    "uncollectible",
    "void",
    "differs",  # Stripe's total is not ours: left a draft, for a person
    "settled",  # nothing to pay: covered by credit, or less than Stripe takes
)


class BillingProfile(Base):
    """How an organization pays and wants to be told. Recharging: when less than
    `recharge_below_nano` is left, the saved card pays `recharge_cents`."""

    __tablename__ = "billing_profile"

    organization_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    email: Mapped[str] = mapped_column(String(254), default="")
    stripe_customer_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    payment_method_id: Mapped[str | None] = mapped_column(String(255))
    card_label: Mapped[str] = mapped_column(String(80), default="")  # Visa ending 4242
    recharge_below_nano: Mapped[int | None] = mapped_column(BigInteger)
    recharge_cents: Mapped[int | None] = mapped_column(BigInteger)
    recharge_paused: Mapped[str] = mapped_column(String(200), default="")  # why, after a decline
    low_balance_nano: Mapped[int | None] = mapped_column(BigInteger)
    notify_url: Mapped[str] = mapped_column(String(500), default="")
    notify_secret: Mapped[str] = mapped_column(String(80), default="")
    updated_at: Mapped[datetime]


class TopUp(Base):
    """Money paid ahead, through Checkout or from the saved card. Credited only from what Stripe
    itself says was paid."""

    __tablename__ = "top_up"
    __table_args__ = (
        CheckConstraint(one_of("state", TOP_UP_STATES), name="state"),
        CheckConstraint(one_of("kind", TOP_UP_KINDS), name="kind"),
        CheckConstraint("amount_cents > 0 AND refunded_cents >= 0", name="amount"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    organization_id: Mapped[str] = mapped_column(String(40), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    amount_cents: Mapped[int] = mapped_column(BigInteger)
    currency: Mapped[str] = mapped_column(String(3))
    refunded_cents: Mapped[int] = mapped_column(BigInteger, default=0)
    disputed_cents: Mapped[int] = mapped_column(BigInteger, default=0)
    checkout_session_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    checkout_url: Mapped[str | None] = mapped_column(Text)
    payment_intent_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    error: Mapped[str] = mapped_column(String(300), default="")
    created_at: Mapped[datetime]
    paid_at: Mapped[datetime | None]


class Invoice(Base):
    """One month of one organization, fixed when the month is closed. `due_cents` is what is to be
    paid: usage less credit plus `carry_in_nano`, cut to whole cents; the rest is `carry_out_nano`
    of the next. A prepaid account gets one with nothing due."""

    __tablename__ = "invoice"
    __table_args__ = (
        CheckConstraint(one_of("state", INVOICE_STATES), name="state"),
        Index("uq_invoice_organization_id_period", "organization_id", "period", unique=True),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    organization_id: Mapped[str] = mapped_column(String(40))
    organization_name: Mapped[str] = mapped_column(String(80))
    period: Mapped[str] = mapped_column(String(7))  # YYYY-MM, in UTC
    state: Mapped[str] = mapped_column(String(16))
    currency: Mapped[str] = mapped_column(String(3))
    usage_nano: Mapped[int] = mapped_column(BigInteger)
    credit_nano: Mapped[int] = mapped_column(BigInteger)  # of the usage, paid from credit
    carry_in_nano: Mapped[int] = mapped_column(BigInteger)
    due_cents: Mapped[int] = mapped_column(BigInteger)
    carry_out_nano: Mapped[int] = mapped_column(BigInteger)
    stripe_invoice_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    hosted_url: Mapped[str | None] = mapped_column(Text)
    error: Mapped[str] = mapped_column(String(300), default="")
    created_at: Mapped[datetime]
    paid_at: Mapped[datetime | None]


class InvoiceLine(Base):
    """Usage of one model, class and dimension at one price in the invoice's month."""

    __tablename__ = "invoice_line"

    invoice_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    endpoint_name: Mapped[str] = mapped_column(String(64))
    dimension: Mapped[str] = mapped_column(String(16))
    service_class: Mapped[str] = mapped_column(String(16))
    price_nano: Mapped[int] = mapped_column(BigInteger)
    unit_scale: Mapped[int] = mapped_column(BigInteger)
    quantity: Mapped[int] = mapped_column(BigInteger)
    amount_nano: Mapped[int] = mapped_column(BigInteger)


class StripeOperation(Base):
    """One thing to be done at Stripe, at most once. `id` is the idempotency key; the attempt is
    recorded before it is sent, so that after a crash we know that it may have happened."""

    __tablename__ = "stripe_operation"
    __table_args__ = (
        CheckConstraint(one_of("state", OPERATION_STATES), name="state"),
        Index("ix_stripe_operation_state_next_at", "state", "next_at"),
    )

    id: Mapped[str] = mapped_column(String(120), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    organization_id: Mapped[str] = mapped_column(String(40))
    subject_id: Mapped[str] = mapped_column(String(40))  # of the top-up, invoice ... it is for
    params: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    num_attempts: Mapped[int] = mapped_column(default=0)
    first_sent_at: Mapped[datetime | None]
    next_at: Mapped[datetime]
    stripe_id: Mapped[str | None] = mapped_column(String(255))
    error: Mapped[str] = mapped_column(String(300), default="")
    created_at: Mapped[datetime]


class StripeEvent(Base):
    """A webhook as it came, stored before anything is done about it. What is done follows from
    the object, which is read again from Stripe, not from the event."""

    __tablename__ = "stripe_event"
    __table_args__ = (
        CheckConstraint(one_of("state", EVENT_STATES), name="state"),
        Index("ix_stripe_event_state_next_at", "state", "next_at"),
    )

    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    type: Mapped[str] = mapped_column(String(80))
    object_id: Mapped[str] = mapped_column(String(255), default="")
    raw: Mapped[bytes] = mapped_column(LargeBinary)
    state: Mapped[str] = mapped_column(String(16))
    num_attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[datetime]
    error: Mapped[str] = mapped_column(String(300), default="")
    received_at: Mapped[datetime]


class StripeMirror(Base):
    """The last state of an object that we read from Stripe."""

    __tablename__ = "stripe_mirror"

    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    kind: Mapped[str] = mapped_column(String(40))
    data: Mapped[dict[str, Any]]
    read_at: Mapped[datetime]


class Notice(Base):
    """Something an organization should know about its money. Shown in the console until it is
    dismissed or `ended_at`; sent once to its notify URL."""

    __tablename__ = "notice"
    __table_args__ = (
        Index("ix_notice_organization_id_created_at", "organization_id", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    organization_id: Mapped[str] = mapped_column(String(40))
    kind: Mapped[str] = mapped_column(String(32))  # low_balance, recharge_failed ...
    message: Mapped[str] = mapped_column(String(400))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    dismissed_at: Mapped[datetime | None]
    # Delivery to the notify URL; `next_at` is NULL when nothing is left to do.
    num_attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[datetime | None] = mapped_column(index=True)
    delivered_at: Mapped[datetime | None]
    delivery_error: Mapped[str] = mapped_column(String(300), default="")


class ReconciliationRun(Base):
    """One comparison of all the books; `checks` holds each one's numbers and what differed."""

    __tablename__ = "reconciliation_run"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    started_at: Mapped[datetime] = mapped_column(index=True)
    finished_at: Mapped[datetime]
    num_differences: Mapped[int]
    checks: Mapped[dict[str, Any]]


class DeviceCost(Base):
    """What an hour of a device costs the operator, for the margin."""

    __tablename__ = "device_cost"

    device: Mapped[str] = mapped_column(String(80), primary_key=True)  # cpu, cuda
    hour_nano: Mapped[int] = mapped_column(BigInteger)
    updated_at: Mapped[datetime]
