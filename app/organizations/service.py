"""Organizations: the box's first start, the one-time set-up link, and looking tenants up.

Keys live in `keys.py`, browser sessions in `signins.py`, accounts of people in `people.py`.
"""

import secrets

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, Forbidden, InvalidRequest, NotFound
from app.core.ids import new_id
from app.core.security import new_token, token_hash
from app.organizations import people
from app.organizations.keys import MAX_NAME_CHARS, put_environment_key
from app.organizations.tables import Organization, SetupToken, User
from app.settings import Settings

DEFAULT_NAME = "default"
CACHE_SALT_BYTES = 32


async def bootstrap(database: Database, settings: Settings) -> str | None:
    """Makes the operator's organization and the environment's admin key what they must be.

    Returns a new one-time set-up token while nobody has an account; older ones end with it.
    """
    async with database.write() as session:
        organization = await session.scalar(
            select(Organization).where(Organization.name == DEFAULT_NAME)
        )
        if organization is None:
            organization = await create_organization(session, DEFAULT_NAME, is_operator=True)
        await put_environment_key(session, organization.id, settings.admin_key)
        await session.execute(delete(SetupToken))
        if await people.num_people(session):
            return None
        token = new_token()
        session.add(SetupToken(token_hash=token_hash(token), created_at=clock.now()))
        return token


async def create_organization(
    session: AsyncSession, name: str, *, is_operator: bool = False
) -> Organization:
    """A new tenant with a random cache salt. Its account is opened by billing. Raises `Conflict`
    where there is one of this name."""
    organization = Organization(
        id=new_id("org"),
        name=name,
        cache_salt=secrets.token_bytes(CACHE_SALT_BYTES),
        is_operator=is_operator,
        created_at=clock.now(),
    )
    session.add(organization)
    try:
        await session.flush()
    except IntegrityError:  # two at once
        raise _taken(name) from None
    return organization


async def checked_new_name(session: AsyncSession, name: str) -> str:
    """The name as it is kept. Raises `InvalidRequest`, and `Conflict` where there is one of it."""
    name = name.strip()
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequest(
            f"An organization needs a name of 1 to {MAX_NAME_CHARS} printable characters.",
            param="name",
        )
    query = select(Organization.id).where(Organization.name == name)
    if await session.scalar(query) is not None:
        raise _taken(name)
    return name


def _taken(name: str) -> Conflict:
    return Conflict(f"There is already an organization named {name!r}.", param="name")


async def default_organization_id(session: AsyncSession) -> str:
    """The operator's organization, there from the first start."""
    query = select(Organization.id).where(Organization.name == DEFAULT_NAME)
    return (await session.scalars(query)).one()


async def get_organization(session: AsyncSession, organization_id: str) -> Organization:
    organization = await session.get(Organization, organization_id)
    if organization is None:
        raise NotFound("There is no such organization.")
    return organization


async def is_setup_token(session: AsyncSession, token: str) -> bool:
    """Whether the link can still be used; for showing the form, `redeem_setup` decides."""
    return await session.get(SetupToken, token_hash(token)) is not None


async def redeem_setup(session: AsyncSession, token: str, email: str, password: str) -> User:
    """The first person's account, owner of the operator's organization; uses the token up.

    Raises `Forbidden` for a used or replaced token, `InvalidRequest` for an address or password
    that breaks a rule, which leaves the token valid.
    """
    if not await is_setup_token(session, token):
        raise _used_link()
    email = people.checked_email(email)
    people.check_password(password, email)
    password_hash = await people.hashed(password)
    removed = await session.execute(
        delete(SetupToken)
        .where(SetupToken.token_hash == token_hash(token))
        .returning(SetupToken.token_hash)
    )
    if removed.first() is None or await people.num_people(session):
        raise _used_link()
    organization = await session.scalar(
        select(Organization).where(Organization.name == DEFAULT_NAME)
    )
    assert organization is not None, "bootstrap ran"
    return await people.create_person(session, organization.id, email, password_hash, "owner")


def _used_link() -> Forbidden:
    return Forbidden(
        "This set-up link was used, or replaced when the box restarted. The newest one is in the "
        "box's log.",
        code="setup_link_used",
    )
