"""The form that edits a price book: text as people write it, and the book that it means.

Owns reading and checking fields. What makes a book valid is in `billing/price_changes.py`.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from app.billing.policy import BILLED, DEFAULTS, WAIVED, check_policy
from app.billing.price_changes import SERVICE_CLASSES, check_items, write_minute
from app.billing.prices import ANY_ENDPOINT, Book, Item
from app.billing.tables import MINUTES_PER_DAY
from app.core.errors import InvalidRequest
from app.core.money import parse_amount, write_amount
from app.metering.tables import DIMENSIONS

MAX_ROWS = 120  # what a page can hold; larger books are for the API
NUM_BLANK_ROWS = 2
FIELDS = (
    "endpoint_name",
    "dimension",
    "service_class",
    "price",
    "per",
    "above_tokens",
    "from",
    "until",
)
_ITEM = re.compile(r"^items\[(\d+)\][.]?\w*")
_TIME = re.compile(r"(?P<hour>[0-2]?[0-9]):(?P<minute>[0-5][0-9])(:00)?")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One price as text. Without a price the row is left out."""

    endpoint_name: str = ANY_ENDPOINT
    dimension: str = "input"
    service_class: str = "standard"
    price: str = ""
    per: str = "1,000,000"
    above_tokens: str = ""
    from_time: str = ""
    until_time: str = ""


class Draft(msgspec.Struct, frozen=True):
    """The book that a form means. `effective_at` None: at once."""

    items: list[Item]
    policy: dict[str, str]
    effective_at: datetime | None


class PriceForm(msgspec.Struct, frozen=True, kw_only=True):
    """All fields. `outcomes` are the rules for whole outcomes, `exceptions` those by dimension, a
    line each; `based_on` is the id of the book that the form began with."""

    rows: list[Row]
    outcomes: dict[str, str]
    exceptions: str = ""
    effective_at: str = ""
    based_on: str = ""

    def draft(self) -> Draft:
        """Raises `InvalidRequest`, whose `param` is `rows[i]` where a row is wrong."""
        numbers = [i for i, row in enumerate(self.rows) if row.price.strip()]
        items = [_item(i, self.rows[i]) for i in numbers]
        try:
            check_items(items)
        except InvalidRequest as error:
            raise _of_row(error, numbers) from None
        policy = {**self.outcomes, **_exceptions(self.exceptions)}
        check_policy(policy)
        return Draft(items, policy, _effective_at(self.effective_at))

    def with_blank_rows(self) -> "PriceForm":
        rows = [row for row in self.rows if row.price.strip()]
        blank = min(NUM_BLANK_ROWS, MAX_ROWS - len(rows))
        return msgspec.structs.replace(self, rows=rows + [Row()] * blank)


def form_of(book: Book, based_on: str) -> PriceForm:
    """The form as it begins: the book as it is."""
    exceptions = [f"{key}: {how}" for key, how in sorted(book.policy.items()) if "." in key]
    return PriceForm(
        rows=[_row(item) for item in sorted(book.items, key=_place)],
        outcomes={name: book.policy.get(name, how) for name, how in DEFAULTS.items()},
        exceptions="\n".join(exceptions),
        based_on=based_on,
    )


def read_form(sent: Mapping[str, Any]) -> PriceForm:
    """The form as it was sent. Fields that are missing are empty."""

    def text(name: str) -> str:
        value = sent.get(name, "")
        return value.strip() if isinstance(value, str) else ""

    rows: list[Row] = []
    while len(rows) < MAX_ROWS and f"price-{len(rows)}" in sent:
        i = len(rows)
        values = [text(f"{field}-{i}") for field in FIELDS]
        rows.append(Row(**dict(zip(Row.__struct_fields__, values, strict=True))))
    return PriceForm(
        rows=rows,
        outcomes={name: text(f"outcome-{name}") or how for name, how in DEFAULTS.items()},
        exceptions=text("exceptions"),
        effective_at=text("effective_at"),
        based_on=text("based_on"),
    )


