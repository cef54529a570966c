"""The page about oneself: the organizations one belongs to, going to another, leaving, and one's
password."""

from typing import Any

from litestar import Response, Router, get, post

from app.console.sessions import HOME, form_field, go, signed_in
from app.console.templating import PageRequest, page
from app.core.database import Database
from app.core.errors import AppError, InvalidRequest, Unauthenticated
from app.organizations import members, people
from app.organizations.principal import ROLE_MEANINGS
from app.organizations.signins import SignIns

HERE = "/console/account"


@get("/account")
async def show_account(request: PageRequest) -> Response[str]:
    """Who one is here."""
    return await _page(request)


@post("/account/organization", status_code=200)
async def switch(request: PageRequest) -> Response[Any]:
    """Takes this session to another organization of one's own."""
    sign_ins: SignIns = request.app.state.sign_ins
    await sign_ins.switch(signed_in(request), await form_field(request, "organization_id"))
    return go(request, f"{HOME}?notice=switched")


@get("/account/leave")
async def ask_leave(request: PageRequest) -> Response[str]:
    """What leaving does, and the form that does it."""
    return page(request, "account/leave.html")


@post("/account/leave", status_code=200)
async def leave(request: PageRequest) -> Response[Any]:
    """Ends one's own membership here, and its sessions."""
    principal = signed_in(request).principal
    database: Database = request.app.state.database
    try:
        async with database.write() as session:
            await members.leave(session, principal)
    except AppError as error:
        return await _page(request, error=error)
    return go(request, "/console/sign-in?notice=left")


@post("/account/password", status_code=200)
async def change_password(request: PageRequest) -> Response[Any]:
    """Ends one's other sessions."""
    person = signed_in(request)
    sign_ins: SignIns = request.app.state.sign_ins
    old, new = await form_field(request, "old"), await form_field(request, "password")
    address = request.client.host if request.client else ""
    try:
        user = await sign_ins.recognise(person.email, old, address)
        people.check_password(new, person.email)
        await sign_ins.change_password(user, person.token, await people.hashed(new))
    except Unauthenticated:
        error = InvalidRequest("This is not your present password.", param="old")
        return await _page(request, error=error)
    except AppError as error:
        return await _page(request, error=error)
    return go(request, f"{HERE}?notice=password")


async def _page(request: PageRequest, *, error: AppError | None = None) -> Response[str]:
    principal = signed_in(request).principal
    assert principal.user_id is not None, "a session is a person's"
    database: Database = request.app.state.database
    async with database.read() as session:
        belongings = await members.list_belongings(session, principal.user_id)
    return page(
        request,
        "account/account.html",
        status_code=error.status if error else 200,
        belongings=belongings,
        meanings=ROLE_MEANINGS,
        error=error.message if error else "",
        param=(error.param or "") if error else "",
    )


router = Router("", route_handlers=[show_account, switch, ask_leave, leave, change_password])
