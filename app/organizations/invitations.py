"""One-time links into an organization: made, listed, revoked, and used.

A link is a secret: it is shown once and stored as a hash. It ends with its use, with its time, and
when it is revoked.
"""

from datetime import datetime, timedelta

import msgspec
from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthenticated
from app.core.ids import new_id
from app.core.security import new_token, token_hash
from app.organizations import people
from app.organizations.confirmation import lock_people, reconfirm
from app.organizations.members import check_role, num_owners, require_power, require_scopes_of
from app.organizations.principal import Principal
from app.organizations.service import get_organization
from app.organizations.signins import SignIns
from app.organizations.tables import Invitation, Membership, Organization, User

PATH = "/console/invitation/"  # of the link, before its token
DEFAULT_HOURS = 72
MAX_HOURS = 30 * 24
MAX_OPEN = 100  # of one organization
MAX_NOTE_CHARS = 80


class Invited(msgspec.Struct, frozen=True, kw_only=True):
    """What a link leads to."""

    organization_id: str
    organization_name: str
    role: str
    expires_at: datetime


async def invite(
    session: AsyncSession, principal: Principal, role: str, note: str, hours: int
) -> tuple[Invitation, str]:
    """A new link's row and token, for somebody the caller may let in; a key's ends with the key.
    Raises `Forbidden`, `InvalidRequest` and `Conflict`."""
    principal = await reconfirm(session, principal)
    await require_power(session, principal, check_role(role))
    require_scopes_of(principal, role)
    return await _add(session, principal.organization_id, role, note, hours, by=principal)


async def invite_owner(
    session: AsyncSession,
    principal: Principal,
    organization_id: str,
    note: str,
    hours: int = DEFAULT_HOURS,
) -> tuple[Invitation, str]:
    """Like `invite`, for the operator's administrators, who let the first owner into any other
    organization: the link takes the place of those that are open. Raises `NotFound` too."""
    principal = await reconfirm(session, principal)
    principal.require_operator()
    if organization_id == principal.organization_id:
        return await invite(session, principal, "owner", note, hours)
    require_scopes_of(principal, "owner")
    await get_organization(session, organization_id)
    await lock_people(session, organization_id)
    if await num_owners(session, organization_id):
        raise Conflict(
            "This organization has an owner, who invites others on the page Members. An owner who "
            "cannot sign in gets a new password on the box: `tapeout reset-password`.",
            code="has_owner",
        )
    await session.execute(
        delete(Invitation).where(
            Invitation.organization_id == organization_id, Invitation.role == "owner"
        )
    )
    return await _add(session, organization_id, "owner", note, hours, by=principal)


async def _add(
    session: AsyncSession, organization_id: str, role: str, note: str, hours: int, *, by: Principal
) -> tuple[Invitation, str]:
    note = note.strip()
    if len(note) > MAX_NOTE_CHARS or not note.isprintable():
        raise InvalidRequest(
            f"A note has at most {MAX_NOTE_CHARS} printable characters.", param="note"
        )
    if not 0 < hours <= MAX_HOURS:
        raise InvalidRequest(f"A link lasts 1 to {MAX_HOURS} hours.", param="hours")
    moment = clock.now()
    mine = Invitation.organization_id == organization_id
    await session.execute(delete(Invitation).where(mine, Invitation.expires_at <= moment))
    if (await session.scalar(select(func.count()).where(mine)) or 0) >= MAX_OPEN:
        raise Conflict(
            f"There are {MAX_OPEN} open invitations already. Revoke some of them first.",
            code="too_many_invitations",
        )
    created_by = by.api_key_name
    if by.user_id is not None:
        created_by = (await session.get_one(User, by.user_id)).email
    token = new_token()
    expires_at = moment + timedelta(hours=hours)
    invitation = Invitation(
        id=new_id("invite"),
        organization_id=organization_id,
        role=role,
        note=note,
        token_hash=token_hash(token),
        created_by=created_by,
        creator_id=by.user_id or by.api_key_id,
        created_at=moment,
        expires_at=expires_at if by.expires_at is None else min(expires_at, by.expires_at),
    )
    session.add(invitation)
    await session.flush()
    return invitation, token


