"""`GET /v1/receipts/{request_id}`: what one request used and cost."""

from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Response, Router, get
from litestar.params import FromPath

from app.api.auth import bearer_principal
from app.api.relay import Relay
from app.billing.prices import PriceTable
from app.core.database import Database
from app.core.errors import Forbidden
from app.deployments.serving_notes import serving_note
from app.metering.receipts import ReceiptLine, read_receipt

AnyRequest = Request[Any, Any, Any]


class ReceiptBook(msgspec.Struct, frozen=True):
    """The price book the request was admitted under."""

    id: str
    number: int | None
    sha256: str | None


class ReceiptAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Amounts are nano-units of the currency; a line is quantity x price_nano / unit_scale."""

    request_id: str
    model: str
    version: int
    api_key_name: str
    route: str
    service_class: str
    outcome: str
    finish_reason: str
    currency: str
    amount_nano: int
    lines: list[ReceiptLine]
    price_book: ReceiptBook
    started_at: datetime
    finished_at: datetime
    duration_ns: int
    first_token_ns: int | None
    serving_note: str = ""  # how the model is served, where that makes its tokens cost more
    object: str = "receipt"


@get("/{request_id:str}", summary="Receipt of a request")
async def get_receipt(request: AnyRequest, request_id: FromPath[str]) -> Response[ReceiptAnswer]:
    """The request is named by the header `x-request-id` of its answer."""
    principal = await bearer_principal(request)
    if not principal.scopes & {"inference", "read"}:
        raise Forbidden("This API key may not read receipts.", code="missing_scope")
    relay: Relay = request.app.state.relay
    await relay.settled()
    database: Database = request.app.state.database
    prices: PriceTable = request.app.state.prices
    async with database.read() as session:
        receipt = await read_receipt(session, principal.organization_id, request_id)
        note = await serving_note(session, receipt.model, receipt.version)
    book = prices.book(receipt.price_book_id)
    fields = msgspec.structs.asdict(receipt)
    del fields["price_book_id"]
    return Response(
        ReceiptAnswer(
            **fields,
            serving_note=note,
            price_book=ReceiptBook(
                receipt.price_book_id, book and book.number, book and book.sha256
            ),
        )
    )


router = Router("/v1/receipts", route_handlers=[get_receipt], tags=["Usage"])
