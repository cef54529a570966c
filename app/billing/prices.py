"""Price books: immutable sets of prices, and the one in force held in memory.

Owns which book is in force and what a book charges for. Multiplying is in `rating.py`, editing
in `service.py`.
"""

import asyncio
import hashlib
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from datetime import datetime
from itertools import product

import msgspec
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.policy import Policy, without_defaults
from app.billing.tables import MINUTES_PER_DAY, PriceBook, PriceItem
from app.core import clock
from app.core.database import Database
from app.core.ids import new_id
from app.metering.records import AdmitRecord

ANY_ENDPOINT = "*"
REFRESH_SECONDS = 5.0
NS_PER_MINUTE = 60_000_000_000

Instant = datetime | int  # aware, or nanoseconds since 1970

log = logging.getLogger(__name__)


class Price(msgspec.Struct, frozen=True):
    """Nano-units per `unit_scale` of something counted."""

    price_nano: int
    unit_scale: int


class Item(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One price of a book, by value. It holds for prompts of more than `above_tokens` and for
    requests admitted from `from_minute` until before `until_minute` of the day (UTC)."""

    endpoint_name: str
    dimension: str
    service_class: str
    price_nano: int
    unit_scale: int
    above_tokens: int = 0
    from_minute: int = 0
    until_minute: int = MINUTES_PER_DAY

    @property
    def is_all_day(self) -> bool:
        return self.from_minute == 0 and self.until_minute == MINUTES_PER_DAY

    @property
    def is_always(self) -> bool:
        return self.is_all_day and self.above_tokens == 0

    def holds_at(self, minute: int) -> bool:
        if self.from_minute < self.until_minute:
            return self.from_minute <= minute < self.until_minute
        return minute >= self.from_minute or minute < self.until_minute  # over midnight


LATER_FIELDS = {"above_tokens": 0, "from_minute": 0, "until_minute": MINUTES_PER_DAY}


class Rates(msgspec.Struct, frozen=True):
    """What one book charges for one request, by dimension, and for which outcomes."""

    book_id: str
    currency: str
    prices: dict[str, Price]
    policy: Policy = {}


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
    """One price book with its items. Per dimension the most specific item counts that applies:
    of this class rather than of `standard`, of this endpoint rather than of any, then with the
    highest threshold that the prompt passes, then within a window rather than all day."""

    def __init__(self, row: PriceBook, items: Iterable[Item]) -> None:
        self.id = row.id
        self.number = row.number
        self.currency = row.currency
        self.sha256 = row.sha256
        self.policy: dict[str, str] = dict(row.policy or {})
        self.effective_at = row.effective_at
        self.items = sorted(items)
        self._rates: dict[tuple[str, str, int, int], Rates] = {}
        self._endpoint_names = {item.endpoint_name for item in self.items}
        self._by_key: dict[tuple[str, str], list[Item]] = {}
        for item in self.items:
            self._by_key.setdefault((item.endpoint_name, item.service_class), []).append(item)
        # Between two neighbours of these nothing changes: prompts and minutes fall into few slots.
        self._thresholds = sorted({item.above_tokens for item in self.items} - {0})
        windows = [item for item in self.items if not item.is_all_day]
        self._boundaries = sorted({m for w in windows for m in (w.from_minute, w.until_minute)})

    def rates(
        self,
        endpoint_name: str,
        service_class: str,
        num_prompt_tokens: int = 0,
        at: Instant | None = None,
    ) -> Rates:
        """`num_prompt_tokens` counts cached ones too. `at` is when the request was admitted: now
        unless given. Dear only the first time."""
        name = endpoint_name if endpoint_name in self._endpoint_names else ANY_ENDPOINT
        tier = bisect_left(self._thresholds, num_prompt_tokens) if self._thresholds else 0
        slot = bisect_right(self._boundaries, _minute(at)) if self._boundaries else 0
        key = (name, service_class, tier, slot)
        found = self._rates.get(key)
        if found is None:
            prices = self._prices(name, service_class, tier, slot)
            found = self._rates[key] = Rates(self.id, self.currency, prices, self.policy)
        return found

    def rates_of(self, admitted: AdmitRecord) -> Rates:
        """What a request was admitted under, found again from its record."""
        return self.rates(
            admitted.endpoint_name,
            admitted.service_class,
            admitted.num_prompt_tokens,
            admitted.started_at_ns,
        )

    def gaps(self) -> list[Item]:
        """Items beside which nothing is charged at other times of the day or for shorter prompts:
        one for each endpoint, class and dimension. Perhaps meant, perhaps forgotten. Slow for
        books of many thresholds and windows: it looks at every combination."""
        found: dict[tuple[str, str, str], Item] = {}
        slots = range(len(self._boundaries) + 1)
        for (name, service_class), items in self._by_key.items():
            conditional = {item.dimension: item for item in items if not item.is_always}
            for tier, slot in product(range(len(self._thresholds) + 1), slots):
                if not conditional:
                    break
                prices = self._prices(name, service_class, tier, slot)
                for dimension in conditional.keys() - prices.keys():
                    found[name, service_class, dimension] = conditional.pop(dimension)
        return [found[key] for key in sorted(found)]

    def _prices(
        self, endpoint_name: str, service_class: str, tier: int, slot: int
    ) -> dict[str, Price]:
        above = self._thresholds[tier - 1] if tier else 0
        minute = self._boundaries[slot - 1] if slot else 0
        prices: dict[str, Price] = {}
        for key in (
            (ANY_ENDPOINT, "standard"),
            (endpoint_name, "standard"),
            (ANY_ENDPOINT, service_class),
            (endpoint_name, service_class),
        ):
            holding = [
                item
                for item in self._by_key.get(key, ())
                if item.above_tokens <= above and item.holds_at(minute)
            ]
            for item in sorted(holding, key=lambda item: (item.above_tokens, not item.is_all_day)):
                prices[item.dimension] = Price(item.price_nano, item.unit_scale)
        return prices


def _minute(at: Instant | None) -> int:
    """Of the day, UTC."""
    if at is None:
        at = clock.now()
    if isinstance(at, int):
        return at // NS_PER_MINUTE % MINUTES_PER_DAY
    at = clock.in_utc(at)
    return at.hour * 60 + at.minute


def draft_book(
    items: Iterable[Item], currency: str, effective_at: datetime, policy: Policy | None = None
) -> Book:
    """A book that is in no database, to see what it would do."""
    kept = sorted(items)
    row = PriceBook(
        id="draft",
        number=0,
        currency=currency,
        sha256=items_sha256(currency, kept, policy),
        policy=without_defaults(policy or {}),
        effective_at=effective_at,
        created_at=effective_at,
    )
    return Book(row, kept)


class PriceTable:
    """The books in memory; the hot path asks it and never the database."""

    def __init__(self, database: Database, currency: str = "usd") -> None:
        self._database = database
        self._currency = currency
        self._books: dict[str, Book] = {}
        self._by_time: list[Book] = []  # newest first
        self._refreshing: asyncio.Task[None] | None = None
        # Else one that read earlier could end later, and forget what the other found.
        self._one_refresh = asyncio.Lock()

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
        """Loads books that are not in memory yet, and learns which were cancelled: those come into
        force no more, but are still found by `book`. Call it after adding or cancelling one."""
        async with self._one_refresh:
            await self._refresh()

    async def _refresh(self) -> None:
        async with self._database.read() as session:
            rows = (await session.scalars(select(PriceBook))).all()
            for row in rows:
                if row.id not in self._books:
                    self._books[row.id] = Book(row, await _items(session, row.id))
        scheduled = [self._books[row.id] for row in rows if row.cancelled_at is None]
        self._by_time = sorted(
            scheduled, key=lambda book: (book.effective_at, book.number), reverse=True
        )

    @property
    def active(self) -> Book:
        """The book in force now."""
        assert self._by_time, "start() has not run"
        now = clock.now()
        return next((b for b in self._by_time if b.effective_at <= now), self._by_time[-1])

    @property
    def books(self) -> list[Book]:
        """All that were not cancelled, the latest to take effect first."""
        return list(self._by_time)

    def rates(
        self,
        endpoint_name: str,
        service_class: str,
        num_prompt_tokens: int = 0,
        at: Instant | None = None,
    ) -> Rates:
        """What the book in force charges. The answer stays valid for a request's whole life.
        Give the start of the request's record as `at`, so that `Book.rates_of` agrees."""
        return self.active.rates(endpoint_name, service_class, num_prompt_tokens, at)

    def listed(self, book_id: str) -> Book | None:
        """One of `books`."""
        return next((book for book in self._by_time if book.id == book_id), None)

    def book(self, book_id: str) -> Book | None:
        """Cancelled ones as well."""
        return self._books.get(book_id)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except SQLAlchemyError:
                log.exception("price books could not be read; the known ones stay in force")


def items_sha256(currency: str, items: Iterable[Item], policy: Policy | None = None) -> str:
    """A book's fingerprint: SHA-256 of its currency, its sorted items and what its policy sets
    apart from the defaults, if anything, as JSON. Fields that came later are left out at their
    defaults, so that a book which does not use them keeps its fingerprint."""
    content: list[object] = [currency, [_encoded(item) for item in sorted(items)]]
    if own := without_defaults(policy or {}):
        content.append(own)
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def _encoded(item: Item) -> dict[str, str | int]:
    # Not by msgspec's `omit_defaults`, which compares identities: 1440 has many.
    fields: dict[str, str | int] = msgspec.structs.asdict(item)
    return {name: value for name, value in fields.items() if value != LATER_FIELDS.get(name)}


async def add_book(
    session: AsyncSession,
    number: int,
    currency: str,
    items: list[Item],
    effective_at: datetime,
    policy: Policy | None = None,
) -> PriceBook:
    """Adds rows; the caller's transaction decides."""
    book = PriceBook(
        id=new_id("pb"),
        number=number,
        currency=currency,
        sha256=items_sha256(currency, items, policy),
        policy=without_defaults(policy or {}),
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
            above_tokens=row.above_tokens,
            from_minute=row.from_minute,
            until_minute=row.until_minute,
        )
        for row in rows
    ]
