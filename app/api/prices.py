"""`/api/prices`: the price book in force, the others, and new ones by the operator."""

from datetime import datetime
from typing import Any, Literal

import msgspec
from litestar import Request, Response, Router, delete, get, post
from litestar.params import FromPath

from app.api.auth import bearer_principal, principal_after_body
from app.api.bodies import TAKES_BOOK, decode
from app.api.openai import visible_models
from app.api.writing import writing
from app.billing.policy import check_policy
from app.billing.price_changes import cancel_prices, change_prices, check_items
from app.billing.prices import ANY_ENDPOINT, Book, Item, PriceTable, draft_book
from app.billing.records import Records
from app.billing.repricing import ItemChange, compare_items, reprice_last_month
from app.billing.tables import MINUTES_PER_DAY
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest, NotFound
from app.settings import Settings

AnyRequest = Request[Any, Any, Any]
Standing = Literal["past", "active", "scheduled"]


class BookAnswer(msgspec.Struct, frozen=True):
    """Prices are nano-units of the currency per `unit_scale`; endpoint `*` is any. An item holds
    for prompts of more than `above_tokens`, for requests admitted between two minutes of the day
    (UTC). `policy` tells which outcomes are charged, where it differs from the default."""

    id: str
    number: int
    currency: str
    sha256: str
    effective_at: datetime
    items: list[Item]
    policy: dict[str, str]


class BookSummary(msgspec.Struct, frozen=True):
    """A book without its items."""

    id: str
    number: int
    sha256: str
    effective_at: datetime
    status: Standing
    num_items: int


class History(msgspec.Struct, frozen=True):
    """All books, the latest first."""

    books: list[BookSummary]


class NewItem(msgspec.Struct, frozen=True):
    """One price. Minutes are of the day, UTC; an end before the start is on the next day."""

    dimension: str
    price_nano: int
    unit_scale: int
    endpoint_name: str = ANY_ENDPOINT
    service_class: str = "standard"
    above_tokens: int = 0
    from_minute: int = 0
    until_minute: int = MINUTES_PER_DAY


class NewBook(msgspec.Struct, frozen=True):
    """A whole book: what it leaves out is free of charge. `policy` maps an outcome, or
    `outcome.dimension`, to `billed` or `waived`. With `based_on`, the id of the book that was
    edited, the change is refused if another came in between."""

    items: list[NewItem]
    effective_at: datetime | None = None
    policy: dict[str, str] = {}
    based_on: str | None = None

    def prices(self) -> list[Item]:
        return [Item(**msgspec.structs.asdict(item)) for item in self.items]

    def starts_at(self) -> datetime | None:
        """In UTC. Raises `InvalidRequest`."""
        try:
            return self.effective_at and clock.in_utc(self.effective_at)
        except ValueError as error:
            raise InvalidRequest(f"effective_at {error}.", param="effective_at") from None


class ModelPreview(msgspec.Struct, frozen=True):
    """What one endpoint's usage cost, would have cost, and the difference."""

    endpoint_name: str
    old_nano: int
    new_nano: int
    difference_nano: int


class Preview(msgspec.Struct, frozen=True):
    """A past month under another book. An estimate comes from sums by the hour, without regard to
    the length of prompts; else every request was rated again, `num_events` of them."""

    since: datetime
    until: datetime
    currency: str
    is_estimate: bool
    num_events: int | None
    models: list[ModelPreview]
    old_nano: int
    new_nano: int
    difference_nano: int
    changes: list[ItemChange]


_decoder = msgspec.json.Decoder(NewBook)


def answer_of(book: Book, items: list[Item] | None = None) -> BookAnswer:
    """`items`: those that the caller may see; all of them unless given."""
    shown = book.items if items is None else items
    return BookAnswer(
        book.id, book.number, book.currency, book.sha256, book.effective_at, shown, book.policy
    )


@get("/", summary="Prices in force")
async def get_prices(request: AnyRequest) -> Response[BookAnswer]:
    """Anyone who may call models may know what it costs. Prices of a model of its own are shown
    to those who see the model."""
    principal = await bearer_principal(request)
    prices: PriceTable = request.app.state.prices
    book = prices.active
    if principal.is_operator:
        return Response(answer_of(book))
    database: Database = request.app.state.database
    async with database.read() as session:
        seen = {model.id for model in await visible_models(session, principal)} | {ANY_ENDPOINT}
    return Response(answer_of(book, [item for item in book.items if item.endpoint_name in seen]))


