"""Invoices over HTTP: what a month cost, line by line down to its requests, and for the operator
how it was paid. What an invoice is: `app.billing.payments.invoices`."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.response import Stream
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.billing.payments import invoice_ending, invoice_view, steady_clock
from app.billing.payments.invoice_payments import standing
from app.billing.payments.invoice_view import LineRequest
from app.billing.payments.month_usage import MonthLine
from app.billing.payments.periods import period_named
from app.billing.payments.tables import Invoice, InvoiceLine
from app.billing.records import Records
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.organizations.principal import Principal
from app.settings import Settings

AnyRequest = Request[object, object, State]
CSV_SUFFIX = ".csv"
DEFAULT_PAGE = 100


class InvoiceState(msgspec.Struct, frozen=True, kw_only=True):
    """usage_nano - credit_nano + carry_in_nano = due_cents and carry_out_nano, where a cent is
    10^7 nano-units. `state`: frozen, pushed (on its way to Stripe), finalised (to be paid), paid,
    past_due, uncollectible, void, differs (held back, for the operator), settled (nothing to
    pay)."""

    id: str
    number: int
    organization_id: str
    organization_name: str
    period: str
    state: str
    currency: str
    usage_nano: int
    credit_nano: int
    carry_in_nano: int
    due_cents: int
    carry_out_nano: int
    hosted_url: str | None
    error: str
    created_at: datetime
    paid_at: datetime | None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """quantity x price_nano / unit_scale = amount_nano, but for rounding of each request's."""

    position: int
    endpoint_name: str
    service_class: str
    dimension: str
    price_nano: int
    unit_scale: int
    quantity: int
    amount_nano: int


class InvoiceDetail(InvoiceState, frozen=True, kw_only=True):
    """`waived` was used and is not charged. `open_nano` is not paid yet."""

    lines: list[Line]
    waived: list[MonthLine]
    open_nano: int


class InvoiceList(msgspec.Struct, frozen=True, kw_only=True):
    """The newest first. `next` is the `after` of the next page."""

    invoices: list[InvoiceState]
    next: str | None


