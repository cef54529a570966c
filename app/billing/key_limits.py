"""What an API key may spend: the budgets whose subject is a key, and what such a key may not do."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing import budgets
from app.billing.budgets import BudgetView
from app.billing.tables import Budget
from app.core.errors import Forbidden
from app.organizations.confirmation import lock_people
from app.organizations.principal import Principal
from app.organizations.tables import ApiKey


async def limit_key(
    session: AsyncSession, key: ApiKey, period: str, limit_nano: int, *, currency: str
) -> None:
    """How much it may spend in a day or a month. Raises `InvalidRequest`."""
    await budgets.set_budget(
        session,
        key.organization_id,
        scope="key",
        subject=key.id,
        subject_name=key.name,
        period=period,
        limit_nano=limit_nano,
        currency=currency,
    )


async def key_budgets(session: AsyncSession, organization_id: str) -> dict[str, list[BudgetView]]:
    """The budgets of keys, by their ids."""
    found: dict[str, list[BudgetView]] = {}
    for budget in await budgets.list_budgets(session, organization_id):
        if budget.scope == "key":
            found.setdefault(budget.subject, []).append(budget)
    return found


async def require_no_limit(session: AsyncSession, principal: Principal) -> None:
    """For what would let a key that has a limit spend beside it: making keys, changing budgets,
    letting people in who may, and what is the operator's to change. Nobody limits the key before
    the end of the transaction. Raises `Forbidden`."""
    await lock_people(session, principal.organization_id)
    limits = select(Budget.id).where(
        Budget.organization_id == principal.organization_id,
        Budget.scope == "key",
        Budget.subject == principal.api_key_id,
    )
    if await session.scalar(limits.limit(1)) is not None:
        raise Forbidden(
            "This API key has a spending limit: it makes no keys, changes no budgets, lets "
            "nobody in and changes nothing that is the operator's. Use a key without one, or the "
            "console.",
            code="key_limited",
        )
