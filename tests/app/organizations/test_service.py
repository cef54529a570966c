"""First start, the one-time set-up link, and the environment's admin key."""

import pytest
from msgspec.structs import replace
from sqlalchemy import select

from app.core.database import Database
from app.core.errors import Conflict, Forbidden, InvalidRequest, Unauthenticated
from app.organizations import people
from app.organizations.keys import KeyRing
from app.organizations.principal import SCOPES
from app.organizations.service import (
    bootstrap,
    create_organization,
    get_organization,
    is_setup_token,
    redeem_setup,
)
from app.organizations.tables import Membership, Organization, SetupToken, User
from app.settings import Settings
from tests.app.conftest import ADMIN_KEY


async def test_first_start_makes_the_operator_and_its_key(
    database: Database, settings: Settings
) -> None:
    token = await bootstrap(database, settings)
    assert token is not None
    async with database.read() as session:
        organization = await session.scalar(select(Organization))
    assert organization is not None
    assert (organization.name, organization.is_operator) == ("default", True)
    assert len(organization.cache_salt) == 32
    principal = await KeyRing(database).authenticate(ADMIN_KEY)
    assert principal.organization_id == organization.id
    assert principal.cache_salt == organization.cache_salt
    assert principal.scopes == SCOPES
    assert principal.is_operator


async def test_a_restart_keeps_everything_but_the_setup_link(
    database: Database, settings: Settings
) -> None:
    first = await bootstrap(database, settings)
    second = await bootstrap(database, settings)
    assert first
    assert second
    assert first != second
    async with database.read() as session:
        assert len(list(await session.scalars(select(Organization)))) == 1
        assert not await is_setup_token(session, first)
        assert await is_setup_token(session, second)
        tokens = list(await session.scalars(select(SetupToken.token_hash)))
    assert second not in tokens  # stored hashed


async def test_a_changed_admin_key_replaces_the_old_one(
    database: Database, settings: Settings
) -> None:
    await bootstrap(database, settings)
    await bootstrap(database, replace(settings, admin_key="another-admin-key-42"))
    with pytest.raises(Unauthenticated):
        await KeyRing(database).authenticate(ADMIN_KEY)
    assert (await KeyRing(database).authenticate("another-admin-key-42")).is_operator


async def test_an_unset_admin_key_ends(database: Database, settings: Settings) -> None:
    await bootstrap(database, settings)
    await bootstrap(database, replace(settings, admin_key=""))
    with pytest.raises(Unauthenticated):
        await KeyRing(database).authenticate(ADMIN_KEY)
    await bootstrap(database, settings)
    assert await KeyRing(database).authenticate(ADMIN_KEY)


async def test_setup_makes_an_owner_once(database: Database, settings: Settings) -> None:
    token = await bootstrap(database, settings)
    assert token is not None
    async with database.write() as session:
        user = await redeem_setup(session, token, " Ada@Example.com ", "correct horse battery")
    assert user.email == "ada@example.com"
    assert "correct horse" not in user.password_hash
    async with database.read() as session:
        membership = await session.scalar(select(Membership))
    assert membership is not None
    assert (membership.user_id, membership.role) == (user.id, "owner")
    async with database.write() as session:
        with pytest.raises(Forbidden, match="was used"):
            await redeem_setup(session, token, "eve@example.com", "correct horse battery")
    assert await bootstrap(database, settings) is None  # nobody is invited twice


@pytest.mark.parametrize(
    ("email", "password", "param"),
    [
        ("ada", "long enough password", "email"),
        ("a@b@c", "long enough password", "email"),
        ("ada@" + "x" * 300, "long enough password", "email"),
        ("ada@example.com", "only9char", "password"),
        ("ada@example.com", "x" * 201, "password"),
        ("ada@example.com", "aaaaaaaaaaaa", "password"),
        ("ada@example.com", "Ada@example.com", "password"),
    ],
)
async def test_a_broken_rule_does_not_use_the_link_up(
    database: Database, settings: Settings, email: str, password: str, param: str
) -> None:
    token = await bootstrap(database, settings)
    assert token is not None
    with pytest.raises(InvalidRequest) as caught:
        async with database.write() as session:
            await redeem_setup(session, token, email, password)
    assert caught.value.param == param
    async with database.read() as session:
        assert await is_setup_token(session, token)
        assert await session.scalar(select(User)) is None


async def test_an_invented_token_is_refused(database: Database, settings: Settings) -> None:
    await bootstrap(database, settings)
    async with database.write() as session:
        with pytest.raises(Forbidden):
            await redeem_setup(session, "invented", "ada@example.com", "correct horse battery")


async def test_organizations_have_salts_of_their_own(database: Database) -> None:
    async with database.write() as session:
        first = await create_organization(session, "first")
        second = await create_organization(session, "second")
        assert first.cache_salt != second.cache_salt
        assert not first.is_operator
        assert (await get_organization(session, first.id)).name == "first"


async def test_two_of_a_name_or_address_are_a_conflict(database: Database) -> None:
    """Also where both looked for the other before either was there."""
    async with database.write() as session:
        acme = await create_organization(session, "acme")
        await people.create_person(session, acme.id, "ada@example.com", "-", "owner")
    with pytest.raises(Conflict, match="already an organization named 'acme'"):
        async with database.write() as session:
            await create_organization(session, "acme")
    with pytest.raises(Conflict, match="already an account"):
        async with database.write() as session:
            await people.create_person(session, acme.id, "ada@example.com", "-", "owner")
