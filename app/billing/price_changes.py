"""What the operator does with prices: a new book, now or later, and taking a later one back.

Owns what makes a book valid. Books in force, now or once, are never altered.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.policy import Policy, check_policy
from app.billing.prices import ANY_ENDPOINT, Item, add_book
from app.billing.rating import TOKEN_DIMENSIONS
from app.billing.tables import MINUTES_PER_DAY, PriceBook
from app.core import clock
from app.core.errors import Conflict, InvalidRequest, NotFound
from app.core.failpoints import failpoint
from app.metering.tables import DIMENSIONS

SERVICE_CLASSES = ("standard", "priority", "batch")
# Only of tokens: a request that never ran counts none, and must cost the same when it is rated
# again from its lines.
TIERED_DIMENSIONS = tuple(name for name in DIMENSIONS if name in TOKEN_DIMENSIONS)
MAX_PRICE_NANO = 10**15  # a million of the currency per unit scale
MAX_UNIT_SCALE = 10**15
MAX_ABOVE_TOKENS = 10**12
MAX_ITEMS = 10_000
# A process may know a book for this long after it was cancelled; until then it must not be in
# force.
CANCEL_MARGIN_SECONDS = 30

_Key = tuple[str, str, str, int]


async def change_prices(
    session: AsyncSession,
    items: Sequence[Item],
    currency: str,
    effective_at: datetime | None = None,
    policy: Policy | None = None,
    based_on: str | None = None,
) -> PriceBook:
    """Adds a whole new book; books in force before are never altered. It takes effect at once
    or at `effective_at`. `based_on` is the id of the book that the caller edited: it must still
    be the last one. Call `PriceTable.refresh` after the transaction."""
    check_items(items)
    check_policy(policy or {})
    now = clock.now()
    start = effective_at or now
    if start < now and effective_at is not None:
        raise InvalidRequest("A price book cannot take effect in the past.", param="effective_at")
    last = await session.scalar(
        select(PriceBook)
        .where(PriceBook.cancelled_at.is_(None))
        .order_by(PriceBook.effective_at.desc(), PriceBook.number.desc())
        .limit(1)
    )
    if based_on is not None and (last is None or last.id != based_on):
        raise Conflict(
            "The prices were changed since you began; look at them and start again.",
            code="prices_changed",
        )
    if last is not None and start < last.effective_at:
        raise Conflict(
            f"A later price book already starts at {last.effective_at.isoformat()}. "
            "Let the new one start after it, or cancel that one first.",
            param="effective_at",
        )
    newest = await session.scalar(select(func.max(PriceBook.number)))
    try:
        book = await add_book(session, (newest or 0) + 1, currency, list(items), start, policy)
    except IntegrityError as error:
        raise Conflict(
            "Someone else changed the prices at the same moment; look at them and try again.",
            code="prices_changed",
        ) from error
    failpoint("price_changes.before_commit")
    return book


async def cancel_prices(session: AsyncSession, book_id: str) -> None:
    """Takes back a book that is not in force yet; it stays on record, for requests admitted under
    it before the clock was set back. Call `PriceTable.refresh` after the transaction."""
    book = await session.get(PriceBook, book_id)
    if book is None or book.cancelled_at is not None:
        raise NotFound("There is no price book with this id.")
    if book.effective_at <= clock.now() + timedelta(seconds=CANCEL_MARGIN_SECONDS):
        raise Conflict(
            "This price book is in force, or is about to be, and stays on record. "
            "To change the prices, add another book.",
            code="price_book_in_force",
        )
    book.cancelled_at = clock.now()
    await session.flush()
    failpoint("price_changes.before_cancel_commit")


def check_items(items: Sequence[Item]) -> None:
    """Raises `InvalidRequest` naming the first item that cannot be a price."""
    if not 0 < len(items) <= MAX_ITEMS:
        raise InvalidRequest(f"A price book has 1 to {MAX_ITEMS:,} items.", param="items")
    windows: dict[_Key, list[tuple[int, Item]]] = {}
    for i, item in enumerate(items):
        _check_item(i, item)
        key = (item.endpoint_name, item.dimension, item.service_class, item.above_tokens)
        windows.setdefault(key, []).append((i, item))
    for same_key in windows.values():
        _check_windows(same_key)


def _check_item(i: int, item: Item) -> None:
    classes = f"one of {', '.join(SERVICE_CLASSES)}"
    _require(item.dimension in DIMENSIONS, i, "dimension", f"one of {', '.join(DIMENSIONS)}")
    _require(item.service_class in SERVICE_CLASSES, i, "service_class", classes)
    _require(0 <= item.price_nano <= MAX_PRICE_NANO, i, "price_nano", "0 to 10^15")
    _require(0 < item.unit_scale <= MAX_UNIT_SCALE, i, "unit_scale", "1 to 10^15")
    name_is = f"an endpoint's name, or {ANY_ENDPOINT}"
    _require(0 < len(item.endpoint_name) <= 64, i, "endpoint_name", name_is)
    _require(0 <= item.above_tokens <= MAX_ABOVE_TOKENS, i, "above_tokens", "0 to 10^12")
    _require(
        item.above_tokens == 0 or item.dimension in TIERED_DIMENSIONS,
        i,
        "above_tokens",
        f"0 except for {', '.join(TIERED_DIMENSIONS)}",
    )
    _require(0 <= item.from_minute < MINUTES_PER_DAY, i, "from_minute", "0 to 1439")
    _require(0 < item.until_minute <= MINUTES_PER_DAY, i, "until_minute", "1 to 1440")
    _require(
        item.from_minute != item.until_minute,
        i,
        "until_minute",
        "another minute than from_minute (all day is 0 to 1440)",
    )


def _check_windows(items: list[tuple[int, Item]]) -> None:
    """Of one key: at most one price for all day, and windows that do not overlap."""
    taken = 0
    has_all_day = False
    for i, item in items:
        if item.is_all_day:
            _require(not has_all_day, i, "dimension", "a combination that is not listed twice")
            has_all_day = True
            continue
        minutes = _minutes(item)
        if in_two := taken & minutes:
            first = write_minute((in_two & -in_two).bit_length() - 1)
            wanted = f"outside other windows of the same price; {first} UTC is in two"
            _require(False, i, "from_minute", wanted)
        taken |= minutes


def _minutes(item: Item) -> int:
    """A bit for each minute of the day: a book has thousands of windows."""
    if item.from_minute < item.until_minute:
        return (1 << item.until_minute) - (1 << item.from_minute)
    outside = (1 << item.from_minute) - (1 << item.until_minute)
    return ((1 << MINUTES_PER_DAY) - 1) ^ outside


def write_minute(minute: int) -> str:
    """`08:30`; the end of the day is `24:00`."""
    hour, rest = divmod(minute, 60)
    return f"{hour:02d}:{rest:02d}"


def _require(is_right: bool, index: int, field: str, wanted: str) -> None:
    if not is_right:
        raise InvalidRequest(
            f"items[{index}].{field} must be {wanted}.", param=f"items[{index}].{field}"
        )
