"""Whether a caller may still do what their request began with.

A request is recognised before its rights are used: in between, somebody may remove its sender,
revoke their key, or end their session. What changes anything asks here, first in its own
transaction.

Locks are taken in one order, so that no two transactions wait for each other: the people of the
caller's organization, those of another one, a user, sessions, invitations; then accounts, and all
that is locked under them.
"""

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.errors import Forbidden, Unauthenticated
from app.organizations.principal import SCOPES_BY_ROLE, Principal
from app.organizations.tables import ApiKey, Membership, Organization, SignIn


async def reconfirm(session: AsyncSession, principal: Principal) -> Principal:
    """The caller with the rights they have now, which nobody changes before the end of the
    transaction. To be called first in it. Raises `Forbidden` or `Unauthenticated` where they
    belong to the organization no more."""
    await lock_people(session, principal.organization_id)
    if principal.user_id is None:
        return await _key(session, principal)
    role = await session.scalar(
        select(Membership.role).where(
            Membership.organization_id == principal.organization_id,
            Membership.user_id == principal.user_id,
        )
    )
    if role is None:
        raise Forbidden("You do not belong to this organization any more.", code="no_membership")
    await _require_session(session, principal)
    return msgspec.structs.replace(principal, role=role, scopes=SCOPES_BY_ROLE[role])


async def lock_people(session: AsyncSession, organization_id: str) -> None:
    """Who changes the people or keys of an organization, or acts on rights in it, does it after
    one another. Rows that only refer to the organization are written meanwhile."""
    await session.execute(
        select(Organization.id)
        .where(Organization.id == organization_id)
        .with_for_update(key_share=True)
    )


async def _require_session(session: AsyncSession, principal: Principal) -> None:
    """It may end without a word to the organization: by signing out, or with a new password."""
    found = await session.scalar(
        select(SignIn.id)
        .where(
            SignIn.id == principal.sign_in_id,
            SignIn.organization_id == principal.organization_id,
            SignIn.expires_at > clock.now(),
        )
        .with_for_update(read=True)
    )
    if found is None:
        raise Unauthenticated("Your session is over. Sign in to go on.", code="signed_out")


async def _key(session: AsyncSession, principal: Principal) -> Principal:
    row = await session.execute(
        select(ApiKey.scopes, ApiKey.expires_at).where(
            ApiKey.id == principal.api_key_id, ApiKey.revoked_at.is_(None)
        )
    )
    found = row.one_or_none()
    if found is None or (found.expires_at is not None and found.expires_at <= clock.now()):
        raise Unauthenticated("This API key was revoked, or has expired.")
    return msgspec.structs.replace(
        principal, scopes=frozenset(found.scopes), expires_at=found.expires_at
    )
