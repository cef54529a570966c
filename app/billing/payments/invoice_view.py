"""Invoices as people read them: lists, lines, what was waived, and the requests behind a line.

Reads only. Another organization's invoice is not found, unless the operator asks.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec
from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import credit_account, on_account
from app.billing.payments.cents import NANO_PER_CENT
from app.billing.payments.month_usage import MonthLine, month_lines
from app.billing.payments.periods import period_named
from app.billing.payments.steady_clock import MAX_ERROR, MAX_LEAP
from app.billing.payments.tables import Invoice, InvoiceLine
from app.billing.tables import CREDIT_KINDS, LedgerEntry, LedgerTransaction
from app.core.csv_text import csv_blocks
from app.core.errors import InvalidRequest, NotFound
from app.core.money import write_amount
from app.metering.hours import EPOCH
from app.metering.requests import Place
from app.metering.tables import UsageEvent, UsageLine

MAX_PAGE = 1000
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
CSV_HEADER = (
    "position",
    "model",
    "service_class",
    "dimension",
    "quantity",
    "price",
    "per",
    "amount",
    "currency",
)


class InvoicePage(msgspec.Struct, frozen=True):
    """`next` is given where there are more, for the parameter `after`."""

    invoices: Sequence[Invoice]
    next: str | None


class LineRequest(msgspec.Struct, frozen=True):
    """One request behind a line of an invoice, with its share of it."""

    request_id: str
    finished_at: datetime
    quantity: int
    amount_nano: int


class RequestPage(msgspec.Struct, frozen=True):
    """`next` is given where there are more, for the parameter `after`."""

    requests: list[LineRequest]
    next: str | None


async def read_invoices(
    session: AsyncSession, organization_id: str | None, after: str, limit: int
) -> InvoicePage:
    """The newest first; of all organizations for None. `after` is the `next` of the page before.
    Raises `InvalidRequest`."""
    limit = max(1, min(limit, MAX_PAGE))
    query = select(Invoice).order_by(Invoice.number.desc()).limit(limit + 1)
    if organization_id is not None:
        query = query.where(Invoice.organization_id == organization_id)
    if after:
        if not _NUMBER.fullmatch(after):
            raise InvalidRequest(
                "This page of invoices does not exist: after is the next of the page before.",
                param="after",
            )
        query = query.where(Invoice.number < int(after))
    found = (await session.scalars(query)).all()
    return InvoicePage(found[:limit], str(found[limit - 1].number) if len(found) > limit else None)


async def read_invoice(
    session: AsyncSession, organization_id: str | None, invoice_id: str
) -> Invoice:
    """One of the organization's; of anybody's for None. Raises `NotFound`."""
    invoice = await session.get(Invoice, invoice_id)
    if invoice is None or organization_id not in (None, invoice.organization_id):
        raise NotFound(f"There is no invoice {invoice_id!r}.", code="invoice_not_found")
    return invoice


async def read_lines(session: AsyncSession, invoice: Invoice) -> Sequence[InvoiceLine]:
    rows = await session.scalars(
        select(InvoiceLine)
        .where(InvoiceLine.invoice_id == invoice.id)
        .order_by(InvoiceLine.position)
    )
    return rows.all()


async def read_waived(session: AsyncSession, invoice: Invoice) -> list[MonthLine]:
    """What was used in the month and is not charged."""
    period = period_named(invoice.period)
    return await month_lines(session, invoice.organization_id, period, "waived")


async def read_requests(
    session: AsyncSession, invoice: Invoice, position: int, after: str, limit: int
) -> RequestPage:
    """Requests of one line, the newest first, while they are kept one by one. `after` is the
    `next` of the page before. Raises `NotFound` for a line that there is not, and
    `InvalidRequest`."""
    line = await session.get(InvoiceLine, (invoice.id, position))
    if line is None:
        raise NotFound(f"The invoice has no line {position}.", code="invoice_line_not_found")
    limit = max(1, min(limit, MAX_PAGE))
    ended_from = await _ended_from(session, invoice)
    query = _of_line(invoice, line, ended_from)
    query = query.order_by(UsageEvent.finished_at.desc(), UsageEvent.id.desc())
    if after:
        query = query.where(Place.read(after).older())
    found = (await session.execute(query.limit(limit + 1))).all()
    return RequestPage(
        [LineRequest(row[1], row[2], row[3], row[4]) for row in found[:limit]],
        Place(found[limit - 1][2], found[limit - 1][0]).text if len(found) > limit else None,
    )


async def _ended_from(session: AsyncSession, invoice: Invoice) -> datetime:
    """When the first request of the month ended at the earliest. What is posted in it may have
    been in the journal for as long as the box was off before, so not since long before the last
    posting; where there is none, everything is of this month or later.

    That is of one journal. Of several processes one may have been off, its journal unread, while
    others posted: what it had longer than `MAX_LEAP` is on the invoice and not in this list. The
    month's own postings would tell, but reading all their requests is what this bound saves."""
    own = on_account(invoice.organization_id)
    last = EPOCH
    for account in (own, *(credit_account(invoice.organization_id, kind) for kind in CREDIT_KINDS)):
        posted_at = await session.scalar(
            select(func.max(LedgerEntry.created_at)).where(
                LedgerEntry.account == account,
                LedgerEntry.created_at < period_named(invoice.period).start,
            )
        )
        last = max(last, posted_at or EPOCH)
    return last - MAX_LEAP


