"""The operator's pages of prices: the book in force, the others, and editing with a preview."""

from typing import Any

from litestar import Response, Router, get, post
from litestar.params import FromPath
from sqlalchemy import select

from app.api.bodies import receive_form
from app.api.prices import standing
from app.api.writing import writing
from app.billing.policy import BILLED, WAIVED
from app.billing.price_changes import SERVICE_CLASSES, cancel_prices, change_prices
from app.billing.prices import ANY_ENDPOINT, Book, Item, PriceTable, draft_book
from app.billing.records import Records
from app.billing.repricing import compare_items, reprice_last_month
from app.console.prices_form import (
    MAX_ROWS,
    Draft,
    PriceForm,
    fields_of,
    form_of,
    read_form,
)
from app.console.prices_view import (
    DIMENSION_NAMES,
    OUTCOME_NAMES,
    describe_changes,
    describe_gaps,
    describe_policy,
    describe_policy_changes,
    period_of,
    read_book,
    starts,
)
from app.console.sessions import go, signed_in
from app.console.templating import PageRequest, page
from app.core import clock
from app.core.database import Database
from app.core.errors import AppError, Conflict, InvalidRequest, NotFound
from app.deployments.tables import Endpoint
from app.settings import Settings


@get("/prices")
async def show_prices(request: PageRequest) -> Response[str]:
    """The book in force and the list of all."""
    return _book_page(request, _prices(request).active)


@get("/prices/books/{book_id:str}")
async def show_book(request: PageRequest, book_id: FromPath[str]) -> Response[str]:
    """A book that was in force, or will be."""
    return _book_page(request, _book(request, book_id))


def _book_page(request: PageRequest, book: Book) -> Response[str]:
    prices = _prices(request)
    active, now = prices.active, clock.now()
    return page(
        request,
        "prices/prices.html",
        book=book,
        status=standing(book, active, now),
        models=read_book(book),
        policy=describe_policy(book.policy),
        books=[(each, standing(each, active, now)) for each in prices.books],
    )


@get("/prices/edit")
async def edit_prices(request: PageRequest) -> Response[str]:
    """The form, with the prices of the last book: a new one can only start after it."""
    last = _prices(request).books[0]
    if len(last.items) > MAX_ROWS:
        raise Conflict(
            f"This price book has {len(last.items):,} prices, more than a page holds. "
            "Send the new one to the API: POST /api/prices."
        )
    return _form_page(request, form_of(last, last.id))


@post("/prices/edit", status_code=200)
async def send_prices(request: PageRequest) -> Response[Any]:
    """Adds rows to the form, previews the book that it means, or puts that into force."""
    _prices(request)
    sent = await receive_form(request)
    form = read_form(sent)
    action = sent.get("action")
    if action == "edit":
        return _form_page(request, form)
    try:
        draft = form.draft()
        if action == "confirm":
            return await _confirm(request, form, draft)
        return await _preview_page(request, form, draft)
    except (InvalidRequest, Conflict) as error:
        return _form_page(request, form, error)


async def _confirm(request: PageRequest, form: PriceForm, draft: Draft) -> Response[Any]:
    prices, principal = _prices(request), signed_in(request).principal
    async with writing(request, principal, "admin", operator=True) as session:
        await change_prices(
            session,
            draft.items,
            prices.active.currency,
            draft.effective_at,
            draft.policy,
            form.based_on,
        )
    await prices.refresh()
    notice = "prices-scheduled" if draft.effective_at else "prices-changed"
    return go(request, f"/console/prices?notice={notice}")


async def _preview_page(request: PageRequest, form: PriceForm, draft: Draft) -> Response[str]:
    prices = _prices(request)
    base = prices.book(form.based_on) or prices.active
    now = clock.now()
    if draft.effective_at is not None and draft.effective_at < now:
        raise InvalidRequest("A price book cannot take effect in the past.", param="effective_at")
    book = draft_book(draft.items, base.currency, draft.effective_at or now, draft.policy)
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    records: Records = request.app.state.records
    archived_until = await records.archived_until()
    repricing = await reprice_last_month(database, book, settings.usage_detail_days, archived_until)
    changes = describe_changes(compare_items(base.items, book.items), book.currency)
    return page(
        request,
        "prices/preview.html",
        book=book,
        base=base,
        starts=starts(draft.effective_at),
        repricing=repricing,
        period=period_of(repricing),
        changes=changes + describe_policy_changes(base.policy, book.policy),
        unknown_names=await _unknown_names(database, draft.items),
        gaps=describe_gaps(book),
        fields=fields_of(form),
    )


async def _unknown_names(database: Database, items: list[Item]) -> list[str]:
    """Models that are priced and do not exist: perhaps mistyped."""
    async with database.read() as session:
        known = set(await session.scalars(select(Endpoint.name)))
    return sorted({item.endpoint_name for item in items} - known - {ANY_ENDPOINT})


def _form_page(
    request: PageRequest, form: PriceForm, error: AppError | None = None
) -> Response[str]:
    prices = _prices(request)
    base = prices.book(form.based_on) or prices.active
    return page(
        request,
        "prices/edit.html",
        status_code=error.status if error else 200,
        form=form if error else form.with_blank_rows(),
        base=base,
        is_scheduled=base.effective_at > clock.now(),
        error=error.message if error else "",
        wrong=error.param if error else None,
        dimensions=DIMENSION_NAMES,
        classes=[(name, name) for name in SERVICE_CLASSES],
        outcomes={name: OUTCOME_NAMES[name] for name in form.outcomes if name != "completed"},
        dispositions=(BILLED, WAIVED),
    )


@get("/prices/books/{book_id:str}/cancel")
async def ask_cancel(request: PageRequest, book_id: FromPath[str]) -> Response[str]:
    """What taking a book back does, and the form that does it."""
    return page(request, "prices/cancel.html", book=_book(request, book_id))


@post("/prices/books/{book_id:str}/cancel", status_code=200)
async def cancel_book(request: PageRequest, book_id: FromPath[str]) -> Response[Any]:
    """Takes back a book that is not in force yet."""
    prices, principal = _prices(request), signed_in(request).principal
    async with writing(request, principal, "admin", operator=True) as session:
        await cancel_prices(session, book_id)
    await prices.refresh()
    return go(request, "/console/prices?notice=prices-cancelled")


def _prices(request: PageRequest) -> PriceTable:
    """Of every route here the first step: only the operator passes."""
    signed_in(request).principal.require_operator()
    prices: PriceTable = request.app.state.prices
    return prices


def _book(request: PageRequest, book_id: str) -> Book:
    book = _prices(request).listed(book_id)
    if book is None:
        raise NotFound("There is no such price book.")
    return book


router = Router(
    "",
    route_handlers=[show_prices, show_book, edit_prices, send_prices, ask_cancel, cancel_book],
)
