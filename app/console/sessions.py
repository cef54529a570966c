"""Who sends a page request: the session cookie, the CSRF token and the `Origin` header.

Sessions themselves are `app.organizations.signins`'s. Two hooks, run before a handler reads
anything: `require_person` for pages of people who are signed in, `require_own_form` for the few
pages before that.
"""

import hmac
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from litestar import Response
from litestar.datastructures import Cookie
from litestar.enums import RequestEncodingType

from app.api.auth import SAFE_METHODS
from app.api.bodies import (
    body_deadline,
    is_streamed,
    may_hold_file,
    receive_form,
    receive_kept,
    remember_sender,
)
from app.console.templating import PageRequest
from app.core.errors import AppError, Forbidden, Unauthenticated
from app.core.security import new_token
from app.organizations.signins import COOKIE, SignedIn, SignIns, host_cookie
from app.settings import Settings

SESSION, FORM = COOKIE, "tapeout_form"
SIGN_IN_PATH = "/console/sign-in"
HOME = "/console/overview"  # where people start


class SignInRequired(AppError):
    """Leads to the sign-in page, and from there back to where the person wanted to go."""

    status, type, default_code = 401, "authentication_error", "signed_out"


async def require_person(request: PageRequest) -> None:
    """Lets only people with a session pass, and their forms only from pages of that session. They
    are looked up again once the form is there: they may be removed while it arrives."""
    check_origin(request)
    person = await authenticate(request)
    if request.method not in SAFE_METHODS:
        if may_hold_file(request):
            await receive_form(request)  # which takes its time
        elif not is_streamed(request):
            await _receive_small_form(request)
        person = await authenticate(request)
        person.require_csrf(await _sent_csrf_token(request))
    request.scope["auth"] = person


async def authenticate(request: PageRequest) -> SignedIn:
    """Who has the request's session, now. Raises `SignInRequired`."""
    sign_ins: SignIns = request.app.state.sign_ins
    try:
        person = await sign_ins.authenticate(session_token(request))
    except Unauthenticated:
        raise SignInRequired("Sign in to go on.") from None
    remember_sender(request, person.principal.organization_id)
    return person


async def _receive_small_form(request: PageRequest) -> None:
    """Only what its sender does has a deadline, not the wait for a thread that takes it apart."""
    is_whole = request.content_type[0] == RequestEncodingType.URL_ENCODED
    async with body_deadline():
        await (receive_kept(request) if is_whole else receive_form(request))
    await receive_form(request)


async def require_own_form(request: PageRequest) -> None:
    """For pages without a session: a form must carry the token that its page set as a cookie."""
    check_origin(request)
    if request.method in SAFE_METHODS:
        return
    await _receive_small_form(request)
    expected = request.cookies.get(_cookie_name(request, FORM), "")
    sent = await _sent_csrf_token(request)
    if not expected or not hmac.compare_digest(expected.encode(), sent.encode()):
        raise Forbidden(
            "This form is out of date, or the browser does not keep cookies for this box. "
            "Reload the page and send it again.",
            code="csrf",
        )


def check_origin(request: PageRequest) -> None:
    """Refuses what another site's page made the browser send. Every browser that this console
    supports says where a form comes from."""
    if request.method in SAFE_METHODS:
        return
    settings: Settings = request.app.state.settings
    origin = request.headers.get("origin", "")
    hosts = {request.headers.get("host", ""), urlsplit(settings.public_url).netloc} - {""}
    if origin:
        is_own = urlsplit(origin).netloc in hosts
    else:
        is_own = request.headers.get("sec-fetch-site") == "same-origin"
    if not is_own:
        raise Forbidden(
            "This form was not sent from a page of this console. If a proxy changes the Host "
            "header, set TAPEOUT_PUBLIC_URL to the address people use.",
            code="foreign_origin",
        )


def signed_in(request: PageRequest) -> SignedIn:
    """The person behind a request that passed `require_person`."""
    person = request.scope["auth"]
    assert isinstance(person, SignedIn), "the route lacks require_person"
    return person


async def form_field(request: PageRequest, name: str) -> str:
    """A text field of the sent form; empty when missing or a file."""
    value: Any = (await receive_form(request)).get(name, "")
    return value if isinstance(value, str) else ""


async def _sent_csrf_token(request: PageRequest) -> str:
    token = request.headers.get("x-csrf-token", "")
    return token if token or is_streamed(request) else await form_field(request, "csrf_token")


# --- cookies ----------------------------------------------------------------------------


def session_cookie(request: PageRequest, person: SignedIn) -> Cookie:
    """The cookie that carries a session, for as long as the session lasts."""
    settings: Settings = request.app.state.settings
    return _cookie(request, SESSION, person.token, settings.session_days * 86400, "lax")


def ended_session_cookie(request: PageRequest) -> Cookie:
    """Makes the browser forget its session."""
    return _cookie(request, SESSION, "", 0, "lax")


def session_token(request: PageRequest) -> str:
    """What the browser sent as its session; empty without one."""
    return request.cookies.get(_cookie_name(request, SESSION), "")


def form_cookie(request: PageRequest) -> Cookie:
    """The token of a form shown to someone without a session; the one they have, if any."""
    token = request.cookies.get(_cookie_name(request, FORM)) or new_token()
    return _cookie(request, FORM, token, 3600, "strict")


def _cookie(
    request: PageRequest, name: str, value: str, max_age: int, samesite: Literal["lax", "strict"]
) -> Cookie:
    return Cookie(
        key=_cookie_name(request, name),
        value=value,
        max_age=max_age,
        path="/",
        httponly=True,
        secure=_is_https(request),
        samesite=samesite,
    )


def _cookie_name(request: PageRequest, name: str) -> str:
    return host_cookie(name, is_https=_is_https(request))


def _is_https(request: PageRequest) -> bool:
    settings: Settings = request.app.state.settings
    return settings.public_url.startswith("https://")


# --- where to go ------------------------------------------------------------------------


def sign_in_location(request: PageRequest) -> str:
    """The sign-in page, remembering the page that was asked for."""
    if request.method != "GET":
        return SIGN_IN_PATH
    query = f"?{request.url.query}" if request.url.query else ""
    return f"{SIGN_IN_PATH}?next={quote(request.url.path + query)}"


def safe_next(target: str) -> str:
    """Where to go after signing in: a page of this console, never another site."""
    parts = urlsplit(target)
    is_own = not parts.scheme and not parts.netloc and parts.path.startswith("/console/")
    return target if is_own and "\\" not in target and target.isprintable() else HOME


def go(request: PageRequest, location: str) -> Response[None]:
    """A redirect after a form; for htmx, an answer that makes it load the page."""
    if request.headers.get("hx-request"):
        return Response(None, status_code=204, headers={"HX-Redirect": location})
    return Response(None, status_code=303, headers={"Location": location})
