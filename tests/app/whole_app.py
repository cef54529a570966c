"""The whole application in this process, without worker processes: `running`, and people in it."""

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast
from unittest.mock import patch

import httpx
import msgspec
from litestar import Litestar

from app.billing.clerk import Clerk
from app.core import clock
from app.core.database import Database
from app.core.ids import new_id
from app.main import create_app, start
from app.organizations.keys import create_key
from app.organizations.principal import SCOPES
from app.organizations.tables import Membership, Organization, User
from app.settings import Settings

URL = "http://testserver.local"


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """An organization, a key of it with every scope, and the cookie and the form token of its
    owner."""

    id: str
    name: str
    key_id: str
    secret: str
    cookies: dict[str, str]
    csrf_token: str

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}


@asynccontextmanager
async def running(settings: Settings, *, has_clerk: bool = True) -> AsyncIterator[Litestar]:
    """Started like `tapeout serve` starts it, and stopped at the end. Without its clerk, nothing
    moves but what is called."""
    application = create_app(settings)
    async with AsyncExitStack() as stack:
        if not has_clerk:
            stack.enter_context(patch.object(Clerk, "start"))
        await start(application.state, settings, lambda line: None, stack)
        yield application


def client(application: Litestar) -> httpx.AsyncClient:
    """Without redirects, and without the errors of the application."""
    transport = httpx.ASGITransport(cast("Any", application), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=URL, timeout=60)


async def add_tenant(application: Litestar, name: str, *, is_operator: bool = False) -> Tenant:
    """A new organization, with an owner who is signed in."""
    database: Database = application.state.database
    user = User(
        id=new_id("user"),
        email=f"{name}@example.com",
        password_hash="-",  # nobody signs in with one
        created_at=clock.now(),
    )
    organization = Organization(
        id=new_id("org"),
        name=name,
        cache_salt=name.encode(),
        is_operator=is_operator,
        created_at=clock.now(),
    )
    async with database.write() as session:
        session.add_all((organization, user))
        await session.flush()
        session.add(
            Membership(
                id=new_id("mem"),
                user_id=user.id,
                organization_id=organization.id,
                role="owner",
                created_at=clock.now(),
            )
        )
        key, secret = await create_key(session, organization.id, f"key of {name}", SCOPES)
    signed_in = await application.state.sign_ins.open(user)
    return Tenant(
        id=organization.id,
        name=name,
        key_id=key.id,
        secret=secret,
        cookies={"tapeout_session": signed_in.token},
        csrf_token=signed_in.csrf_token,
    )


def form_token(page: str) -> str:
    """The token in a page's forms."""
    found = re.search(r'name="csrf_token" value="([^"]+)"', page)
    assert found, "the page has no form"
    return found[1]