def _of_line(
    invoice: Invoice, line: InvoiceLine, ended_from: datetime
) -> Select[str, str, datetime, int, int]:
    """A request belongs to the month in which it was posted, soon after its end by the same clock,
    or as soon as the box is on again."""
    period = period_named(invoice.period)
    return (
        select(
            UsageEvent.id,
            UsageEvent.request_id,
            UsageEvent.finished_at,
            UsageLine.quantity,
            UsageLine.amount_nano,
        )
        .join(UsageLine, UsageLine.event_id == UsageEvent.id)
        .join(LedgerTransaction, LedgerTransaction.id == UsageEvent.ledger_transaction_id)
        .where(
            UsageEvent.organization_id == invoice.organization_id,
            UsageEvent.endpoint_name == line.endpoint_name,
            UsageEvent.service_class == line.service_class,
            UsageEvent.finished_at >= ended_from,  # what an index can find
            UsageEvent.finished_at < period.end + MAX_ERROR,
            UsageLine.dimension == line.dimension,
            UsageLine.price_nano == line.price_nano,
            UsageLine.unit_scale == line.unit_scale,
            UsageLine.disposition == "billed",
            LedgerTransaction.created_at >= period.start,
            LedgerTransaction.created_at < period.end,
        )
    )


def invoice_csv(
    invoice: Invoice, lines: Sequence[InvoiceLine], waived: Sequence[MonthLine]
) -> Iterator[bytes]:
    """Every line with exact amounts, then what leads from their sum to what is due."""
    return csv_blocks(CSV_HEADER, _rows(invoice, lines, waived))


def _rows(
    invoice: Invoice, lines: Sequence[InvoiceLine], waived: Sequence[MonthLine]
) -> Iterator[list[str | int]]:
    for line in lines:
        yield [str(line.position), *_cells(line), write_amount(line.amount_nano), invoice.currency]
    for line in waived:
        yield ["waived", *_cells(line), write_amount(0), invoice.currency]
    for words, nano in _sums(invoice):
        yield [words, *[""] * 6, write_amount(nano), invoice.currency]


def _sums(invoice: Invoice) -> Iterator[tuple[str, int]]:
    """Without signs, which spreadsheets take for formulas."""
    yield "usage", invoice.usage_nano
    yield "less credit", invoice.credit_nano
    for words, nano in (
        ("carried over from before", invoice.carry_in_nano),
        ("carried on to the next", -invoice.carry_out_nano),
    ):
        yield (words, nano) if nano >= 0 else (f"less {words}", -nano)
    yield "due", invoice.due_cents * NANO_PER_CENT


def _cells(line: InvoiceLine | MonthLine) -> list[str | int]:
    return [
        line.endpoint_name,
        line.service_class,
        line.dimension,
        line.quantity,
        write_amount(line.price_nano),
        line.unit_scale,
    ]
