"""What the page Usage is asked for: which days, of which key and model, and how its chart is
parted."""

from datetime import UTC, date, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import msgspec

from app.core import clock
from app.core.errors import InvalidRequest

PERIODS = {
    "7d": "7 days",
    "30d": "30 days",
    "90d": "90 days",
    "month": "This month",
    "last-month": "Last month",
    "custom": "From and to",
}
SPLITS = {"use": "use", "model": "model", "key": "key", "class": "class"}
DEFAULT_PERIOD, DEFAULT_SPLIT = "30d", "use"
MAX_DAYS = 366
CONSOLE_KEY = "console"  # in the address, for requests made on these pages
DAY = timedelta(days=1)


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """`first` and `last` are the days shown, both included. `key` is a key's id, `CONSOLE_KEY`,
    or empty for all; `model` an endpoint's name, or empty for all."""

    period: str
    first: date
    last: date
    key: str = ""
    model: str = ""
    split: str = DEFAULT_SPLIT

    @property
    def start(self) -> datetime:
        return _midnight(self.first)

    @property
    def end(self) -> datetime:
        """The instant before which it all was."""
        return _midnight(self.last + DAY)

    @property
    def num_days(self) -> int:
        return (self.last - self.first).days + 1

    @property
    def days(self) -> list[date]:
        return [self.first + index * DAY for index in range(self.num_days)]

    @property
    def key_id(self) -> str | None:
        """As rows of usage have it; None for all."""
        return "" if self.key == CONSOLE_KEY else self.key or None

    @property
    def endpoint_name(self) -> str | None:
        return self.model or None

    @property
    def is_filtered(self) -> bool:
        return bool(self.key or self.model)

    def address(self, path: str = "/console/usage", **changes: str) -> str:
        """The same, but for `changes`, as a link."""
        fields = {
            "period": self.period,
            "key": self.key,
            "model": self.model,
            "split": self.split,
        }
        if (changes.get("period") or self.period) == "custom":
            fields |= {"from": self.first.isoformat(), "to": self.last.isoformat()}
        fields |= changes
        defaults = {"period": DEFAULT_PERIOD, "split": DEFAULT_SPLIT}
        told = {name: text for name, text in fields.items() if text != defaults.get(name, "")}
        return f"{path}?{urlencode(told)}" if told else path


def read_query(params: Any) -> UsageQuery:
    """From the parameters of the address. Raises `InvalidRequest` for days that are none."""
    period = params.get("period", DEFAULT_PERIOD)
    split = params.get("split", DEFAULT_SPLIT)
    if period not in PERIODS:
        period = DEFAULT_PERIOD
    first, last = _days(period, params)
    return UsageQuery(
        period=period,
        first=first,
        last=last,
        key=params.get("key", "")[:64],
        model=params.get("model", "")[:64],
        split=split if split in SPLITS else DEFAULT_SPLIT,
    )


def _days(period: str, params: Any) -> tuple[date, date]:
    today = clock.now().date()
    if period == "custom":
        return _custom(params, today)
    if period == "month":
        return today.replace(day=1), today
    if period == "last-month":
        last = today.replace(day=1) - DAY
        return last.replace(day=1), last
    return today - (int(period.removesuffix("d")) - 1) * DAY, today


def _custom(params: Any, today: date) -> tuple[date, date]:
    last = _day("to", params.get("to", ""), today)
    first = _day("from", params.get("from", ""), last.replace(day=1))
    if first > last:
        raise InvalidRequest("The first day must not be after the last.", param="from")
    if (last - first).days >= MAX_DAYS:
        raise InvalidRequest(f"Choose at most {MAX_DAYS} days at once.", param="from")
    return first, last


def _day(name: str, text: str, default: date) -> date:
    if not text:
        return default
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(
            f"{name}: {text[:20]!r} is not a day such as 2026-01-31.", param=name
        ) from None
    if not 1970 <= day.year < 9999:
        raise InvalidRequest(f"{name}: there is no usage of that year.", param=name)
    return day


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
