"""`/api/prices`: the price book in force, and a new one by the operator."""

from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Response, Router, get, post

from app.api.auth import bearer_principal
from app.api.bodies import decode
from app.billing.price_changes import change_prices
from app.billing.prices import ANY_ENDPOINT, Book, Item, PriceTable
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest

AnyRequest = Request[Any, Any, Any]


class BookAnswer(msgspec.Struct, frozen=True):
    """Prices are nano-units of the currency per `unit_scale`; endpoint `*` is any."""

    id: str
    number: int
    currency: str
    sha256: str
    effective_at: datetime
    items: list[Item]


class NewItem(msgspec.Struct, frozen=True):
    dimension: str
    price_nano: int
    unit_scale: int
    endpoint_name: str = ANY_ENDPOINT
    service_class: str = "standard"


class NewBook(msgspec.Struct, frozen=True):
    """A whole book: what it leaves out is free of charge."""

    items: list[NewItem]
    effective_at: datetime | None = None


_decoder = msgspec.json.Decoder(NewBook)


def answer_of(book: Book) -> BookAnswer:
    return BookAnswer(
        book.id, book.number, book.currency, book.sha256, book.effective_at, book.items
    )


@get("/", summary="Prices in force")
async def get_prices(request: AnyRequest) -> Response[BookAnswer]:
    """Anyone who may call models may know what it costs."""
    await bearer_principal(request)
    prices: PriceTable = request.app.state.prices
    return Response(answer_of(prices.active))


@post("/", status_code=201, summary="A new price book")
async def post_prices(request: AnyRequest) -> Response[BookAnswer]:
    """Replaces all prices from `effective_at` (now) on. Requests already admitted keep theirs."""
    principal = await bearer_principal(request)
    principal.require_operator()
    body = decode(_decoder, await request.body())
    try:
        effective_at = body.effective_at and clock.in_utc(body.effective_at)
    except ValueError as error:
        raise InvalidRequest(f"effective_at {error}.", param="effective_at") from None
    items = [Item(**msgspec.structs.asdict(item)) for item in body.items]
    prices: PriceTable = request.app.state.prices
    database: Database = request.app.state.database
    async with database.write() as session:
        row = await change_prices(session, items, prices.active.currency, effective_at)
    await prices.refresh()
    book = prices.book(row.id)
    assert book is not None
    return Response(answer_of(book), status_code=201)


router = Router("/api/prices", route_handlers=[get_prices, post_prices], tags=["Prices"])