class LineRequests(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of a line, the newest first. `next` is the `after` of the next page. Not
    `is_complete`: some are old enough to be kept in archives only."""

    requests: list[LineRequest]
    next: str | None
    is_complete: bool


class Ending(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`state`: void, for a mistake; uncollectible, which can still be paid."""

    state: str


class ClockReading(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`now` is the time by another clock than the box's, with its time zone."""

    now: datetime


@get("/invoices", guards=[allowed("read")], summary="List invoices")
async def list_invoices(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    of_all: Annotated[bool, QueryParameter(name="all", required=False)] = False,
    after: FromQuery[str] = "",
    limit: FromQuery[int] = DEFAULT_PAGE,
) -> InvoiceList:
    """At most 1,000 at once. With `all=true`, for the operator, of every organization."""
    if of_all:
        principal.require_operator()
    async with _database(request).read() as session:
        page = await invoice_view.read_invoices(
            session, None if of_all else principal.organization_id, after, limit
        )
    invoices = [InvoiceState(**_fields(row, InvoiceState)) for row in page.invoices]
    return InvoiceList(invoices=invoices, next=page.next)


@get("/invoices/{invoice_id:str}", guards=[allowed("read")], summary="Show an invoice")
async def show_invoice(
    request: AnyRequest, principal: NamedDependency[Principal], invoice_id: FromPath[str]
) -> Response[InvoiceDetail] | Stream:
    """With its lines. With `.csv` behind the id, as a file for spreadsheets."""
    async with _database(request).read() as session:
        invoice = await _own(session, principal, invoice_id.removesuffix(CSV_SUFFIX))
        if not invoice_id.endswith(CSV_SUFFIX):
            return Response(await _detail(session, invoice))
        lines = await invoice_view.read_lines(session, invoice)
        waived = await invoice_view.read_waived(session, invoice)
    return Stream(
        invoice_view.invoice_csv(invoice, lines, waived),
        media_type="text/csv",
        headers={
            "Content-Disposition": f'attachment; filename="invoice-{invoice.number}.csv"',
            "X-Content-Type-Options": "nosniff",
        },
    )


@get(
    "/invoices/{invoice_id:str}/lines/{position:int}/requests",
    guards=[allowed("read")],
    summary="Requests behind a line of an invoice",
)
async def list_requests(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    invoice_id: FromPath[str],
    position: FromPath[int],
    after: FromQuery[str] = "",
    limit: FromQuery[int] = DEFAULT_PAGE,
) -> LineRequests:
    """Each has a receipt, which says and proves the same: `/v1/receipts/{request_id}`."""
    settings: Settings = request.app.state.settings
    async with _database(request).read() as session:
        invoice = await _own(session, principal, invoice_id)
        page = await invoice_view.read_requests(session, invoice, position, after, limit)
    records: Records = request.app.state.records
    detail_from = await records.detail_from(settings.usage_detail_days)
    return LineRequests(
        requests=page.requests,
        next=page.next,
        is_complete=period_named(invoice.period).start >= detail_from,
    )


@post(
    "/invoices/{invoice_id:str}/paid",
    guards=[allowed("admin")],
    status_code=200,
    summary="Mark an invoice as paid (operator)",
)
async def mark_paid(
    request: AnyRequest, principal: NamedDependency[Principal], invoice_id: FromPath[str]
) -> InvoiceDetail:
    """It was paid otherwise than through Stripe, all that was open of it."""
    return await _change(request, principal, invoice_id, invoice_ending.mark_paid)


@post(
    "/invoices/{invoice_id:str}/end",
    guards=[allowed("admin")],
    status_code=200,
    summary="Void an invoice, or give it up (operator)",
)
async def end_invoice(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    invoice_id: FromPath[str],
    data: JSONBody[Ending],
) -> InvoiceDetail:
    """What is open of it is written off. One that is at Stripe is ended there, which shows here a
    moment later."""
    if data.state not in ("void", "uncollectible"):
        raise InvalidRequest("state is one of void, uncollectible.", param="state")

    async def end(session: AsyncSession, invoice_id: str) -> Invoice:
        return await invoice_ending.give_up(session, invoice_id, data.state)

    return await _change(request, principal, invoice_id, end)


@post(
    "/invoices/{invoice_id:str}/retry",
    guards=[allowed("admin")],
    status_code=200,
    summary="Send an invoice that was held back (operator)",
)
async def retry_invoice(
    request: AnyRequest, principal: NamedDependency[Principal], invoice_id: FromPath[str]
) -> InvoiceDetail:
    """Compares it again with what Stripe has, and finalises it if both are the same by now."""
    return await _change(request, principal, invoice_id, invoice_ending.try_again)


@post(
    "/invoices/clock",
    guards=[allowed("admin")],
    status_code=204,
    summary="Confirm the time after the box was off for long (operator)",
)
async def confirm_clock(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[ClockReading]
) -> None:
    """Closing months waits for this once the box's clock is more than 35 days ahead of when the
    box last ran. Refused if that clock is more than an hour from `now`."""
    principal.require_operator()
    async with writing(request, principal, "admin", operator=True) as session:
        await steady_clock.confirm(session, data.now)
    request.app.state.clerk.wake("months")


async def _change(
    request: AnyRequest,
    principal: Principal,
    invoice_id: str,
    change: Callable[[AsyncSession, str], Awaitable[Invoice]],
) -> InvoiceDetail:
    principal.require_operator()
    async with writing(request, principal, "admin", operator=True) as session:
        invoice = await change(session, invoice_id)
        await session.flush()
        detail = await _detail(session, invoice)
    request.app.state.clerk.wake("outbox")
    return detail


async def _own(session: AsyncSession, principal: Principal, invoice_id: str) -> Invoice:
    """The operator sees everybody's."""
    sees_all = principal.is_operator and "admin" in principal.scopes
    organization_id = None if sees_all else principal.organization_id
    return await invoice_view.read_invoice(session, organization_id, invoice_id)


async def _detail(session: AsyncSession, invoice: Invoice) -> InvoiceDetail:
    lines = await invoice_view.read_lines(session, invoice)
    is_over = invoice.state in ("void", "settled")
    return InvoiceDetail(
        **_fields(invoice, InvoiceState),
        lines=[Line(**_fields(line, Line)) for line in lines],
        waived=await invoice_view.read_waived(session, invoice),
        open_nano=0 if is_over else (await standing(session, invoice)).open_nano,
    )


def _fields(row: Invoice | InvoiceLine, shown: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in shown.__struct_fields__}


def _database(request: AnyRequest) -> Database:
    database: Database = request.app.state.database
    return database


router = Router(
    "/api",
    route_handlers=[
        list_invoices,
        show_invoice,
        list_requests,
        mark_paid,
        end_invoice,
        retry_invoice,
        confirm_clock,
    ],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Invoices"],
)
