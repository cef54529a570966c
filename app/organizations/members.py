"""Who belongs to an organization, in which role, and the end of that.

Owns what may be done to whom. Sessions need no telling: every request looks its membership up.
"""

from datetime import datetime

import msgspec
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import Conflict, Forbidden, InvalidRequest, NotFound
from app.organizations.confirmation import lock_people, reconfirm
from app.organizations.principal import ROLE_MEANINGS, SCOPES_BY_ROLE, Principal
from app.organizations.tables import ROLES, Invitation, Membership, Organization, SignIn, User


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A person in an organization; `created_at` is when they joined it."""

    user_id: str
    email: str
    role: str
    created_at: datetime


class Belonging(msgspec.Struct, frozen=True, kw_only=True):
    """An organization of a person."""

    organization_id: str
    organization_name: str
    role: str


async def list_members(session: AsyncSession, organization_id: str) -> list[Member]:
    """The strongest roles first, then by address."""
    rows = await session.execute(
        select(User.id, User.email, Membership.role, Membership.created_at)
        .join(Membership, Membership.user_id == User.id)
        .where(Membership.organization_id == organization_id)
    )
    members = [
        Member(user_id=user_id, email=email, role=role, created_at=created_at)
        for user_id, email, role, created_at in rows
    ]
    return sorted(members, key=lambda member: (ROLES.index(member.role), member.email))


async def list_belongings(session: AsyncSession, user_id: str) -> list[Belonging]:
    """The organizations of a person, by name."""
    rows = await session.execute(
        select(Organization.id, Organization.name, Membership.role)
        .join(Membership, Membership.organization_id == Organization.id)
        .where(Membership.user_id == user_id)
        .order_by(Organization.name)
    )
    return [
        Belonging(organization_id=organization_id, organization_name=name, role=role)
        for organization_id, name, role in rows
    ]


async def get_member(session: AsyncSession, organization_id: str, user_id: str) -> Member:
    """Raises `NotFound`."""
    members = await list_members(session, organization_id)
    found = next((member for member in members if member.user_id == user_id), None)
    if found is None:
        raise NotFound("There is no such member of your organization.")
    return found


async def change_role(
    session: AsyncSession, principal: Principal, user_id: str, role: str
) -> Member:
    """In force from the member's next request on; open invitations that they made end. Raises
    `Forbidden`, `InvalidRequest`, `NotFound`, and `Conflict` for the last owner."""
    principal = await reconfirm(session, principal)
    membership = await _held(session, principal, user_id)
    await require_power(session, principal, check_role(role))
    require_scopes_of(principal, role)
    if membership.role == "owner" and role != "owner":
        await _require_another_owner(session, principal.organization_id)
    membership.role = role
    await _end_invitations(session, membership)
    return await get_member(session, principal.organization_id, user_id)


async def remove_member(session: AsyncSession, principal: Principal, user_id: str) -> None:
    """Ends their sessions in this organization; keys that they know stay. Raises `Forbidden`,
    `NotFound`, and `Conflict` for the last owner."""
    principal = await reconfirm(session, principal)
    await _end(session, await _held(session, principal, user_id))


async def leave(session: AsyncSession, principal: Principal) -> None:
    """What everybody may do, but for the last owner. Raises `Conflict`."""
    assert principal.user_id is not None, "a key belongs to its organization"
    await lock_people(session, principal.organization_id)
    await _end(session, await _membership(session, principal.organization_id, principal.user_id))


async def require_power(session: AsyncSession, principal: Principal, role: str) -> None:
    """Raises `Forbidden` unless the caller may give or take this role. Owners are made and unmade
    by owners; where there is none yet, by an administrator's key."""
    principal.require("admin")
    if role != "owner" or principal.role == "owner":
        return
    is_first = await num_owners(session, principal.organization_id) == 0
    if principal.user_id is None and is_first:
        return
    raise Forbidden(
        "Only an owner, signed in to the console, makes or removes owners.", code="owner_only"
    )


async def num_owners(session: AsyncSession, organization_id: str) -> int:
    """Without one, nobody can make another but by a key, or by the operator."""
    query = select(func.count()).where(
        Membership.organization_id == organization_id, Membership.role == "owner"
    )
    return await session.scalar(query) or 0


def require_scopes_of(principal: Principal, role: str) -> None:
    """Raises `Forbidden` for a role with rights that the caller lacks: a key of few scopes."""
    if lacking := SCOPES_BY_ROLE[role] - principal.scopes:
        raise Forbidden(
            f"This API key makes nobody {role}: it lacks the scope {min(lacking)!r} itself.",
            code="missing_scope",
            param="role",
        )


def check_role(role: str) -> str:
    """The role itself. Raises `InvalidRequest`."""
    if role not in ROLE_MEANINGS:
        raise InvalidRequest(f"A role is one of: {', '.join(ROLES)}.", param="role")
    return role


async def _held(session: AsyncSession, principal: Principal, user_id: str) -> Membership:
    """The membership, which the caller may change or end."""
    principal.require("admin")
    membership = await _membership(session, principal.organization_id, user_id)
    await require_power(session, principal, membership.role)
    return membership


async def _membership(session: AsyncSession, organization_id: str, user_id: str) -> Membership:
    membership = await session.scalar(
        select(Membership)
        .where(Membership.organization_id == organization_id, Membership.user_id == user_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if membership is None:
        raise NotFound("There is no such member of your organization.")
    return membership


async def _end(session: AsyncSession, membership: Membership) -> None:
    if membership.role == "owner":
        await _require_another_owner(session, membership.organization_id)
    await session.execute(
        delete(SignIn).where(
            SignIn.user_id == membership.user_id,
            SignIn.organization_id == membership.organization_id,
        )
    )
    await _end_invitations(session, membership)
    await session.delete(membership)
    await session.flush()


async def _end_invitations(session: AsyncSession, membership: Membership) -> None:
    """Those that this person made: a link that they kept would let them in again, or higher. The
    operator's people made some into every organization."""
    ended = delete(Invitation).where(Invitation.creator_id == membership.user_id)
    organization = await session.get_one(Organization, membership.organization_id)
    if not organization.is_operator:
        ended = ended.where(Invitation.organization_id == organization.id)
    await session.execute(ended)
    await session.flush()


async def _require_another_owner(session: AsyncSession, organization_id: str) -> None:
    if await num_owners(session, organization_id) < 2:
        raise Conflict("The last owner stays: make another member owner first.", code="last_owner")
