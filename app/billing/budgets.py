"""Budgets as people see them: set, listed with what they have left, and taken away.

How running requests count in them is in `budget_holds.py`.
"""

from calendar import timegm
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.budget_holds import window_starts
from app.billing.ledger import lock_account, on_account
from app.billing.tables import (
    BUDGET_PERIODS,
    BUDGET_SCOPES,
    MAX_BALANCE_NANO,
    Budget,
    BudgetWindow,
    LedgerEntry,
)
from app.core import clock
from app.core.errors import InvalidRequest, NotFound
from app.core.ids import new_id
from app.core.money import NANO_PER_UNIT
from app.metering.tables import UsageEvent, UsageHour, UsageSeries
from app.organizations.confirmation import lock_people
from app.organizations.keys import end_invitations

MAX_BUDGETS = 1_000  # of one organization
MAX_BUDGET_NANO = 10**9 * NANO_PER_UNIT


class BudgetView(msgspec.Struct, frozen=True, kw_only=True):
    """A budget and its current window. `ends_at` is when the next one begins."""

    id: str
    scope: str
    subject: str
    subject_name: str
    period: str
    limit_nano: int
    spent_nano: int
    held_nano: int
    starts_on: str
    ends_at: datetime

    @property
    def left_nano(self) -> int:
        return max(0, self.limit_nano - self.spent_nano - self.held_nano)


async def list_budgets(session: AsyncSession, organization_id: str) -> list[BudgetView]:
    """Those of the organization first, then of keys, then of models."""
    now = clock.now()
    budgets = (
        await session.scalars(select(Budget).where(Budget.organization_id == organization_id))
    ).all()
    starts = [window_starts(period, now) for period in BUDGET_PERIODS]
    windows = await session.scalars(
        select(BudgetWindow).where(
            BudgetWindow.organization_id == organization_id, BudgetWindow.starts_on.in_(starts)
        )
    )
    current = {(window.budget_id, window.starts_on): window for window in windows}
    ordered = sorted(
        budgets,
        key=lambda b: (
            BUDGET_SCOPES.index(b.scope),
            b.subject_name or b.subject,
            BUDGET_PERIODS.index(b.period),
        ),
    )
    return [
        _view(budget, current.get((budget.id, window_starts(budget.period, now))), now)
        for budget in ordered
    ]


def _view(budget: Budget, window: BudgetWindow | None, at: datetime) -> BudgetView:
    return BudgetView(
        id=budget.id,
        scope=budget.scope,
        subject=budget.subject,
        subject_name=budget.subject_name,
        period=budget.period,
        limit_nano=budget.limit_nano,
        spent_nano=window.posted_nano if window else 0,
        held_nano=window.held_nano if window else 0,
        starts_on=window_starts(budget.period, at),
        ends_at=period_bounds(budget.period, at)[1],
    )


def period_bounds(period: str, at: datetime) -> tuple[datetime, datetime]:
    """The day or month (UTC) that `at` falls in: its first instant, and that of the next."""
    day = at.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return day, day + timedelta(days=1)
    first = day.replace(day=1)
    return first, (first + timedelta(days=32)).replace(day=1)


async def set_budget(
    session: AsyncSession,
    organization_id: str,
    *,
    scope: str,
    subject: str,
    subject_name: str,
    period: str,
    limit_nano: int,
    currency: str = "usd",
) -> str:
    """Sets or changes the one budget of this scope, subject and period; returns its id. A new one
    counts what was spent since its window began, but not what runs at this moment. A limit below
    what is held stops further requests; those that run keep what they were promised. One of
    a key ends the invitations that it made: whoever comes in by them has no such limit.

    Raises `InvalidRequest`. Whether `subject` exists is the caller's to know.
    """
    _check(scope, subject, period, limit_nano)
    if scope == "key":
        await lock_people(session, organization_id)
        await end_invitations(session, subject)
    await lock_account(session, organization_id, currency)
    found = await session.scalar(
        select(Budget).where(
            Budget.organization_id == organization_id,
            Budget.scope == scope,
            Budget.subject == subject,
            Budget.period == period,
        )
    )
    if found is not None:
        found.limit_nano, found.subject_name = limit_nano, subject_name
        await session.flush()
        await _follow(session, found)
        return found.id
    count = await session.scalar(
        select(func.count()).select_from(Budget).where(Budget.organization_id == organization_id)
    )
    if (count or 0) >= MAX_BUDGETS:
        raise InvalidRequest(f"An organization has at most {MAX_BUDGETS:,} budgets.")
    budget = Budget(
        id=new_id("bud"),
        organization_id=organization_id,
        scope=scope,
        subject=subject,
        subject_name=subject_name,
        period=period,
        limit_nano=limit_nano,
        created_at=clock.now(),
    )
    session.add(budget)
    session.add(
        BudgetWindow(
            budget_id=budget.id,
            starts_on=window_starts(period, budget.created_at),
            organization_id=organization_id,
            limit_nano=limit_nano,
            posted_nano=await _spent_nano(session, budget),
            held_nano=0,
        )
    )
    await session.flush()
    return budget.id


