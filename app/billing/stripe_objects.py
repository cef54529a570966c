"""Stripe's objects, as far as this box reads them, and their reading from Stripe's JSON.

Amounts are whole cents (the smallest unit of the currency). An id that Stripe left empty is "".
`top_up_id`, `invoice_id` and `operation_key` are ours, from the object's metadata.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

Data = Mapping[str, Any]


class Customer(msgspec.Struct, frozen=True):
    """An organization at Stripe. `default_payment_method` is what its invoices are paid with."""

    id: str
    email: str
    default_payment_method: str
    organization_id: str
    is_deleted: bool = False


class Checkout(msgspec.Struct, frozen=True):
    """A Checkout session. It may be `complete` before it is paid: only `payment_status` tells."""

    id: str
    url: str  # "" once it is no longer open
    status: str  # open, complete, expired
    payment_status: str  # paid, unpaid, no_payment_required
    payment_intent_id: str
    customer_id: str
    top_up_id: str


class Payment(msgspec.Struct, frozen=True):
    """A payment intent with its latest charge. Money has come in only when it `is_paid`."""

    id: str
    status: str  # requires_payment_method, requires_action, processing, canceled, succeeded ...
    amount_cents: int
    amount_received_cents: int
    currency: str
    customer_id: str
    payment_method_id: str
    is_card_kept: bool  # by the customer, who may have removed it since
    card_label: str  # Visa ending 4242
    top_up_id: str
    refunded_cents: int
    is_disputed: bool
    charge_id: str
    balance_transaction_id: str  # of the charge
    error_code: str
    error_message: str

    @property
    def is_paid(self) -> bool:
        return self.status == "succeeded"

    @property
    def is_over(self) -> bool:
        """Whether its state can no longer change by itself."""
        return self.status in ("succeeded", "canceled")


class Refund(msgspec.Struct, frozen=True):
    """Money given back. `operation_key` is "" where a person made it in Stripe's dashboard."""

    id: str
    payment_id: str
    charge_id: str
    amount_cents: int
    status: str  # pending, requires_action, succeeded, failed, canceled
    top_up_id: str
    operation_key: str


class BalanceTransaction(msgspec.Struct, frozen=True):
    """One movement of the balance at Stripe: net = amount - fee. `source_id` is the charge, refund,
    dispute or payout it comes from, and `payment_id` the payment of that, where there is one."""

    id: str
    type: str  # charge, payment, refund, adjustment (disputes), payout, stripe_fee ...
    amount_cents: int
    fee_cents: int
    net_cents: int
    currency: str
    source_id: str
    payment_id: str
    created_at: datetime


class Dispute(msgspec.Struct, frozen=True):
    """A payment that the card's owner disputes. The sums are over its balance transactions."""

    id: str
    payment_id: str
    charge_id: str
    amount_cents: int
    status: str  # needs_response, under_review, won, lost, warning_...
    currency: str
    withdrawn_cents: int  # gross, that Stripe holds back now; 0 once reinstated
    fee_cents: int  # for the dispute itself, less what was given back of it
    balance_transactions: tuple[BalanceTransaction, ...]

    @property
    def is_funds_withdrawn(self) -> bool:
        return self.withdrawn_cents > 0

    @property
    def is_over(self) -> bool:
        return self.is_in_our_favour or self.status == "lost"

    @property
    def is_in_our_favour(self) -> bool:
        return self.status in ("won", "warning_closed", "prevented")


class Invoice(msgspec.Struct, frozen=True):
    """An invoice at Stripe. `num_lines` counts all lines, whoever added them."""

    id: str
    status: str  # draft, open, paid, uncollectible, void; deleted
    total_cents: int
    amount_due_cents: int
    amount_paid_cents: int
    credited_cents: int  # by credit notes before it was paid
    currency: str
    customer_id: str
    hosted_url: str
    invoice_id: str
    num_lines: int | None  # None where not all lines came with the invoice: list them
    attempt_count: int  # of collecting it
    payment_ids: tuple[str, ...]
    created_at: datetime


class InvoiceLine(msgspec.Struct, frozen=True):
    """One line of an invoice at Stripe. `position` is ours, "" where a person added the line."""

    id: str
    description: str
    amount_cents: int
    metadata: dict[str, str]


class LineParams(msgspec.Struct, frozen=True):
    """A line to be added to a draft. `metadata` is how it is found again."""

    description: str
    amount_cents: int
    metadata: dict[str, str] = {}


class Event(msgspec.Struct, frozen=True):
    """That something happened to an object. What it is now must be read again from Stripe."""

    id: str
    type: str
    created_at: datetime
    object_id: str
    object_kind: str  # checkout.session, payment_intent, charge, refund, dispute, invoice ...
    payment_id: str = ""  # of the payment that a charge, refund or dispute belongs to
    account_id: str = ""  # of the connected account that it happened to; ours is ""
    is_live: bool | None = None  # None where that is not known
    top_up_id: str = ""  # ours, as the object's metadata tells it
    invoice_id: str = ""  # likewise


def read_customer(data: Data) -> Customer:
    return Customer(
        id=data["id"],
        email=data.get("email") or "",
        default_payment_method=_id(
            _object(data.get("invoice_settings")).get("default_payment_method")
        ),
        organization_id=_ours(data, "organization_id"),
        is_deleted=bool(data.get("deleted")),
    )


