"""Keeps API keys that have a spending limit from what the operator alone may change."""

from litestar.handlers import BaseRouteHandler

from app.api.auth import Connection, bearer_principal
from app.billing.key_limits import require_no_limit
from app.core.database import Database


async def without_limit(connection: Connection, _: BaseRouteHandler) -> None:
    """A guard that lets no key with a spending limit pass: with prices, credit and organizations
    of its choice it could spend beside it. Whether it is the operator's is not asked here."""
    principal = await bearer_principal(connection)
    database: Database = connection.app.state.database
    async with database.read() as session:
        await require_no_limit(session, principal)
