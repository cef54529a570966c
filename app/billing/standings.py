"""Where every organization stands, for the operator: balance, credit, limit, and what it spends.

Reads only; what an organization sees of itself is `service.py`'s.
"""

from collections import defaultdict
from datetime import datetime

import msgspec
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.periods import period_of
from app.billing.tables import AccountBalance, CreditLot
from app.core import clock
from app.metering.closed_hours import read_in_parts
from app.metering.tables import UsageHour, UsageSeries
from app.organizations.tables import Organization


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """`mode`: prepaid (limit 0), limited, or unlimited. `balance_nano` is credit less what is
    owed; `month_nano` is this month's usage so far, before credit."""

    id: str
    name: str
    is_operator: bool
    created_at: datetime
    currency: str
    mode: str
    credit_limit_nano: int | None
    balance_nano: int
    held_nano: int
    credit_nano: int
    owed_nano: int
    month_nano: int


async def read_standings(
    session: AsyncSession, currency: str, organization_id: str | None = None
) -> list[Standing]:
    """By name; only one of them if its id is given."""
    query = (
        select(Organization, AccountBalance)
        .outerjoin(AccountBalance, AccountBalance.organization_id == Organization.id)
        .order_by(Organization.name)
    )
    if organization_id is not None:
        query = query.where(Organization.id == organization_id)
    rows = await session.execute(query.execution_options(populate_existing=True))
    spent = await _spent(session, organization_id)
    lots = await session.execute(
        select(CreditLot.organization_id, func.sum(CreditLot.remaining_nano))
        .where(CreditLot.remaining_nano > 0)
        .group_by(CreditLot.organization_id)
    )
    credit = {owner_id: int(nano) for owner_id, nano in lots}
    return [
        _standing(
            organization,
            account,
            currency,
            credit.get(organization.id, 0),
            spent.get(organization.id, 0),
        )
        for organization, account in rows.all()
    ]


def _standing(
    organization: Organization,
    account: AccountBalance | None,
    currency: str,
    credit_nano: int,
    month_nano: int,
) -> Standing:
    limit_nano = None if account is None else account.credit_limit_nano
    balance_nano = 0 if account is None else account.posted_nano
    return Standing(
        id=organization.id,
        name=organization.name,
        is_operator=organization.is_operator,
        created_at=organization.created_at,
        currency=currency if account is None else account.currency,
        mode="unlimited" if limit_nano is None else "limited" if limit_nano else "prepaid",
        credit_limit_nano=limit_nano,
        balance_nano=balance_nano,
        held_nano=0 if account is None else account.held_nano,
        credit_nano=credit_nano,
        owed_nano=credit_nano - balance_nano,
        month_nano=month_nano,
    )


async def _spent(session: AsyncSession, organization_id: str | None) -> dict[str, int]:
    """This month's usage by organization, in UTC."""

    async def read(first: int, until: int) -> list[tuple[str, int]]:
        # Each series by itself: its hours lie together, and those of a month far apart.
        amount = (
            select(func.sum(UsageHour.amount_nano))
            .where(
                UsageHour.series_id == UsageSeries.id,
                UsageHour.hour >= first,
                UsageHour.hour < until,
            )
            .scalar_subquery()
        )
        query = select(UsageSeries.organization_id, func.sum(amount)).group_by(
            UsageSeries.organization_id
        )
        if organization_id is not None:
            query = query.where(UsageSeries.organization_id == organization_id)
        return [(row[0], int(row[1] or 0)) for row in await session.execute(query)]

    now = clock.now()
    name = ("month's spend", organization_id)
    spent: dict[str, int] = defaultdict(int)
    for owner_id, nano in await read_in_parts(session, name, *period_of(now).hours, read, now):
        spent[owner_id] += nano
    return spent
