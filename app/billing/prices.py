"""Price books: immutable sets of prices, and the one in force held in memory.

Owns which book is in force and what a book charges for. Multiplying is in `rating.py`, editing
in `service.py`.
"""

import asyncio
import hashlib
import logging
from collections.abc import Iterable
from datetime import datetime

import msgspec
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.tables import PriceBook, PriceItem
from app.core import clock
from app.core.database import Database
from app.core.ids import new_id

ANY_ENDPOINT = "*"
REFRESH_SECONDS = 5.0

log = logging.getLogger(__name__)


class Price(msgspec.Struct, frozen=True):
    """Nano-units per `unit_scale` of something counted."""

    price_nano: int
    unit_scale: int


class Item(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One price of a book, by value."""

    endpoint_name: str
    dimension: str
    service_class: str
    price_nano: int
    unit_scale: int


class Rates(msgspec.Struct, frozen=True):
    """What one book charges for one endpoint and class, by dimension."""

    book_id: str
    currency: str
    prices: dict[str, Price]


# Nano-units per unit scale of the first book: $0.10 and $0.40 per million tokens, a tenth of the
# input price for what the cache held, $1 per hour of a device, ten cents per million requests.
FIRST_PRICES = {
    "input": Price(100_000_000, 1_000_000),
    "cached_input": Price(10_000_000, 1_000_000),
    "output": Price(400_000_000, 1_000_000),
    "request": Price(100_000_000, 1_000_000),
    "device_ms": Price(1_000_000_000, 3_600_000),
}
# Of the standard price: a whole-number ratio, so that no class needs a fraction of a nano-unit.
CLASS_RATIOS = {"standard": (1, 1), "priority": (2, 1), "batch": (1, 2)}


def first_items() -> list[Item]:
    return [
        Item(
            endpoint_name=ANY_ENDPOINT,
            dimension=dimension,
            service_class=service_class,
            price_nano=price.price_nano * times // over,
            unit_scale=price.unit_scale,
        )
        for service_class, (times, over) in CLASS_RATIOS.items()
        for dimension, price in FIRST_PRICES.items()
    ]


class Book:
    """One price book with its items. A price is looked up by endpoint and class, then for any
    endpoint in that class, then the same two in class `standard`."""

    def __init__(self, row: PriceBook, items: Iterable[Item]) -> None:
        self.id = row.id
        self.number = row.number
        self.currency = row.currency
        self.sha256 = row.sha256
        self.effective_at = row.effective_at
        self.items = sorted(items)
        self._rates: dict[tuple[str, str], Rates] = {}
        self._endpoint_names = {item.endpoint_name for item in self.items}

    def rates(self, endpoint_name: str, service_class: str) -> Rates:
        name = endpoint_name if endpoint_name in self._endpoint_names else ANY_ENDPOINT
        found = self._rates.get((name, service_class))
        if found is None:
            found = Rates(self.id, self.currency, self._prices(name, service_class))
            self._rates[name, service_class] = found
        return found

    def _prices(self, endpoint_name: str, service_class: str) -> dict[str, Price]:
        prices: dict[str, Price] = {}
        for wanted in (
            (ANY_ENDPOINT, "standard"),
            (endpoint_name, "standard"),
            (ANY_ENDPOINT, service_class),
            (endpoint_name, service_class),
        ):
            for item in self.items:
                if (item.endpoint_name, item.service_class) == wanted:
                    prices[item.dimension] = Price(item.price_nano, item.unit_scale)
        return prices


class PriceTable:
    """The books in memory; the hot path asks it and never the database."""

    def __init__(self, database: Database, currency: str = "usd") -> None:
        self._database = database
        self._currency = currency
        self._books: dict[str, Book] = {}
        self._by_time: list[Book] = []  # newest first
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Creates the first book on a new box, then keeps up with later ones."""
        await self.refresh()
        if not self._by_time:
            try:
                async with self._database.write() as session:
                    await add_book(session, 1, self._currency, first_items(), clock.now())
            except IntegrityError:
                log.info("another process made the first price book")
            await self.refresh()
        self._refreshing = asyncio.create_task(self._keep_fresh(), name="price books")

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])

    async def refresh(self) -> None:
        """Loads books that are not in memory yet. Call it after adding one."""
        async with self._database.read() as session:
            rows = (await session.scalars(select(PriceBook))).all()
            for row in rows:
                if row.id not in self._books:
                    self._books[row.id] = Book(row, await _items(session, row.id))
        self._by_time = sorted(
            self._books.values(), key=lambda book: (book.effective_at, book.number), reverse=True
        )

    @property
    def active(self) -> Book:
        """The book in force now."""
        assert self._by_time, "start() has not run"
        now = clock.now()
        return next((b for b in self._by_time if b.effective_at <= now), self._by_time[-1])

    def rates(self, endpoint_name: str, service_class: str) -> Rates:
        """What the book in force charges. The answer stays valid for a request's whole life."""
        return self.active.rates(endpoint_name, service_class)

    def book(self, book_id: str) -> Book | None:
        return self._books.get(book_id)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except SQLAlchemyError:
                log.exception("price books could not be read; the known ones stay in force")


def items_sha256(currency: str, items: Iterable[Item]) -> str:
    """A book's fingerprint: SHA-256 of its currency and its sorted items as JSON."""
    return hashlib.sha256(msgspec.json.encode([currency, sorted(items)])).hexdigest()


async def add_book(
    session: AsyncSession, number: int, currency: str, items: list[Item], effective_at: datetime
) -> PriceBook:
    """Adds rows; the caller's transaction decides."""
    book = PriceBook(
        id=new_id("pb"),
        number=number,
        currency=currency,
        sha256=items_sha256(currency, items),
        effective_at=effective_at,
        created_at=clock.now(),
    )
    session.add(book)
    await session.flush()  # items refer to it
    session.add_all(
        PriceItem(id=new_id("pi"), price_book_id=book.id, **msgspec.structs.asdict(item))
        for item in items
    )
    return book


async def _items(session: AsyncSession, book_id: str) -> list[Item]:
    rows = await session.scalars(select(PriceItem).where(PriceItem.price_book_id == book_id))
    return [
        Item(
            endpoint_name=row.endpoint_name,
            dimension=row.dimension,
            service_class=row.service_class,
            price_nano=row.price_nano,
            unit_scale=row.unit_scale,
        )
        for row in rows
    ]
