"""API keys over HTTP: list, make, limit, revoke. What a key is: `app.organizations.keys`; what it
may spend: `app.billing.budgets`."""

from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Router, delete, get, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.billing.budgets import BudgetView
from app.billing.key_limits import key_budgets, limit_key
from app.core.database import Database
from app.organizations import keys
from app.organizations.principal import Principal
from app.organizations.tables import ApiKey
from app.settings import Settings

AnyRequest = Request[object, object, State]


class NewKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`expires_at` is an instant with a time zone; without it the key never expires. `limit_nano`
    is the most that it may spend in each `limit_period`, a day or a month (UTC)."""

    name: str
    scopes: list[str] = msgspec.field(default_factory=lambda: ["inference"])
    expires_at: datetime | None = None
    limit_nano: int | None = None
    limit_period: str = "month"


class KeyLimit(msgspec.Struct, frozen=True, kw_only=True):
    """A budget of the key, in nano-units (10^-9) of the currency: `PUT /api/budgets` changes it,
    `DELETE /api/budgets/{id}` takes it away."""

    id: str
    period: str
    limit_nano: int
    spent_nano: int
    held_nano: int


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """`prefix` is what the secret begins with; `limits` are how much it may spend."""

    id: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    limits: list[KeyLimit]


class CreatedKey(Key, frozen=True, kw_only=True):
    """`secret` is shown this once."""

    secret: str


class KeyList(msgspec.Struct, frozen=True):
    keys: list[Key]


@get("/keys", guards=[allowed("admin")], summary="List API keys")
async def list_keys(request: AnyRequest, principal: NamedDependency[Principal]) -> KeyList:
    """Every key of your organization, revoked ones included, newest first."""
    database: Database = request.app.state.database
    async with database.read() as session:
        rows = await keys.list_keys(session, principal.organization_id)
        limits = await key_budgets(session, principal.organization_id)
    return KeyList([Key(**_fields(row, limits.get(row.id, []))) for row in rows])


@post("/keys", guards=[allowed("admin")], summary="Make an API key")
async def create_key(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[NewKey]
) -> CreatedKey:
    """The answer holds the secret, which is not shown again. A key cannot be given scopes that
    the caller lacks; one made by a key that expires does so no later, and a key with a limit makes
    none."""
    settings: Settings = request.app.state.settings
    organization_id = principal.organization_id
    async with writing(request, principal, "admin") as session:
        row, secret = await keys.create_key_by(
            session, principal, data.name, frozenset(data.scopes), data.expires_at
        )
        if data.limit_nano is not None:
            await limit_key(
                session, row, data.limit_period, data.limit_nano, currency=settings.currency
            )
        limits = await key_budgets(session, organization_id)
    return CreatedKey(**_fields(row, limits.get(row.id, [])), secret=secret)


@delete("/keys/{key_id:str}", guards=[allowed("admin")], summary="Revoke an API key")
async def revoke_key(
    request: AnyRequest, principal: NamedDependency[Principal], key_id: FromPath[str]
) -> None:
    """The key stops working within a second and stays in the list."""
    is_own = key_id == principal.api_key_id
    async with writing(request, principal, "admin", may_be_limited=is_own) as session:
        await keys.revoke_key(session, principal.organization_id, key_id)


def _fields(row: ApiKey, limits: list[BudgetView]) -> dict[str, Any]:
    shown = [
        KeyLimit(**{name: getattr(limit, name) for name in KeyLimit.__struct_fields__})
        for limit in limits
    ]
    names = set(Key.__struct_fields__) - {"limits"}
    return {name: getattr(row, name) for name in names} | {"limits": shown}


router = Router(
    "/api",
    route_handlers=[list_keys, create_key, revoke_key],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Keys"],
)
