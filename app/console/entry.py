"""The pages before a session exists, and its end: set-up and invitations by a one-time link,
signing in, out."""

from typing import Any

from litestar import Response, Router, get, post
from litestar.params import FromPath, FromQuery

from app.console.sessions import (
    HOME,
    ended_session_cookie,
    form_cookie,
    form_field,
    go,
    require_own_form,
    require_person,
    safe_next,
    session_cookie,
    session_token,
    signed_in,
)
from app.console.templating import PageRequest, page
from app.core.database import Database
from app.core.errors import AppError, Forbidden, InvalidRequest, RateLimited, Unauthenticated
from app.organizations.invitations import Invited, find_invited, redeem
from app.organizations.principal import ROLE_MEANINGS
from app.organizations.service import is_setup_token, redeem_setup
from app.organizations.signins import SignedIn, SignIns

MAX_FORM_BYTES = 16 * 1024  # anybody on the network may send these forms


@get("/setup/{token:str}")
async def show_setup(request: PageRequest, token: FromPath[str]) -> Response[str]:
    """The form behind the link that the box prints at its first start."""
    database: Database = request.app.state.database
    async with database.read() as session:
        if not await is_setup_token(session, token):
            raise Forbidden(
                "This set-up link was used, or replaced when the box restarted. The newest one is "
                "in the box's log; if you have an account, sign in."
            )
    return _form(request, "entry/setup.html", email="", errors={}, error="")


@post("/setup/{token:str}", status_code=200)
async def set_up(request: PageRequest, token: FromPath[str]) -> Response[Any]:
    """Makes the first person the owner, and signs them in."""
    email = await form_field(request, "email")
    password = await form_field(request, "password")
    database: Database = request.app.state.database
    try:
        async with database.write() as session:
            user = await redeem_setup(session, token, email, password)
    except InvalidRequest as error:
        errors = {error.param: error.message} if error.param else {}
        message = "" if errors else error.message
        return _form(
            request, "entry/setup.html", status_code=400, email=email, errors=errors, error=message
        )
    sign_ins: SignIns = request.app.state.sign_ins
    return _enter(request, await sign_ins.open(user), HOME)


@get("/invitation/{token:str}")
async def show_invitation(request: PageRequest, token: FromPath[str]) -> Response[str]:
    """The form behind a link that a member made."""
    database: Database = request.app.state.database
    async with database.read() as session:
        invited = await find_invited(session, token)
    return _invitation_form(request, invited, "")


@post("/invitation/{token:str}", status_code=200)
async def join(request: PageRequest, token: FromPath[str]) -> Response[Any]:
    """Lets a person in, with the account they have or a new one, and signs them in."""
    email = await form_field(request, "email")
    password = await form_field(request, "password")
    database: Database = request.app.state.database
    sign_ins: SignIns = request.app.state.sign_ins
    address = request.client.host if request.client else ""
    async with database.read() as session:
        invited = await find_invited(session, token)
    try:
        user = await redeem(database, sign_ins, token, email, password, address)
    except Forbidden:
        raise
    except AppError as error:
        return _invitation_form(request, invited, email, error)
    if old := session_token(request):
        await sign_ins.sign_out(old)
    return _enter(request, await sign_ins.open(user, invited.organization_id), HOME)


def _invitation_form(
    request: PageRequest, invited: Invited, email: str, error: AppError | None = None
) -> Response[str]:
    response = _form(
        request,
        "entry/invitation.html",
        status_code=error.status if error else 200,
        invited=invited,
        meanings=ROLE_MEANINGS,
        email=email,
        errors={error.param: error.message} if error and error.param else {},
        error=error.message if error and not error.param else "",
    )
    if error is not None and error.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(error.retry_after_seconds)
    return response


@get("/sign-in")
async def show_sign_in(request: PageRequest, next: FromQuery[str] = "") -> Response[Any]:
    """The sign-in form; somebody who is signed in goes straight on."""
    target = safe_next(next)
    sign_ins: SignIns = request.app.state.sign_ins
    try:
        await sign_ins.authenticate(session_token(request))
    except Unauthenticated:
        return _form(request, "entry/sign_in.html", email="", error="", next=target)
    return go(request, target)


@post("/sign-in", status_code=200)
async def sign_in(request: PageRequest) -> Response[Any]:
    """A new session, never one that the browser brought along."""
    email = await form_field(request, "email")
    password = await form_field(request, "password")
    target = safe_next(await form_field(request, "next"))
    sign_ins: SignIns = request.app.state.sign_ins
    address = request.client.host if request.client else ""
    try:
        person = await sign_ins.sign_in(email, password, address)
    except (Unauthenticated, RateLimited) as error:
        return _refusal(request, error, email, target)
    if old := session_token(request):
        await sign_ins.sign_out(old)
    return _enter(request, person, target)


@post("/sign-out", status_code=200, before_request=require_person)
async def sign_out(request: PageRequest) -> Response[Any]:
    """Ends the session in the box, not only in the browser."""
    sign_ins: SignIns = request.app.state.sign_ins
    await sign_ins.sign_out(signed_in(request).token)
    response = go(request, "/console/sign-in?notice=signed-out")
    response.set_cookie(ended_session_cookie(request))
    return response


def _enter(request: PageRequest, person: SignedIn, target: str) -> Response[Any]:
    response = go(request, target)
    response.set_cookie(session_cookie(request, person))
    return response


def _refusal(request: PageRequest, error: AppError, email: str, target: str) -> Response[str]:
    response = _form(
        request,
        "entry/sign_in.html",
        status_code=error.status,
        email=email,
        error=error.message,
        next=target,
    )
    if error.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(error.retry_after_seconds)
    return response


def _form(
    request: PageRequest, template: str, *, status_code: int = 200, **context: Any
) -> Response[str]:
    """A page with a form for someone without a session, which its cookie ties to the browser."""
    cookie = form_cookie(request)
    made = page(request, template, status_code=status_code, form_token=cookie.value, **context)
    made.set_cookie(cookie)
    return made


router = Router(
    "",
    route_handlers=[
        show_setup,
        set_up,
        show_invitation,
        join,
        show_sign_in,
        sign_in,
        sign_out,
    ],
    before_request=require_own_form,
    request_max_body_size=MAX_FORM_BYTES,
)