@get("/history", summary="Price books, past, active and scheduled")
async def get_history(request: AnyRequest) -> Response[History]:
    """All books, the latest first. Only the operator sees them."""
    principal = await bearer_principal(request)
    principal.require_operator()
    prices: PriceTable = request.app.state.prices
    active, now = prices.active, clock.now()
    summaries = [
        BookSummary(
            book.id,
            book.number,
            book.sha256,
            book.effective_at,
            standing(book, active, now),
            len(book.items),
        )
        for book in prices.books
    ]
    return Response(History(summaries))


def standing(book: Book, active: Book, now: datetime) -> Standing:
    """Whether a book was in force, is, or will be."""
    if book is active:
        return "active"
    return "scheduled" if book.effective_at > now else "past"


@get("/{book_id:str}", summary="One price book")
async def get_book(request: AnyRequest, book_id: FromPath[str]) -> Response[BookAnswer]:
    """Any book with all its items. Only the operator sees it."""
    principal = await bearer_principal(request)
    principal.require_operator()
    prices: PriceTable = request.app.state.prices
    book = prices.listed(book_id)
    if book is None:
        raise NotFound("There is no price book with this id.")
    return Response(answer_of(book))


@post("/", status_code=201, opt=TAKES_BOOK, summary="A new price book")
async def post_prices(request: AnyRequest) -> Response[BookAnswer]:
    """Replaces all prices from `effective_at` (now) on. Requests already admitted keep theirs."""
    principal = await principal_after_body(request)
    principal.require_operator()
    body = decode(_decoder, await request.body())
    prices: PriceTable = request.app.state.prices
    async with writing(request, principal, "admin", operator=True) as session:
        row = await change_prices(
            session,
            body.prices(),
            prices.active.currency,
            body.starts_at(),
            body.policy,
            body.based_on,
        )
    await prices.refresh()
    book = prices.book(row.id)
    assert book is not None
    return Response(answer_of(book), status_code=201)


@post("/preview", status_code=200, opt=TAKES_BOOK, summary="Last month under new prices")
async def preview_prices(request: AnyRequest) -> Response[Preview]:
    """Changes nothing: rates what was used last month (on a new box, this month) under the book
    that is sent, and compares it with the one in force."""
    principal = await principal_after_body(request)
    principal.require_operator()
    body = decode(_decoder, await request.body())
    items = body.prices()
    check_items(items)
    check_policy(body.policy)
    prices: PriceTable = request.app.state.prices
    active = prices.active
    book = draft_book(items, active.currency, body.starts_at() or clock.now(), body.policy)
    settings: Settings = request.app.state.settings
    records: Records = request.app.state.records
    archived_until = await records.archived_until()
    database: Database = request.app.state.database
    found = await reprice_last_month(database, book, settings.usage_detail_days, archived_until)
    models = [
        ModelPreview(each.endpoint_name, each.old_nano, each.new_nano, each.difference_nano)
        for each in found.models
    ]
    return Response(
        Preview(
            since=found.since,
            until=found.until,
            currency=active.currency,
            is_estimate=found.is_estimate,
            num_events=found.num_events,
            models=models,
            old_nano=found.old_nano,
            new_nano=found.new_nano,
            difference_nano=found.new_nano - found.old_nano,
            changes=compare_items(active.items, items),
        )
    )


@delete("/{book_id:str}", status_code=204, summary="Cancel a scheduled price book")
async def delete_prices(request: AnyRequest, book_id: FromPath[str]) -> None:
    """Only a book that is not in force yet, nor about to be, can be taken back."""
    principal = await bearer_principal(request)
    principal.require_operator()
    prices: PriceTable = request.app.state.prices
    async with writing(request, principal, "admin", operator=True) as session:
        await cancel_prices(session, book_id)
    await prices.refresh()


router = Router(
    "/api/prices",
    route_handlers=[
        get_prices,
        get_history,
        get_book,
        post_prices,
        preview_prices,
        delete_prices,
    ],
    tags=["Prices"],
)