def fields_of(form: PriceForm) -> dict[str, str]:
    """Names and values that `read_form` reads again: what a page keeps in hidden fields."""
    fields: dict[str, str] = {}
    for i, row in enumerate(row for row in form.rows if row.price.strip()):
        fields |= {
            f"{name}-{i}": value
            for name, value in zip(FIELDS, msgspec.structs.astuple(row), strict=True)
        }
    fields |= {f"outcome-{name}": how for name, how in form.outcomes.items()}
    return fields | {
        "exceptions": form.exceptions,
        "effective_at": form.effective_at,
        "based_on": form.based_on,
    }


# --- to text ----------------------------------------------------------------------------


def _place(item: Item) -> tuple[bool, str, int, int, int, int]:
    return (
        item.endpoint_name != ANY_ENDPOINT,
        item.endpoint_name,
        SERVICE_CLASSES.index(item.service_class),
        DIMENSIONS.index(item.dimension),
        item.above_tokens,
        item.from_minute,
    )


def _row(item: Item) -> Row:
    until = item.until_minute % MINUTES_PER_DAY
    return Row(
        endpoint_name=item.endpoint_name,
        dimension=item.dimension,
        service_class=item.service_class,
        price=write_amount(item.price_nano),
        per=f"{item.unit_scale:,}",
        above_tokens=f"{item.above_tokens:,}" if item.above_tokens else "",
        from_time="" if item.is_all_day else write_minute(item.from_minute),
        until_time="" if item.is_all_day else write_minute(until),
    )


# --- from text --------------------------------------------------------------------------


def _item(i: int, row: Row) -> Item:
    from_minute, until_minute = _window(i, row)
    try:
        price_nano = parse_amount(row.price)
    except ValueError as error:
        raise _wrong(i, f"the price is {error}") from None
    return Item(
        endpoint_name=row.endpoint_name or ANY_ENDPOINT,
        dimension=row.dimension,
        service_class=row.service_class,
        price_nano=price_nano,
        unit_scale=_whole(i, "per", row.per),
        above_tokens=_whole(i, "above", row.above_tokens or "0"),
        from_minute=from_minute,
        until_minute=until_minute,
    )


def _window(i: int, row: Row) -> tuple[int, int]:
    """Both empty: all day. An end at 00:00 is the end of the day."""
    if not row.from_time and not row.until_time:
        return 0, MINUTES_PER_DAY
    from_minute = _minute(i, row.from_time or "00:00") % MINUTES_PER_DAY
    return from_minute, _minute(i, row.until_time or "00:00") or MINUTES_PER_DAY


def _minute(i: int, text: str) -> int:
    found = _TIME.fullmatch(text)
    minute = 60 * int(found["hour"]) + int(found["minute"]) if found else MINUTES_PER_DAY + 1
    if minute > MINUTES_PER_DAY:
        raise _wrong(i, f"{text!r} is no time of day such as 16:30")
    return minute


def _whole(i: int, what: str, text: str) -> int:
    digits = text.replace(",", "").replace(" ", "")
    if not re.fullmatch(r"[0-9]{1,18}", digits):
        raise _wrong(i, f"{what!r} must be a whole number such as 1,000,000")
    return int(digits)


def _wrong(i: int, problem: str) -> InvalidRequest:
    return InvalidRequest(f"Row {i + 1}: {problem}.", param=f"rows[{i}]")


def _of_row(error: InvalidRequest, numbers: list[int]) -> InvalidRequest:
    """The same about the row that people see."""
    found = _ITEM.match(error.message)
    if found is None:
        return error
    i = numbers[int(found[1])]
    rest = error.message[found.end() :].strip()
    field = (error.param or "").rpartition(".")[2].replace("_", " ")
    return InvalidRequest(f"Row {i + 1}: {field} {rest}", param=f"rows[{i}]")


def _exceptions(text: str) -> dict[str, str]:
    policy: dict[str, str] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        key, colon, how = line.partition(":")
        if not colon or how.strip() not in (BILLED, WAIVED) or "." not in key:
            raise InvalidRequest(
                f"{line!r} is no exception such as cancelled.output: waived.", param="exceptions"
            )
        policy[key.strip()] = how.strip()
    return policy


def _effective_at(text: str) -> datetime | None:
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        raise InvalidRequest(
            f"{text!r} is no date and time such as 2027-01-01T00:00.", param="effective_at"
        ) from None
