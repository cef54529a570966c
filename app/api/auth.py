"""Authentication of API requests: a bearer secret becomes a `Principal`, before anything of
the request's body is read, and again once it is there: a key may be revoked meanwhile. Cookies mean
nothing here, but to pages that people only read."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler

from app.api.bodies import (
    is_streamed,
    length_of_file,
    may_hold_file,
    receive_fields,
    receive_form,
    receive_small_body,
    remember_sender,
    takes_file,
)
from app.api.large_bodies import check_size
from app.core.errors import Unauthenticated
from app.organizations.keys import KeyRing
from app.organizations.principal import Principal, Scope
from app.organizations.signins import COOKIE, SignIns, host_cookie
from app.registry.uploads import UploadStore
from app.settings import Settings

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

Connection = ASGIConnection[Any, Any, Any, Any]
AnyRequest = Request[Any, Any, Any]
T = TypeVar("T")


def bearer_secret(connection: Connection) -> str:
    """The secret of `Authorization: Bearer` or `x-api-key`. Raises `Unauthenticated`."""
    scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return secret.strip()
    if secret := connection.headers.get("x-api-key", "").strip():
        return secret
    raise Unauthenticated(
        "Send an API key: `Authorization: Bearer <key>`. The console's page Keys makes one.",
        code="missing_api_key",
    )


async def bearer_principal(request: Connection) -> Principal:
    """Who holds the request's API key. Raises `Unauthenticated`."""
    key_ring: KeyRing = request.app.state.key_ring
    principal = await key_ring.authenticate(bearer_secret(request))
    remember_sender(request, principal.organization_id)
    return principal


async def principal_after_body(request: Connection) -> Principal:
    """Who holds the request's API key still, once all of the body is there: what the request may
    do is decided by nothing older. Raises `Unauthenticated` and `TookTooLong`."""
    principal = await bearer_principal(request)
    if not await _receive_body(request, principal):
        return principal
    return await bearer_principal(request)


async def _receive_body(request: Connection, principal: Principal) -> bool:
    """Whether there was one, as far as its handler does not receive it as it comes. A file's needs
    room, which is looked for first."""
    assert isinstance(request, Request), "only requests have a body"
    if request.method in SAFE_METHODS or is_streamed(request):
        return False
    if may_hold_file(request):
        uploads: UploadStore = request.app.state.uploads
        num_bytes = length_of_file(request, uploads.max_bytes)
        async with uploads.receiving_form(principal, num_bytes) as arriving:
            await receive_form(request, arriving.came)  # which takes its time
    elif takes_file(request):
        await receive_fields(request)
    else:
        check_size(await receive_small_body(request))
    return True


async def caller_and_body(
    request: AnyRequest,
    check: Callable[[Principal], object],
    receive: Callable[[AnyRequest], Awaitable[T]],
) -> tuple[Principal, T]:
    """Who sends a body that its handler receives, and the body. `check` raises for who may not:
    it is asked before anything of the body is read, and, as that may take as long as it likes,
    again of who holds the key once it is there. Raises `Unauthenticated`."""
    check(await bearer_principal(request))
    received = await receive(request)
    principal = await bearer_principal(request)
    check(principal)
    return principal, received


def may_infer(principal: Principal) -> None:
    """Raises `Forbidden`."""
    principal.require("inference")


async def reading_principal(request: Connection) -> Principal:
    """For what is only read, and by people too: the holder of an API key, or who is signed in at
    the console. Raises `Unauthenticated`."""
    settings: Settings = request.app.state.settings
    is_https = settings.public_url.startswith("https://")
    token = request.cookies.get(host_cookie(COOKIE, is_https=is_https), "")
    if not token or "authorization" in request.headers or "x-api-key" in request.headers:
        return await bearer_principal(request)
    sign_ins: SignIns = request.app.state.sign_ins
    return (await sign_ins.authenticate(token)).principal


async def authenticated(connection: Connection, _: BaseRouteHandler) -> None:
    """A guard that lets only holders of an API key pass, and remembers who it was."""
    connection.scope["auth"] = await bearer_principal(connection)


def allowed(scope: Scope) -> Callable[[Connection, BaseRouteHandler], Awaitable[None]]:
    """A guard, after `authenticated`, that lets only callers with this scope pass: nothing of
    anybody else's body is received, and they are looked up again once theirs is there."""

    async def guard(connection: Connection, _: BaseRouteHandler) -> None:
        connection.auth.require(scope)
        if await _receive_body(connection, connection.auth):
            connection.scope["auth"] = principal = await bearer_principal(connection)
            principal.require(scope)

    return guard


async def _principal(request: Request[Any, Any, Any]) -> Principal:
    return request.auth


# For a router whose guards include `authenticated`: handlers take
# `principal: NamedDependency[Principal]`.
dependencies = {"principal": Provide(_principal)}
