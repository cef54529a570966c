"""API keys, and the ring that recognises them without a query per request."""

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import event, select

from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from app.organizations import keys
from app.organizations.keys import (
    ENVIRONMENT_KEY_ID,
    KeyRing,
    create_key,
    list_keys,
    revoke_key,
)
from app.organizations.service import bootstrap, create_organization
from app.organizations.tables import ApiKey, Organization
from app.settings import Settings


class Clock:
    """A monotonic clock that tests move."""

    def __init__(self) -> None:
        self.now_ns = 10**12

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * 10**9)


@pytest.fixture
def monotonic(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moving = Clock()
    monkeypatch.setattr(clock, "monotonic_ns", moving)
    return moving


@pytest.fixture
def queries(database: Database) -> list[str]:
    """Every statement the database is sent."""
    seen: list[str] = []

    def note(_: object, __: object, statement: str, *___: object) -> None:
        if statement.startswith(("SELECT", "UPDATE")):
            seen.append(statement)

    event.listen(database.engine.sync_engine, "before_cursor_execute", note)
    return seen


@pytest.fixture
async def organization(database: Database) -> Organization:
    async with database.write() as session:
        return await create_organization(session, "acme")


async def make_key(
    database: Database, organization_id: str, **arguments: object
) -> tuple[ApiKey, str]:
    async with database.write() as session:
        return await create_key(
            session,
            organization_id,
            "ci",
            frozenset({"inference"}),
            **arguments,  # type: ignore[arg-type]
        )


async def test_a_key_is_stored_only_as_a_hash(
    database: Database, organization: Organization
) -> None:
    key, secret = await make_key(database, organization.id)
    assert secret.startswith("tp-")
    assert secret.startswith(key.prefix)
    assert len(key.prefix) <= 10
    async with database.read() as session:
        row = await session.scalar(select(ApiKey))
    assert row is not None
    assert secret not in [getattr(row, column.key) for column in ApiKey.__table__.columns]


async def test_a_key_is_recognised_with_its_scopes(
    database: Database, organization: Organization
) -> None:
    key, secret = await make_key(database, organization.id)
    principal = await KeyRing(database).authenticate(secret)
    assert principal.organization_id == organization.id
    assert principal.organization_name == "acme"
    assert principal.scopes == {"inference"}
    assert (principal.api_key_id, principal.api_key_name) == (key.id, "ci")
    assert principal.user_id is None


@pytest.mark.parametrize(
    ("name", "scopes", "param"),
    [
        ("", {"read"}, "name"),
        ("x" * 81, {"read"}, "name"),
        ("a\nb", {"read"}, "name"),
        ("ok", set[str](), "scopes"),
        ("ok", {"root"}, "scopes"),
    ],
)
async def test_invalid_keys(
    database: Database, organization: Organization, name: str, scopes: set[str], param: str
) -> None:
    async with database.write() as session:
        with pytest.raises(InvalidRequest) as caught:
            await create_key(session, organization.id, name, frozenset(scopes))
    assert caught.value.param == param


@pytest.mark.parametrize("secret", ["", "tp-unknown", "x" * 10_000, "ü"])
async def test_unknown_keys(database: Database, secret: str) -> None:
    with pytest.raises(Unauthenticated):
        await KeyRing(database).authenticate(secret)


async def test_an_expired_key_ends_even_while_it_is_remembered(
    database: Database, organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    expires_at = clock.now() + timedelta(minutes=5)
    _, secret = await make_key(database, organization.id, expires_at=expires_at)
    ring = KeyRing(database)
    await ring.authenticate(secret)
    monkeypatch.setattr(clock, "now", lambda: expires_at)
    with pytest.raises(Unauthenticated, match="expired"):
        await ring.authenticate(secret)
    with pytest.raises(InvalidRequest, match="past"):
        await make_key(database, organization.id, expires_at=expires_at)


async def test_the_hot_path_asks_the_database_once_a_second(
    database: Database, organization: Organization, monotonic: Clock, queries: list[str]
) -> None:
    _, secret = await make_key(database, organization.id)
    ring = KeyRing(database)
    queries.clear()
    await asyncio.gather(*(ring.authenticate(secret) for _ in range(50)))
    for _ in range(50):
        await ring.authenticate(secret)
    assert len(queries) == 1
    monotonic.advance(0.99)
    await ring.authenticate(secret)  # still believed, and read again in the background
    assert ring._reader is not None
    await ring._reader
    monotonic.advance(0.5)
    await ring.authenticate(secret)
    assert len(queries) == 2


async def test_revoked_key_ends_within_a_second_in_another_process(
    database: Database, organization: Organization, monotonic: Clock
) -> None:
    key, secret = await make_key(database, organization.id)
    ring = KeyRing(database)
    await ring.authenticate(secret)
    async with database.write() as session:
        await revoke_key(session, organization.id, key.id)
    monotonic.advance(1.0)
    with pytest.raises(Unauthenticated):
        await ring.authenticate(secret)
    with pytest.raises(Unauthenticated):
        await ring.authenticate(secret)


async def test_a_new_key_works_at_once_after_it_was_unknown(
    database: Database, organization: Organization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "new_api_key", lambda: "tp-known-in-advance")
    ring = KeyRing(database)
    with pytest.raises(Unauthenticated):
        await ring.authenticate("tp-known-in-advance")
    await make_key(database, organization.id)
    assert await ring.authenticate("tp-known-in-advance")


async def test_a_flood_of_unknown_keys_costs_few_queries_and_no_memory(
    database: Database, organization: Organization, queries: list[str]
) -> None:
    _, secret = await make_key(database, organization.id)
    ring = KeyRing(database)
    queries.clear()
    answers = await asyncio.gather(
        *(ring.authenticate(f"tp-guess-{number}") for number in range(1000)),
        ring.authenticate(secret),
        return_exceptions=True,
    )
    assert sum(isinstance(answer, Unauthenticated) for answer in answers) == 1000
    assert len(queries) <= 1000 / keys.MAX_BATCH + 1
    assert len(ring._entries) == 1
    assert not ring._waiting


async def test_nobody_gets_in_while_the_database_is_away(
    database: Database,
    organization: Organization,
    monotonic: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, secret = await make_key(database, organization.id)
    ring = KeyRing(database)
    await ring.authenticate(secret)

    def away() -> None:
        raise OSError("away")

    with monkeypatch.context() as patch:
        patch.setattr(database, "read", away)
        monotonic.advance(2)
        with pytest.raises(OSError, match="away"):
            await ring.authenticate(secret)
    assert await ring.authenticate(secret)


async def test_a_caller_that_gives_up_does_not_take_others_with_it(
    database: Database, organization: Organization
) -> None:
    _, secret = await make_key(database, organization.id)
    ring = KeyRing(database)
    first = asyncio.create_task(ring.authenticate(secret))
    second = asyncio.create_task(ring.authenticate(secret))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).organization_id == organization.id


async def test_last_use_is_written_in_batches(
    database: Database, organization: Organization, queries: list[str]
) -> None:
    secrets = [(await make_key(database, organization.id))[1] for _ in range(3)]
    ring = KeyRing(database)
    for secret in secrets * 5:
        await ring.authenticate(secret)
    queries.clear()
    await ring.close()
    assert len([query for query in queries if query.startswith("UPDATE")]) == 1
    async with database.read() as session:
        assert all(key.last_used_at for key in await list_keys(session, organization.id))


async def test_keys_of_another_organization_do_not_exist(
    database: Database, organization: Organization
) -> None:
    key, _ = await make_key(database, organization.id)
    async with database.write() as session:
        other = await create_organization(session, "other")
        assert await list_keys(session, other.id) == []
        with pytest.raises(NotFound):
            await revoke_key(session, other.id, key.id)


async def test_the_environment_key_cannot_be_revoked(
    database: Database, settings: Settings
) -> None:
    await bootstrap(database, settings)
    async with database.write() as session:
        key = await session.get(ApiKey, ENVIRONMENT_KEY_ID)
        assert key is not None
        assert len(key.prefix) <= len(settings.admin_key) // 4
        with pytest.raises(Conflict, match="TAPEOUT_ADMIN_KEY"):
            await revoke_key(session, key.organization_id, key.id)
