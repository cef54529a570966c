"""Where every organization stands, for the operator: balance, credit, limit, and what it spends.

Reads only; what an organization sees of itself is `service.py`'s.
"""

from datetime import datetime

import msgspec
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.periods import period_of
from app.billing.tables import AccountBalance, CreditLot
from app.core import clock
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
    spent = await _spent(session)
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


async def _spent(session: AsyncSession) -> dict[str, int]:
    """This month's usage by organization, in UTC."""
    first_hour, end_hour = period_of(clock.now()).hours
    rows = await session.execute(
        select(UsageSeries.organization_id, func.sum(UsageHour.amount_nano))
        .join(UsageHour, UsageHour.series_id == UsageSeries.id)
        .where(UsageHour.hour >= first_hour, UsageHour.hour < end_hour)
        .group_by(UsageSeries.organization_id)
    )
    return {organization_id: int(nano) for organization_id, nano in rows}
