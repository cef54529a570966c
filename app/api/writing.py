"""The transaction of a request that changes something, of the API as of the console: it begins with
what its caller may do at that moment."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from litestar import Request
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.key_limits import confirm
from app.core.database import Database
from app.organizations.principal import Principal, Scope


@asynccontextmanager
async def writing(
    request: Request[Any, Any, Any],
    principal: Principal,
    scope: Scope,
    *,
    operator: bool = False,
    may_be_limited: bool = False,
) -> AsyncGenerator[AsyncSession]:
    """`Database.write` for a caller whom `confirm` lets pass."""
    database: Database = request.app.state.database
    async with database.write() as session:
        await confirm(session, principal, scope, operator=operator, may_be_limited=may_be_limited)
        yield session