async def _follow(session: AsyncSession, budget: Budget) -> None:
    """The current window's limit: the budget's, or what is spent and promised if that is more."""
    await session.execute(
        update(BudgetWindow)
        .where(
            BudgetWindow.budget_id == budget.id,
            BudgetWindow.starts_on == window_starts(budget.period, clock.now()),
        )
        .values(
            limit_nano=_greatest(
                session, budget.limit_nano, BudgetWindow.posted_nano + BudgetWindow.held_nano
            )
        )
        .execution_options(synchronize_session=False)
    )


def _greatest(session: AsyncSession, *values: object) -> object:
    return func.max(*values) if _is_sqlite(session) else func.greatest(*values)


def _is_sqlite(session: AsyncSession) -> bool:
    return session.get_bind().dialect.name == "sqlite"


async def _spent_nano(session: AsyncSession, budget: Budget) -> int:
    """By requests of this window that are settled: those in the database by their admission, those
    in the archive by the hour of their posting, which is all that is left of them here."""
    start, end = period_bounds(budget.period, budget.created_at)
    hours = (timegm(start.timetuple()) // 3600, timegm(end.timetuple()) // 3600)
    admitted = _sum_of(UsageEvent, budget).where(
        # Requests end after they start, and there is an index of their ends.
        UsageEvent.finished_at >= start,
        UsageEvent.started_at >= start,
        UsageEvent.started_at < end,
    )
    posted = (
        _sum_of(UsageSeries, budget, UsageHour.amount_nano)
        .join(UsageHour, UsageHour.series_id == UsageSeries.id)
        .where(
            UsageSeries.disposition == "billed",
            UsageHour.hour >= hours[0],
            UsageHour.hour < hours[1],
        )
    )
    # The account says whose they are. SQLite knows no sizes: were the organization named as well,
    # it would look for each posting's few events among all of a model's.
    kept = (
        _of_subject(select(func.sum(UsageEvent.amount_nano)), UsageEvent, budget)
        .join(LedgerEntry, LedgerEntry.transaction_id == UsageEvent.ledger_transaction_id)
        .where(
            LedgerEntry.account == on_account(budget.organization_id),
            LedgerEntry.created_at >= start,
            LedgerEntry.created_at < end,
        )
    )
    # At one moment: what is archived meanwhile is counted once.
    sums = select(*(query.scalar_subquery() for query in (admitted, posted, kept)))
    by_admission, by_hours, in_both = (
        int(nano or 0) for nano in (await session.execute(sums)).one()
    )
    return by_admission + by_hours - in_both


def _sum_of(
    table: type[UsageEvent | UsageSeries], budget: Budget, amount: object = UsageEvent.amount_nano
) -> Select[Any]:
    """Of what concerns a budget."""
    query = (
        select(func.sum(amount))
        .select_from(table)
        .where(table.organization_id == budget.organization_id)
    )
    return _of_subject(query, table, budget)


def _of_subject(
    query: Select[Any], table: type[UsageEvent | UsageSeries], budget: Budget
) -> Select[Any]:
    if budget.scope == "key":
        return query.where(table.api_key_id == budget.subject)
    if budget.scope == "model":
        return query.where(table.endpoint_name == budget.subject)
    return query


async def delete_budget(session: AsyncSession, organization_id: str, budget_id: str) -> None:
    """Its windows stay, as what running requests hold in them will be freed there. Raises
    `NotFound`, for other organizations' as well."""
    removed = await session.execute(
        delete(Budget)
        .where(Budget.id == budget_id, Budget.organization_id == organization_id)
        .returning(Budget.id)
    )
    if removed.first() is None:
        raise NotFound("There is no such budget.", code="budget_not_found")


def _check(scope: str, subject: str, period: str, limit_nano: int) -> None:
    if scope not in BUDGET_SCOPES:
        raise InvalidRequest(f"scope is one of {', '.join(BUDGET_SCOPES)}.", param="scope")
    if period not in BUDGET_PERIODS:
        raise InvalidRequest(f"period is one of {', '.join(BUDGET_PERIODS)}.", param="period")
    if bool(subject) == (scope == "organization"):
        raise InvalidRequest(
            "subject names the key's id or the model's endpoint; a budget of the whole "
            "organization has none.",
            param="subject",
        )
    if not 0 <= limit_nano <= min(MAX_BUDGET_NANO, MAX_BALANCE_NANO):
        raise InvalidRequest("A budget is 0 to a billion.", param="limit_nano")
