"""The people of the caller's organization over HTTP, and the links that let others in."""

from datetime import datetime

import msgspec
from litestar import Request, Router, delete, get, patch, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from app.api.auth import allowed, authenticated, dependencies
from app.api.writing import writing
from app.core.database import Database
from app.organizations import invitations, members
from app.organizations.members import Member
from app.organizations.principal import Principal
from app.organizations.tables import Invitation
from app.settings import Settings

AnyRequest = Request[object, object, State]


class MemberList(msgspec.Struct, frozen=True):
    members: list[Member]


class RoleChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`role`: owner, admin, member or viewer."""

    role: str


class NewInvitation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`note` says whom it is for, to those who see the list; it lasts `hours`, 720 at most."""

    role: str = "member"
    note: str = ""
    hours: int = invitations.DEFAULT_HOURS


class OpenInvitation(msgspec.Struct, frozen=True, kw_only=True):
    """`created_by` is an e-mail address or the name of a key."""

    id: str
    role: str
    note: str
    created_by: str
    created_at: datetime
    expires_at: datetime


class CreatedInvitation(OpenInvitation, frozen=True, kw_only=True):
    """`url` is shown this once. Whoever opens it first gets in."""

    url: str


class InvitationList(msgspec.Struct, frozen=True):
    invitations: list[OpenInvitation]


@get("/members", guards=[allowed("read")], summary="List members")
async def list_members(request: AnyRequest, principal: NamedDependency[Principal]) -> MemberList:
    """The people of your organization, with their roles."""
    async with _database(request).read() as session:
        return MemberList(await members.list_members(session, principal.organization_id))


@patch("/members/{user_id:str}", guards=[allowed("admin")], summary="Change a member's role")
async def change_role(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    user_id: FromPath[str],
    data: JSONBody[RoleChange],
) -> Member:
    """In force from their next request on. Owners are made and unmade in the console, by owners."""
    async with writing(request, principal, "admin") as session:
        return await members.change_role(session, principal, user_id, data.role)


@delete("/members/{user_id:str}", guards=[allowed("admin")], summary="Remove a member")
async def remove_member(
    request: AnyRequest, principal: NamedDependency[Principal], user_id: FromPath[str]
) -> None:
    """Their sessions in your organization end at once. Keys that they know do not: revoke them."""
    async with writing(request, principal, "admin") as session:
        await members.remove_member(session, principal, user_id)


@get("/members/invitations", guards=[allowed("admin")], summary="List invitations")
async def list_invitations(
    request: AnyRequest, principal: NamedDependency[Principal]
) -> InvitationList:
    """Those that can still be used, newest first; without their links."""
    async with _database(request).read() as session:
        rows = await invitations.list_invitations(session, principal.organization_id)
    return InvitationList([_shown(row) for row in rows])


@post("/members/invitations", guards=[allowed("admin")], summary="Invite somebody")
async def invite(
    request: AnyRequest, principal: NamedDependency[Principal], data: JSONBody[NewInvitation]
) -> CreatedInvitation:
    """A link that lets one person in, once. The box sends nothing: pass it on yourself."""
    settings: Settings = request.app.state.settings
    async with writing(request, principal, "admin") as session:
        row, token = await invitations.invite(session, principal, data.role, data.note, data.hours)
    shown = msgspec.structs.asdict(_shown(row))
    return CreatedInvitation(**shown, url=f"{settings.url}{invitations.PATH}{token}")


@delete(
    "/members/invitations/{invitation_id:str}",
    guards=[allowed("admin")],
    summary="Revoke an invitation",
)
async def revoke_invitation(
    request: AnyRequest, principal: NamedDependency[Principal], invitation_id: FromPath[str]
) -> None:
    """Its link leads nowhere from then on."""
    async with writing(request, principal, "admin") as session:
        await invitations.revoke_invitation(session, principal, invitation_id)


def _database(request: AnyRequest) -> Database:
    return request.app.state.database


def _shown(row: Invitation) -> OpenInvitation:
    names = OpenInvitation.__struct_fields__
    return OpenInvitation(**{name: getattr(row, name) for name in names})


router = Router(
    "/api",
    route_handlers=[
        list_members,
        change_role,
        remove_member,
        list_invitations,
        invite,
        revoke_invitation,
    ],
    guards=[authenticated],
    dependencies=dependencies,
    tags=["Members"],
)
