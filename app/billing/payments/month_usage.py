"""A month's usage, read twice: from the hours that usage adds up to, and from the ledger.

An invoice's lines are the one, its total must be the other. Both are fixed once the month is
closed, so nothing here needs a lock.
"""

from typing import Any

import msgspec
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.ledger import credit_account, on_account
from app.billing.payments.periods import EPOCH, HOUR, Period, period_of
from app.billing.tables import CREDIT_KINDS, LedgerEntry, LedgerTransaction
from app.metering.tables import DIMENSIONS, UsageHour, UsageSeries


class MonthLine(msgspec.Struct, frozen=True):
    """Usage of one model, class and dimension at one price. What was waived has no amount."""

    endpoint_name: str
    service_class: str
    dimension: str
    price_nano: int
    unit_scale: int
    quantity: int
    amount_nano: int


class MonthUsage(msgspec.Struct, frozen=True):
    """`posted_nano` is what the ledger took for usage, of that `credit_nano` from credit."""

    period: Period
    lines: list[MonthLine]
    posted_nano: int
    credit_nano: int

    @property
    def usage_nano(self) -> int:
        return sum(line.amount_nano for line in self.lines)

    @property
    def on_account_nano(self) -> int:
        return self.posted_nano - self.credit_nano


async def month_usage(session: AsyncSession, organization_id: str, period: Period) -> MonthUsage:
    by_account = await _posted(
        session,
        organization_id,
        LedgerEntry.created_at >= period.start,
        LedgerEntry.created_at < period.end,
    )
    own = on_account(organization_id)
    return MonthUsage(
        period=period,
        lines=await month_lines(session, organization_id, period, "billed"),
        posted_nano=sum(by_account.values()),
        credit_nano=sum(nano for account, nano in by_account.items() if account != own),
    )


async def month_lines(
    session: AsyncSession, organization_id: str, period: Period, disposition: str
) -> list[MonthLine]:
    """By model, class and dimension, in the dimensions' own order."""
    columns = (
        UsageSeries.endpoint_name,
        UsageSeries.service_class,
        UsageSeries.dimension,
        UsageSeries.price_nano,
        UsageSeries.unit_scale,
    )
    first_hour, end_hour = period.hours
    rows = await session.execute(
        select(*columns, func.sum(UsageHour.quantity), func.sum(UsageHour.amount_nano))
        .join(UsageHour, UsageHour.series_id == UsageSeries.id)
        .where(
            UsageSeries.organization_id == organization_id,
            UsageSeries.disposition == disposition,
            UsageHour.hour >= first_hour,
            UsageHour.hour < end_hour,
        )
        .group_by(*columns)
    )
    return sorted(
        (_line(tuple(row)) for row in rows if row[5]),
        key=lambda line: (
            line.endpoint_name,
            line.service_class,
            DIMENSIONS.index(line.dimension),
            line.price_nano,
            line.unit_scale,
        ),
    )


def _line(row: tuple[Any, ...]) -> MonthLine:
    """PostgreSQL sums big integers to a decimal."""
    *key, quantity, amount_nano = row
    return MonthLine(*key, quantity=int(quantity), amount_nano=int(amount_nano))


async def owed_for_usage_since(session: AsyncSession, organization_id: str, period: Period) -> int:
    """What usage after this month put on account already."""
    posted = await _posted(session, organization_id, LedgerEntry.created_at >= period.end)
    return posted.get(on_account(organization_id), 0)


async def debited_since(session: AsyncSession, organization_id: str, period: Period) -> int:
    """What anything but usage put on account after this month: refunds, disputes."""
    total = await session.scalar(
        select(func.sum(LedgerEntry.amount_nano))
        .join(LedgerTransaction, LedgerTransaction.id == LedgerEntry.transaction_id)
        .where(
            LedgerEntry.account == on_account(organization_id),
            LedgerEntry.amount_nano < 0,
            LedgerEntry.created_at >= period.end,
            LedgerTransaction.kind != "usage",
        )
    )
    return -int(total or 0)


async def first_period(session: AsyncSession, organization_id: str) -> Period | None:
    """The month from which on there is something in the organization's books."""
    hour = await session.scalar(
        select(func.min(UsageHour.hour))
        .join(UsageSeries, UsageSeries.id == UsageHour.series_id)
        .where(UsageSeries.organization_id == organization_id)
    )
    posted_at = await session.scalar(
        select(func.min(LedgerEntry.created_at)).where(
            LedgerEntry.account.in_(_accounts(organization_id))
        )
    )
    found = [] if posted_at is None else [posted_at]
    if hour is not None:
        found.append(EPOCH + hour * HOUR)
    return period_of(min(found)) if found else None


def _accounts(organization_id: str) -> list[str]:
    credit = (credit_account(organization_id, kind) for kind in CREDIT_KINDS)
    return [on_account(organization_id), *credit]


async def _posted(
    session: AsyncSession, organization_id: str, *when: ColumnElement[bool]
) -> dict[str, int]:
    """What usage took from each of the organization's accounts."""
    rows = await session.execute(
        select(LedgerEntry.account, func.sum(LedgerEntry.amount_nano))
        .join(LedgerTransaction, LedgerTransaction.id == LedgerEntry.transaction_id)
        .where(
            LedgerEntry.account.in_(_accounts(organization_id)),
            LedgerTransaction.kind == "usage",
            *when,
        )
        .group_by(LedgerEntry.account)
    )
    return {account: -int(nano) for account, nano in rows}
