"""Watches: tell an organization that its balance or a budget runs low, and when that is over.

Owns when it is told. Each watch reads everything once and locks only what has to change.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.notices import end, notify
from app.billing.payments.tables import BillingProfile, Notice
from app.billing.tables import AccountBalance, Budget, BudgetWindow
from app.core import clock
from app.core.database import Database
from app.core.failpoints import failpoint
from app.core.money import NANO_PER_UNIT, format_nano

LOW_BALANCE = "low_balance"
BUDGET_NEARLY_SPENT = "budget_nearly_spent"
BUDGET_SPENT = "budget_spent"
NEARLY_PERCENT = 80
# Of prepaid accounts that chose none. Others have to choose one to be told.
DEFAULT_LOW_BALANCE_NANO = 5 * NANO_PER_UNIT
# Over again only when this much more is there, or holds that come and go would tell many times.
RECOVERY_PERCENT = 120


class Told(NamedTuple):
    """What one open notice is about."""

    organization_id: str
    kind: str
    subject: str


class News(NamedTuple):
    message: str
    data: dict[str, Any]


async def watch_balances(database: Database) -> int:
    """Returns how many notices began or ended."""
    async with database.read() as session:
        told = await _told(session, (LOW_BALANCE,))
        rows = await session.execute(
            select(AccountBalance, BillingProfile.low_balance_nano).outerjoin(
                BillingProfile,
                BillingProfile.organization_id == AccountBalance.organization_id,
            )
        )
        now: dict[Told, News] = {}
        for account, chosen_nano in rows.all():
            subject = Told(account.organization_id, LOW_BALANCE, "")
            news = _low_balance(account, chosen_nano, is_told=subject in told)
            if news is not None:
                now[subject] = news
    return await _tell(database, told, now)


def _low_balance(account: AccountBalance, chosen_nano: int | None, *, is_told: bool) -> News | None:
    threshold_nano = chosen_nano
    if threshold_nano is None and account.credit_limit_nano == 0:
        threshold_nano = DEFAULT_LOW_BALANCE_NANO
    if not threshold_nano:
        return None
    left_nano = account.posted_nano - account.held_nano + (account.credit_limit_nano or 0)
    enough_nano = threshold_nano * RECOVERY_PERCENT // 100 if is_told else threshold_nano
    if left_nano >= enough_nano:
        return None
    shown = format_nano(left_nano, account.currency, places=2)
    below = format_nano(threshold_nano, account.currency, places=2)
    return News(
        f"Your balance is low: {shown} is left, less than {below}. Requests are refused once it "
        "is used up.",
        {
            "left_nano": left_nano,
            "threshold_nano": threshold_nano,
            "currency": account.currency,
        },
    )


async def watch_budgets(database: Database, currency: str) -> int:
    """For windows that are open now. Returns how many notices began or ended."""
    async with database.read() as session:
        told = await _told(session, (BUDGET_NEARLY_SPENT, BUDGET_SPENT))
        rows = await session.execute(
            select(Budget, BudgetWindow)
            .join(BudgetWindow, BudgetWindow.budget_id == Budget.id)
            .where(BudgetWindow.starts_on.in_(set(_starts(clock.now()).values())))
        )
        now: dict[Told, News] = {}
        starts = _starts(clock.now())
        for budget, window in rows.all():
            if window.starts_on == starts[budget.period]:
                now |= _budget_news(budget, window, currency)
    return await _tell(database, told, now)


def _starts(at: datetime) -> dict[str, str]:
    return {"day": f"{at:%Y-%m-%d}", "month": f"{at:%Y-%m}-01"}


def _budget_news(budget: Budget, window: BudgetWindow, currency: str) -> dict[Told, News]:
    limit_nano, spent_nano = budget.limit_nano, window.posted_nano
    if spent_nano * 100 < limit_nano * NEARLY_PERCENT or not limit_nano:
        return {}
    kind = BUDGET_SPENT if spent_nano >= limit_nano else BUDGET_NEARLY_SPENT
    whose = {"organization": "of all requests", "key": "of the key", "model": "of the model"}
    name = " ".join(
        part for part in (whose[budget.scope], budget.subject_name or budget.subject) if part
    )
    how = "is spent" if kind == BUDGET_SPENT else f"is {spent_nano * 100 // limit_nano} % spent"
    every = {"day": "daily", "month": "monthly"}[budget.period]
    limit = format_nano(limit_nano, currency, places=2)
    data = {
        "budget_id": budget.id,
        "starts_on": window.starts_on,
        "period": budget.period,
        "limit_nano": limit_nano,
        "spent_nano": spent_nano,
        "currency": currency,
    }
    told = Told(budget.organization_id, kind, f"{budget.id}:{window.starts_on}")
    return {told: News(f"The {every} budget {name} ({limit}) {how}.", data)}


async def _told(session: AsyncSession, kinds: Iterable[str]) -> set[Told]:
    rows = await session.execute(
        select(Notice.organization_id, Notice.kind, Notice.data).where(
            Notice.kind.in_(tuple(kinds)), Notice.ended_at.is_(None)
        )
    )
    return {
        Told(organization_id, kind, str(data.get("subject", "")))
        for organization_id, kind, data in rows
    }


async def _tell(database: Database, told: set[Told], now: dict[Told, News]) -> int:
    begun = now.keys() - told
    over = told - now.keys()
    for subject in sorted(begun | over):
        async with database.write() as session:
            if subject in over:
                await end(session, *subject)
            else:
                news = now[subject]
                await notify(
                    session,
                    subject.organization_id,
                    subject.kind,
                    news.message,
                    news.data,
                    subject.subject,
                )
            failpoint("watches.before_commit")
    return len(begun) + len(over)
