"""API keys over HTTP: list, make, revoke. What a key is: `app.organizations.keys`."""

from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Router, delete, get, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from app.api.auth import allowed, authenticated, dependencies
from app.core.database import Database
from app.core.errors import Forbidden
from app.organizations import keys
from app.organizations.principal import Principal
from app.organizations.tables import ApiKey

AnyRequest = Request[object, object, State]


class NewKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`expires_at` is an instant with a time zone; without it the key never expires."""

    name: str
    scopes: list[str] = msgspec.field(default_factory=lambda: ["inference"])
    expires_at: datetime | None = None


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """`prefix` is what the secret begins with."""

    id: str
    name: str
    prefix: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


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
    return KeyList([_shown(row) for row in rows])


@post("/keys", guards=[allowed("admin")], summary="Make an API key")
async def create_key(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[NewKey]
) -> CreatedKey:
    """The answer holds the secret, which is not shown again. A key cannot be given scopes that
    the caller lacks."""
    if lacking := set(data.scopes) & keys.SCOPES - principal.scopes:
        raise Forbidden(
            f"You cannot give a key the scope {min(lacking)!r}, which you lack.",
            code="missing_scope",
            param="scopes",
        )
    database: Database = request.app.state.database
    async with database.write() as session:
        row, secret = await keys.create_key(
            session,
            principal.organization_id,
            data.name,
            frozenset(data.scopes),
            data.expires_at,
        )
    return CreatedKey(**_fields(row), secret=secret)


@delete("/keys/{key_id:str}", guards=[allowed("admin")], summary="Revoke an API key")
async def revoke_key(
    request: AnyRequest, principal: NamedDependency[Principal], key_id: FromPath[str]
) -> None:
    """The key stops working within a second and stays in the list."""
    database: Database = request.app.state.database
    async with database.write() as session:
        await keys.revoke_key(session, principal.organization_id, key_id)


def _shown(row: ApiKey) -> Key:
    return Key(**_fields(row))


def _fields(row: ApiKey) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Key.__struct_fields__}


router = Router(
    "/api",
    route_handlers=[list_keys, create_key, revoke_key],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Keys"],
)
