"""The page of API keys: listing, making (the secret is shown once) and revoking them."""

from datetime import timedelta
from typing import Any

import msgspec
from litestar import Response, Router, get, post
from litestar.params import FromPath

from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, page
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest, NotFound
from app.organizations.keys import ENVIRONMENT_KEY_ID, create_key, list_keys, revoke_key
from app.organizations.principal import SCOPE_MEANINGS
from app.organizations.tables import ApiKey

EXPIRIES = {
    "": "Never",
    "1": "In a day",
    "30": "In 30 days",
    "90": "In 90 days",
    "365": "In a year",
}


class KeyForm(msgspec.Struct, frozen=True):
    """What the form holds; sensible for a program that only calls."""

    name: str = ""
    scopes: frozenset[str] = frozenset({"inference"})
    expiry: str = ""


@get("/keys")
async def show_keys(request: PageRequest) -> Response[str]:
    """Every key of the organization."""
    return await _keys_page(request, KeyForm())


@post("/keys", status_code=200)
async def make_key(request: PageRequest) -> Response[str]:
    """Shows the new secret in the answer itself: it is kept nowhere that a redirect could reach."""
    principal = signed_in(request).principal
    principal.require("admin")
    form = KeyForm(
        name=await form_field(request, "name"),
        scopes=frozenset(str(scope) for scope in (await request.form()).getall("scope", [])),
        expiry=await form_field(request, "expiry"),
    )
    database: Database = request.app.state.database
    try:
        if form.expiry not in EXPIRIES:
            raise InvalidRequest("Choose when the key expires from the list.", param="expiry")
        expires_at = clock.now() + timedelta(days=int(form.expiry)) if form.expiry else None
        async with database.write() as session:
            made, secret = await create_key(
                session, principal.organization_id, form.name, form.scopes, expires_at
            )
    except InvalidRequest as error:
        return await _keys_page(request, form, status_code=400, error=error.message)
    return await _keys_page(request, KeyForm(), made=made, secret=secret)


@get("/keys/{key_id:str}/revoke")
async def ask_revoke(request: PageRequest, key_id: FromPath[str]) -> Response[str]:
    """What revoking does, and the form that does it."""
    key = next((key for key in await _read_keys(request) if key.id == key_id), None)
    if key is None:
        raise NotFound("There is no such key.")
    return page(request, "keys/revoke.html", key=key)


@post("/keys/{key_id:str}/revoke", status_code=200)
async def revoke(request: PageRequest, key_id: FromPath[str]) -> Response[Any]:
    """Makes a key useless for good."""
    principal = signed_in(request).principal
    principal.require("admin")
    database: Database = request.app.state.database
    async with database.write() as session:
        await revoke_key(session, principal.organization_id, key_id)
    return go(request, "/console/keys?notice=revoked")


async def _keys_page(
    request: PageRequest,
    form: KeyForm,
    *,
    status_code: int = 200,
    made: ApiKey | None = None,
    secret: str = "",
    error: str = "",
) -> Response[str]:
    return page(
        request,
        "keys/keys.html",
        status_code=status_code,
        keys=await _read_keys(request),
        environment_key_id=ENVIRONMENT_KEY_ID,
        now=clock.now(),
        scopes=SCOPE_MEANINGS,
        expiries=EXPIRIES,
        form=form,
        made=made,
        secret=secret,
        error=error,
    )


async def _read_keys(request: PageRequest) -> list[ApiKey]:
    """Usable keys first."""
    principal = signed_in(request).principal
    principal.require("admin")
    database: Database = request.app.state.database
    async with database.read() as session:
        keys = await list_keys(session, principal.organization_id)
    return sorted(keys, key=lambda key: key.revoked_at is not None)


router = Router("", route_handlers=[show_keys, make_key, ask_revoke, revoke])
