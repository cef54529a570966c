"""Budgets over HTTP: what an organization allows itself, its keys and its models to spend."""

from datetime import datetime

import msgspec
from litestar import Request, Router, delete, get, put
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.billing import budgets
from app.billing.budgets import BudgetView
from app.core.database import Database
from app.core.errors import NotFound
from app.deployments.tables import Endpoint
from app.organizations.principal import Principal
from app.organizations.tables import ApiKey
from app.settings import Settings

AnyRequest = Request[object, object, State]


class BudgetChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`subject` is a key's id or an endpoint's name, empty for the whole organization. Days and
    months are UTC. Amounts are nano-units (10^-9) of the currency."""

    scope: str
    period: str
    limit_nano: int
    subject: str = ""


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """`spent_nano` and `held_nano` are of the window that began on `starts_on`; a request counts
    in the window in which it was admitted."""

    id: str
    scope: str
    subject: str
    subject_name: str
    period: str
    limit_nano: int
    spent_nano: int
    held_nano: int
    left_nano: int
    starts_on: str
    ends_at: datetime


class BudgetList(msgspec.Struct, frozen=True):
    budgets: list[Budget]


@get("/budgets", guards=[allowed("read")], summary="List budgets")
async def list_budgets(request: AnyRequest, principal: NamedDependency[Principal]) -> BudgetList:
    """Every budget of your organization with what is left of it now."""
    database: Database = request.app.state.database
    async with database.read() as session:
        views = await budgets.list_budgets(session, principal.organization_id)
    return BudgetList([_shown(view) for view in views])


@put("/budgets", guards=[allowed("admin")], summary="Set a budget")
async def set_budget(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[BudgetChange]
) -> Budget:
    """There is one for each scope, subject and period; setting it again changes its limit.
    Requests that could exceed a budget are refused with 402 before they run. A key that has a
    budget of its own changes none, and invitations that it made before end."""
    settings: Settings = request.app.state.settings
    organization_id = principal.organization_id
    async with writing(request, principal, "admin") as session:
        subject_name = await name_of(session, organization_id, data.scope, data.subject)
        budget_id = await budgets.set_budget(
            session,
            organization_id,
            scope=data.scope,
            subject=data.subject,
            subject_name=subject_name,
            period=data.period,
            limit_nano=data.limit_nano,
            currency=settings.currency,
        )
        views = await budgets.list_budgets(session, organization_id)
    return _shown(next(view for view in views if view.id == budget_id))


@delete("/budgets/{budget_id:str}", guards=[allowed("admin")], summary="Remove a budget")
async def delete_budget(
    request: AnyRequest, principal: NamedDependency[Principal], budget_id: FromPath[str]
) -> None:
    """Requests are no longer counted in it."""
    async with writing(request, principal, "admin") as session:
        await budgets.delete_budget(session, principal.organization_id, budget_id)


async def name_of(session: AsyncSession, organization_id: str, scope: str, subject: str) -> str:
    """What people call a budget's subject. Raises `NotFound` for a key or a model that the
    organization does not have."""
    if scope == "key":
        name = await session.scalar(
            select(ApiKey.name).where(
                ApiKey.id == subject, ApiKey.organization_id == organization_id
            )
        )
    elif scope == "model":
        name = await session.scalar(
            select(Endpoint.name).where(
                Endpoint.name == subject,
                or_(Endpoint.organization_id == organization_id, Endpoint.is_public),
            )
        )
    else:
        return ""
    if name is None:
        raise NotFound(f"You have no {scope} {subject!r}.", code=f"{scope}_not_found")
    return name


def _shown(view: BudgetView) -> Budget:
    names = set(Budget.__struct_fields__)
    return Budget(**{name: getattr(view, name) for name in names})


router = Router(
    "/api",
    route_handlers=[list_budgets, set_budget, delete_budget],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Budgets"],
)
