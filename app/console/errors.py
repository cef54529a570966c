"""Errors as pages: what happened, and what to do about it. Never a trace or a path of the box."""

import logging
from collections.abc import Callable
from typing import Any, cast

from litestar import Response
from litestar.exceptions import HTTPException

from app.api.errors import headers_of
from app.console.sessions import SignInRequired, go, sign_in_location
from app.console.templating import PageRequest, page, render
from app.core.database import is_about_a_value
from app.core.errors import AppError, Unstorable
from app.core.ids import new_id

logger = logging.getLogger(__name__)

TITLES = {
    400: "That cannot be done as asked",
    401: "Please sign in",
    403: "Not allowed",
    404: "There is nothing here",
    405: "That cannot be done here",
    408: "That took too long",
    409: "That is in conflict with something else",
    413: "Too large",
    422: "Refused",
    429: "Too many attempts",
    503: "Not available right now",
    507: "The disk is full",
}
# For what the framework itself refuses, whose own words are not for people.
MESSAGES = {
    404: "This address leads nowhere. It may have been typed wrong, or what it showed is gone.",
    405: "Go back and use the page's own buttons.",
    413: "What was sent is larger than this form accepts. Large models go through the upload page "
    "with JavaScript on, or through `tapeout push`.",
}


def is_page(request: PageRequest) -> bool:
    """Whether an error is to be shown as a page, because a person is looking: everything below
    `/console`, and what a browser asks for elsewhere that does not exist."""
    path = request.url.path
    if path == "/" or path == "/console" or path.startswith("/console/"):
        return True
    return "text/html" in request.headers.get("accept", "") and not path.startswith(
        ("/v1/", "/v2/", "/api/")
    )


def render_app_error(request: PageRequest, error: AppError) -> Response[Any]:
    """An error of ours, in its own words."""
    if isinstance(error, SignInRequired):
        return go(request, sign_in_location(request))
    return _error_page(request, error.status, error.message, headers_of(error))


def render_http_error(request: PageRequest, error: HTTPException) -> Response[Any]:
    """A refusal of the web framework: unknown page, wrong method, body too large."""
    status = error.status_code
    if status >= 500:
        return render_unknown_error(request, error)
    return _error_page(request, status, MESSAGES.get(status, "Go back and try again."), {})


def render_unknown_error(request: PageRequest, error: Exception) -> Response[Any]:
    """A fault of ours: logged in full under an id that the person gets to quote."""
    if is_about_a_value(error):
        return render_app_error(request, Unstorable())
    error_id = new_id("err")
    # The route, as an address can hold names and one-time tokens.
    route = cast("dict[str, Any]", request.scope).get("path_template", "no route")
    logger.error("%s at %s %s", error_id, request.method, route, exc_info=error)
    return page(request, "errors/fault.html", status_code=500, error_id=error_id, notice=None)


def _error_page(
    request: PageRequest, status: int, message: str, headers: dict[str, str]
) -> Response[Any]:
    title = TITLES.get(status, TITLES[400])
    if request.headers.get("hx-request"):
        html = render("errors/_alert.html", title=title, message=message)
        made = Response(html, status_code=status, media_type="text/html; charset=utf-8")
    else:
        made = page(
            request,
            "errors/error.html",
            status_code=status,
            title=title,
            message=message,
            status=status,
            notice=None,
        )
    for name, value in headers.items():
        made.headers[name] = value
    return made


# For the console's routers; the application sends errors here too where `is_page` says so.
exception_handlers: dict[int | type[Exception], Callable[[PageRequest, Any], Response[Any]]] = {
    AppError: render_app_error,
    HTTPException: render_http_error,
    Exception: render_unknown_error,
}
