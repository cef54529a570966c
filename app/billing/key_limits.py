"""What an API key may spend: the budgets whose subject is a key, and what such a key may not do."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing import budgets
from app.billing.budgets import BudgetView
from app.billing.tables import Budget
from app.core.errors import Forbidden
from app.organizations.confirmation import reconfirm
from app.organizations.principal import Principal, Scope
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


async def confirm(
    session: AsyncSession,
    principal: Principal,
    scope: Scope,
    *,
    operator: bool = False,
    may_be_limited: bool = False,
) -> None:
    """That a caller may change what takes this scope, and is the operator's or not; nobody changes
    that before the end of the transaction, in which this comes first. A key with a limit changes
    nothing that takes the scope `admin`, but for what `may_be_limited`. Raises `Forbidden` or
    `Unauthenticated`."""
    principal = await reconfirm(session, principal)
    principal.require(scope)
    if operator:
        principal.require_operator()
    if scope == "admin" and not may_be_limited:
        await require_no_limit(session, principal)


async def require_no_limit(session: AsyncSession, principal: Principal) -> None:
    """For what would let a key that has a limit spend beside it: with the saved card, with keys and
    people that have none, with prices of its own. Raises `Forbidden`."""
    limits = select(Budget.id).where(
        Budget.organization_id == principal.organization_id,
        Budget.scope == "key",
        Budget.subject == principal.api_key_id,
    )
    if await session.scalar(limits.limit(1)) is not None:
        raise Forbidden(
            "This API key has a spending limit: of what takes the scope 'admin' it may look "
            "at things, and revoke itself, no more. Use a key without a limit, or the console.",
            code="key_limited",
        )
