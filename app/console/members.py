"""The page Members: who belongs to the organization, in which role; letting people in and out."""

from typing import Any

import msgspec
from litestar import Response, Router, get, post
from litestar.params import FromPath

from app.api.writing import writing
from app.console.sessions import form_field, go, signed_in
from app.console.templating import PageRequest, base_url, page
from app.core.database import Database
from app.core.errors import AppError, InvalidRequest, NotFound
from app.organizations import invitations, members
from app.organizations.principal import ROLE_MEANINGS
from app.organizations.tables import Invitation

HERE = "/console/members"
LASTING = {"24": "A day", "72": "3 days", "168": "A week", "720": "30 days"}


class InvitationForm(msgspec.Struct, frozen=True):
    """What the form holds."""

    role: str = "member"
    note: str = ""
    hours: str = "72"


@get("/members")
async def show_members(request: PageRequest) -> Response[str]:
    """Everybody in the organization, and whom a link waits for."""
    signed_in(request).principal.require("read")
    return await _page(request, InvitationForm())


@post("/members/invitations", status_code=200)
async def invite(request: PageRequest) -> Response[str]:
    """Shows the link in the answer itself: it is kept nowhere that a redirect could reach."""
    principal = signed_in(request).principal
    principal.require("admin")
    form = InvitationForm(
        role=await form_field(request, "role"),
        note=await form_field(request, "note"),
        hours=await form_field(request, "hours"),
    )
    try:
        if form.hours not in LASTING:
            raise InvalidRequest("Choose how long the link lasts from the list.", param="hours")
        async with writing(request, principal, "admin") as session:
            made, token = await invitations.invite(
                session, principal, form.role, form.note, int(form.hours)
            )
    except AppError as error:
        return await _page(request, form, error=error)
    link = f"{base_url(request)}{invitations.PATH}{token}"
    return await _page(request, InvitationForm(), made=made, link=link)


@post("/members/invitations/{invitation_id:str}/revoke", status_code=200)
async def revoke(request: PageRequest, invitation_id: FromPath[str]) -> Response[Any]:
    """The link leads nowhere from then on."""
    principal = signed_in(request).principal
    async with writing(request, principal, "admin") as session:
        await invitations.revoke_invitation(session, principal, invitation_id)
    return go(request, f"{HERE}?notice=invitation-revoked")


@post("/members/{user_id:str}/role", status_code=200)
async def change_role(request: PageRequest, user_id: FromPath[str]) -> Response[Any]:
    """In force from the member's next click on."""
    principal = signed_in(request).principal
    role = await form_field(request, "role")
    try:
        async with writing(request, principal, "admin") as session:
            await members.change_role(session, principal, user_id, role)
    except NotFound:
        raise
    except AppError as error:
        principal.require("admin")
        return await _page(request, InvitationForm(), error=error)
    return go(request, f"{HERE}?notice=role")


@get("/members/{user_id:str}/remove")
async def ask_remove(request: PageRequest, user_id: FromPath[str]) -> Response[str]:
    """What removing somebody does, and the form that does it."""
    principal = signed_in(request).principal
    principal.require("admin")
    database: Database = request.app.state.database
    async with database.read() as session:
        member = await members.get_member(session, principal.organization_id, user_id)
    return page(request, "members/remove.html", member=member)


@post("/members/{user_id:str}/remove", status_code=200)
async def remove(request: PageRequest, user_id: FromPath[str]) -> Response[Any]:
    """Ends the membership and its sessions."""
    principal = signed_in(request).principal
    try:
        async with writing(request, principal, "admin") as session:
            await members.remove_member(session, principal, user_id)
    except NotFound:
        raise
    except AppError as error:
        principal.require("admin")
        return await _page(request, InvitationForm(), error=error)
    if user_id == principal.user_id:
        return go(request, "/console/sign-in?notice=left")
    return go(request, f"{HERE}?notice=removed")


async def _page(
    request: PageRequest,
    form: InvitationForm,
    *,
    error: AppError | None = None,
    made: Invitation | None = None,
    link: str = "",
) -> Response[str]:
    principal = signed_in(request).principal
    may_change = "admin" in principal.scopes
    database: Database = request.app.state.database
    async with database.read() as session:
        people = await members.list_members(session, principal.organization_id)
        waiting: list[Invitation] = []
        if may_change:
            waiting = await invitations.list_invitations(session, principal.organization_id)
    roles = {
        role: meaning
        for role, meaning in ROLE_MEANINGS.items()
        if role != "owner" or principal.role == "owner"
    }
    return page(
        request,
        "members/members.html",
        status_code=error.status if error else 200,
        members=people,
        waiting=waiting,
        may_change=may_change,
        roles=roles,
        meanings=ROLE_MEANINGS,
        lasting=LASTING,
        form=form,
        made=made,
        link=link,
        error=error.message if error else "",
    )


router = Router("", route_handlers=[show_members, invite, revoke, change_role, ask_remove, remove])
