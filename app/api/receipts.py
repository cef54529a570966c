"""`GET /v1/receipts/{request_id}`: what one request used and cost, and the proof of it."""

from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Response, Router, get
from litestar.params import FromPath

from app.api.auth import bearer_principal
from app.api.relay import Relay
from app.billing.prices import PriceTable
from app.billing.proofs import Proof
from app.billing.records import Records
from app.core.database import Database
from app.core.errors import Forbidden
from app.deployments.serving_notes import serving_note
from app.metering.receipts import ReceiptLine

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
    proof: Proof | None  # null until it is sealed, some seconds after the request
    object: str = "receipt"


@get("/{request_id:str}", summary="Receipt of a request")
async def get_receipt(request: AnyRequest, request_id: FromPath[str]) -> Response[ReceiptAnswer]:
    """The request is named by the header `x-request-id` of its answer."""
    principal = await bearer_principal(request)
    if not principal.scopes & {"inference", "read"}:
        raise Forbidden("This API key may not read receipts.", code="missing_scope")
    relay: Relay = request.app.state.relay
    await relay.settled()
    records: Records = request.app.state.records
    organization_id = principal.organization_id
    database: Database = request.app.state.database
    prices: PriceTable = request.app.state.prices
    async with database.read() as session:
        receipt = await records.receipt(session, organization_id, request_id)
        note = await serving_note(session, receipt.model, receipt.version)
    proof = await records.proof(organization_id, request_id)
    book = prices.book(receipt.price_book_id)
    fields = msgspec.structs.asdict(receipt)
    del fields["price_book_id"]
    return Response(
        ReceiptAnswer(
            **fields,
            serving_note=note,
            proof=proof,
            price_book=ReceiptBook(
                receipt.price_book_id, book and book.number, book and book.sha256
            ),
        )
    )


class KeyAnswer(msgspec.Struct, frozen=True):
    """Ed25519, 32 bytes in hexadecimal."""

    public_key: str
    algorithm: str = "ed25519"


@get("/key", summary="Key that signs receipts")
async def get_key(request: AnyRequest) -> Response[KeyAnswer]:
    """The public key of this box's seals. It stays the same; keep it apart from the receipts that
    are verified with it. Anyone may know it."""
    records: Records = request.app.state.records
    return Response(KeyAnswer(records.public_key))


router = Router("/v1/receipts", route_handlers=[get_key, get_receipt], tags=["Usage"])
