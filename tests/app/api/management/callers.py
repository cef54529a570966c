"""People with API keys."""

import msgspec

from app.core.database import Database
from app.organizations.keys import create_key
from app.organizations.principal import SCOPES


class Caller(msgspec.Struct, frozen=True):
    """Someone with an API key."""

    secret: str
    organization_id: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}


async def make_caller(
    database: Database, organization_id: str, scopes: frozenset[str] = SCOPES
) -> Caller:
    async with database.write() as session:
        _, secret = await create_key(session, organization_id, "test", scopes)
    return Caller(secret, organization_id)