async def list_invitations(session: AsyncSession, organization_id: str) -> list[Invitation]:
    """Those that can still be used, newest first."""
    rows = await session.scalars(
        select(Invitation)
        .where(Invitation.organization_id == organization_id, Invitation.expires_at > clock.now())
        .order_by(Invitation.created_at.desc(), Invitation.id.desc())
    )
    return list(rows)


async def revoke_invitation(
    session: AsyncSession, principal: Principal, invitation_id: str
) -> None:
    """The link leads nowhere from then on. Raises `NotFound`, also for one that was used."""
    (await reconfirm(session, principal)).require("admin")
    removed = await session.execute(
        delete(Invitation)
        .where(
            Invitation.organization_id == principal.organization_id,
            Invitation.id == invitation_id,
        )
        .returning(Invitation.id)
    )
    if removed.first() is None:
        raise NotFound("There is no such invitation: it was used, was revoked, or has ended.")


async def find_invited(session: AsyncSession, token: str) -> Invited:
    """Raises `Forbidden` for a link that leads nowhere, whyever."""
    row = (
        await session.execute(
            select(Invitation, Organization.name)
            .join(Organization, Organization.id == Invitation.organization_id)
            .where(Invitation.token_hash == token_hash(token), Invitation.expires_at > clock.now())
        )
    ).one_or_none()
    if row is None:
        raise _ended()
    invitation, name = row
    return Invited(
        organization_id=invitation.organization_id,
        organization_name=name,
        role=invitation.role,
        expires_at=invitation.expires_at,
    )


async def redeem(
    database: Database, sign_ins: SignIns, token: str, email: str, password: str, address: str
) -> User:
    """Lets somebody in, once: with the account of this e-mail address, or with a new one.

    Raises `Forbidden` for a link that leads nowhere, `InvalidRequest` for what breaks a rule,
    `Conflict` for a member, `RateLimited`; all of them leave the link as it was.
    """
    async with database.read() as session:
        organization_id = (await find_invited(session, token)).organization_id
        email = people.checked_email(email)
        known = await session.scalar(select(User.id).where(User.email == email))
    password_hash, proven = "", None
    if known is None:
        people.check_password(password, email)
        password_hash = await people.hashed(password)
    else:
        proven = await _prove(sign_ins, email, password, address)
    async with database.write() as session:
        await lock_people(session, organization_id)
        if proven is not None:
            await people.confirm_password(session, proven)
        role = await session.scalar(
            delete(Invitation)
            .where(Invitation.token_hash == token_hash(token), Invitation.expires_at > clock.now())
            .returning(Invitation.role)
        )
        if role is None:
            raise _ended()
        if proven is None:
            return await people.create_person(session, organization_id, email, password_hash, role)
        await _join(session, proven, organization_id, role)
        return proven


async def _prove(sign_ins: SignIns, email: str, password: str, address: str) -> User:
    try:
        return await sign_ins.recognise(email, password, address)
    except Unauthenticated:
        raise InvalidRequest(
            "There is an account with this e-mail address, and this is not its password.",
            param="password",
        ) from None


async def _join(session: AsyncSession, user: User, organization_id: str, role: str) -> None:
    session.add(
        Membership(
            id=new_id("member"),
            user_id=user.id,
            organization_id=organization_id,
            role=role,
            created_at=clock.now(),
        )
    )
    try:
        await session.flush()
    except IntegrityError:  # perhaps by another link, at the same time
        raise Conflict(
            "You belong to this organization already. The link can be used by somebody else.",
            code="already_member",
        ) from None


def _ended() -> Forbidden:
    return Forbidden(
        "This invitation was used, was revoked, or has ended. Ask whoever sent it for a new link; "
        "if you have an account, sign in.",
        code="invitation_ended",
    )
