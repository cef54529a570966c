"""An invoice's page: its lines, the requests behind each, and the same as a file."""

from litestar import Response, Router, get
from litestar.params import FromPath, FromQuery
from litestar.response import Stream
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments import invoice_view
from app.billing.payments.invoice_payments import standing
from app.billing.payments.periods import period_named
from app.billing.payments.tables import Invoice
from app.billing.records import Records
from app.console.billing_view import INVOICE_LAMPS
from app.console.sessions import signed_in
from app.console.templating import PageRequest, page
from app.console.usage_csv import csv_file
from app.console.usage_view import DIMENSION_NAMES
from app.core.database import Database
from app.settings import Settings

PAGE_REQUESTS = 100


@get("/billing/invoices/{invoice_id:str}")
async def show_invoice(request: PageRequest, invoice_id: FromPath[str]) -> Response[str]:
    """What the month cost, and what is to be paid of it."""
    database: Database = request.app.state.database
    async with database.read() as session:
        invoice = await _own(session, request, invoice_id)
        lines = await invoice_view.read_lines(session, invoice)
        waived = await invoice_view.read_waived(session, invoice)
        is_over = invoice.state in ("void", "settled")
        open_nano = 0 if is_over else (await standing(session, invoice)).open_nano
    return page(
        request,
        "billing/invoice.html",
        invoice=invoice,
        lamp=INVOICE_LAMPS[invoice.state],
        lines=lines,
        waived=waived,
        open_nano=open_nano,
        dimensions=DIMENSION_NAMES,
    )


@get("/billing/invoices/{invoice_id:str}/file")
async def download_invoice(request: PageRequest, invoice_id: FromPath[str]) -> Stream:
    """With exact amounts, for a spreadsheet."""
    database: Database = request.app.state.database
    async with database.read() as session:
        invoice = await _own(session, request, invoice_id)
        lines = await invoice_view.read_lines(session, invoice)
        waived = await invoice_view.read_waived(session, invoice)
    blocks = invoice_view.invoice_csv(invoice, lines, waived)
    return csv_file(f"invoice-{invoice.number}", blocks)


@get("/billing/invoices/{invoice_id:str}/lines/{position:int}")
async def show_line(
    request: PageRequest,
    invoice_id: FromPath[str],
    position: FromPath[int],
    after: FromQuery[str] = "",
) -> Response[str]:
    """The requests that a line adds up, while they are kept one by one."""
    database: Database = request.app.state.database
    async with database.read() as session:
        invoice = await _own(session, request, invoice_id)
        lines = await invoice_view.read_lines(session, invoice)
        shown = await invoice_view.read_requests(session, invoice, position, after, PAGE_REQUESTS)
    records: Records = request.app.state.records
    settings: Settings = request.app.state.settings
    detail_from = await records.detail_from(settings.usage_detail_days)
    return page(
        request,
        "billing/invoice_line.html",
        invoice=invoice,
        line=next(line for line in lines if line.position == position),
        requests=shown.requests,
        after=shown.next,
        is_complete=period_named(invoice.period).start >= detail_from,
        dimensions=DIMENSION_NAMES,
    )


async def _own(session: AsyncSession, request: PageRequest, invoice_id: str) -> Invoice:
    """Raises `NotFound`, for another organization's as well: the operator has the API for those."""
    principal = signed_in(request).principal
    principal.require("read")
    return await invoice_view.read_invoice(session, principal.organization_id, invoice_id)


router = Router("", route_handlers=[show_invoice, download_invoice, show_line])