def read_checkout(data: Data) -> Checkout:
    return Checkout(
        id=data["id"],
        url=data.get("url") or "",
        status=data["status"],
        payment_status=data["payment_status"],
        payment_intent_id=_id(data.get("payment_intent")),
        customer_id=_id(data.get("customer")),
        top_up_id=_ours(data, "top_up_id"),
    )


def read_payment(data: Data) -> Payment:
    """`latest_charge` and `payment_method` should be expanded."""
    charge = _object(data.get("latest_charge"))
    method = _object(data.get("payment_method"))
    error = _object(data.get("last_payment_error"))
    return Payment(
        id=data["id"],
        status=data["status"],
        amount_cents=data["amount"],
        amount_received_cents=data.get("amount_received") or 0,
        currency=data["currency"],
        customer_id=_id(data.get("customer")),
        payment_method_id=_id(data.get("payment_method")),
        is_card_kept=bool(method.get("customer")),
        card_label=_label(method),
        top_up_id=_ours(data, "top_up_id"),
        refunded_cents=charge.get("amount_refunded") or 0,
        is_disputed=bool(charge.get("disputed")),
        charge_id=_id(data.get("latest_charge")),
        balance_transaction_id=_id(charge.get("balance_transaction")),
        error_code=error.get("decline_code") or error.get("code") or "",
        error_message=error.get("message") or "",
    )


def read_refund(data: Data) -> Refund:
    return Refund(
        id=data["id"],
        payment_id=_id(data.get("payment_intent")),
        charge_id=_id(data.get("charge")),
        amount_cents=data["amount"],
        status=data.get("status") or "",
        top_up_id=_ours(data, "top_up_id"),
        operation_key=_ours(data, "operation_key"),
    )


def read_balance_transaction(data: Data) -> BalanceTransaction:
    """`payment_id` is known only where `source` is expanded."""
    source = data.get("source")
    return BalanceTransaction(
        id=data["id"],
        type=data["type"],
        amount_cents=data["amount"],
        fee_cents=data["fee"],
        net_cents=data["net"],
        currency=data["currency"],
        source_id=_id(source),
        payment_id=_id(_object(source).get("payment_intent")),
        created_at=_time(data["created"]),
    )


def read_dispute(data: Data) -> Dispute:
    moves = tuple(read_balance_transaction(move) for move in data["balance_transactions"])
    return Dispute(
        id=data["id"],
        payment_id=_id(data.get("payment_intent")),
        charge_id=_id(data.get("charge")),
        amount_cents=data["amount"],
        status=data["status"],
        currency=data["currency"],
        withdrawn_cents=-sum(move.amount_cents for move in moves),
        fee_cents=sum(move.fee_cents for move in moves),
        balance_transactions=moves,
    )


def read_invoice(data: Data) -> Invoice:
    """`payments` should be expanded."""
    lines: Data = data["lines"]
    payments: list[Data] = _object(data.get("payments")).get("data", [])
    ids = (_id(payment["payment"].get("payment_intent")) for payment in payments)
    return Invoice(
        id=data["id"],
        status=data.get("status") or "",
        total_cents=data["total"],
        amount_due_cents=data["amount_due"],
        amount_paid_cents=data["amount_paid"],
        credited_cents=data.get("pre_payment_credit_notes_amount") or 0,
        currency=data["currency"],
        customer_id=_id(data.get("customer")),
        hosted_url=data.get("hosted_invoice_url") or "",
        invoice_id=_ours(data, "invoice_id"),
        num_lines=None if lines.get("has_more") else len(lines["data"]),
        attempt_count=data.get("attempt_count") or 0,
        payment_ids=tuple(id for id in ids if id),
        created_at=_time(data["created"]),
    )


def read_invoice_line(data: Data) -> InvoiceLine:
    return InvoiceLine(
        id=data["id"],
        description=data.get("description") or "",
        amount_cents=data["amount"],
        metadata=dict(data.get("metadata") or {}),
    )


def read_event(data: Data) -> Event:
    subject: Data = data["data"]["object"]
    return Event(
        id=data["id"],
        type=data["type"],
        created_at=_time(data["created"]),
        object_id=subject.get("id") or "",
        object_kind=subject.get("object") or "",
        payment_id=_id(subject.get("payment_intent")),
        account_id=data.get("account") or "",
        is_live=data.get("livemode"),
        top_up_id=_ours(subject, "top_up_id"),
        invoice_id=_ours(subject, "invoice_id"),
    )


def _id(value: str | Data | None) -> str:
    """The id of what Stripe gives as an id, as the whole object when expanded, or not at all."""
    if value is None:
        return ""
    return value if isinstance(value, str) else value["id"]


def _object(value: str | Data | None) -> Data:
    return {} if value is None or isinstance(value, str) else value


def _ours(data: Data, name: str) -> str:
    return _object(data.get("metadata")).get(name, "")


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _label(method: Data) -> str:
    """What a customer knows the payment method by."""
    if not method:
        return ""
    card: Data | None = method.get("card")
    if card is None:
        return method["type"].replace("_", " ").capitalize()
    return f"{card['brand'].capitalize()} ending {card['last4']}"
