"""An organization with an upload store of its own."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from app.core.database import Database
from app.core.storage import Storage
from app.organizations.principal import SCOPES, Principal
from app.organizations.service import create_organization
from app.registry.tables import Upload
from app.registry.uploads import UploadStore
from app.settings import Settings

Receive = Callable[..., Awaitable[Upload]]


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.data_dir)


@pytest.fixture
def uploads(database: Database, storage: Storage, settings: Settings) -> UploadStore:
    return UploadStore(database, storage, settings)


async def make_principal(database: Database, name: str) -> Principal:
    """A new organization, and someone who may do everything in it."""
    async with database.write() as session:
        organization = await create_organization(session, name)
    return Principal(
        organization_id=organization.id,
        organization_name=name,
        cache_salt=organization.cache_salt,
        is_operator=False,
        scopes=SCOPES,
    )


@pytest.fixture
async def principal(database: Database) -> Principal:
    return await make_principal(database, "acme")


@pytest.fixture
async def stranger(database: Database) -> Principal:
    return await make_principal(database, "other")


async def stream(*chunks: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    """What a connection brings, and how it ends."""
    for chunk in chunks:
        yield chunk
    if error is not None:
        raise error
