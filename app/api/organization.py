"""The caller's organization over HTTP: who it is, what it owes, how much it may spend."""

import msgspec
from litestar import Request, Router, get, patch
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import JSONBody
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.billing.service import parse_spending_limit, read_account, set_spending_limit
from app.core.database import Database
from app.core.errors import Forbidden
from app.core.money import write_amount
from app.organizations.principal import Principal
from app.settings import Settings

AnyRequest = Request[object, object, State]


class OrganizationChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`spending_limit` is an amount such as "12.50", or null for no limit."""

    spending_limit: str | None


class OrganizationState(msgspec.Struct, frozen=True, kw_only=True):
    """Amounts are in nano-units (10^-9) of `currency`, but `spending_limit` is as people write
    it. `held_nano` is reserved for requests that are running."""

    id: str
    name: str
    is_operator: bool
    currency: str
    owed_nano: int
    held_nano: int
    spending_limit: str | None
    spending_limit_nano: int | None


@get("/organization", guards=[allowed("read")], summary="Show your organization")
async def show_organization(
    request: AnyRequest, principal: NamedDependency[Principal]
) -> OrganizationState:
    """Name, amount owed, and spending limit."""
    database: Database = request.app.state.database
    async with database.read() as session:
        return await _state(session, principal, request.app.state.settings)


@patch(
    "/organization",
    guards=[allowed("admin")],
    summary="Set your spending limit (operator)",
)
async def change_organization(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[OrganizationChange]
) -> OrganizationState:
    """How much your organization may owe, which is the operator's to say: requests that would
    exceed the limit are refused with 402 before they run. What you allow yourselves are budgets."""
    if not principal.is_operator:
        raise Forbidden(
            "How much an organization may owe is set by the operator of this box. "
            "Limit your own spending with a budget: PUT /api/budgets.",
            code="operator_only",
        )
    text = data.spending_limit
    limit_nano = None if text is None else parse_spending_limit(text)
    settings: Settings = request.app.state.settings
    async with writing(request, principal, "admin", operator=True) as session:
        await set_spending_limit(session, principal.organization_id, limit_nano, settings.currency)
        return await _state(session, principal, settings)


async def _state(
    session: AsyncSession, principal: Principal, settings: Settings
) -> OrganizationState:
    account = await read_account(session, principal.organization_id, settings.currency)
    limit_nano = account.spending_limit_nano
    return OrganizationState(
        id=principal.organization_id,
        name=principal.organization_name,
        is_operator=principal.is_operator,
        currency=account.currency,
        owed_nano=account.owed_nano,
        held_nano=account.held_nano,
        spending_limit=None if limit_nano is None else write_amount(limit_nano),
        spending_limit_nano=limit_nano,
    )


router = Router(
    "/api",
    route_handlers=[show_organization, change_organization],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Organization"],
)
