"""Errors as JSON: OpenAI's error object for everything that is not a page, but where a route
speaks another protocol.

No answer ever holds a stack trace, a path or anything else of the box's inside.
"""

import logging
import re
import traceback
from collections.abc import Callable
from typing import Any, cast

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from app.api.bodies import nested_too_deeply
from app.core.database import is_about_a_value
from app.core.errors import AppError, TookTooLong, Unstorable
from app.core.ids import new_id

logger = logging.getLogger(__name__)

AnyRequest = Request[Any, Any, Any]
DECODING = "litestar.serialization.msgspec_hooks"
NO_BODY = {"message": "'data'", "key": "data", "source": "body"}  # in Litestar's words
_MISSING = re.compile(r"missing required field `(.*)`")

# Litestar's own refusals, by status: error type, code, and what to say instead of its words.
_KNOWN = {
    400: ("invalid_request_error", "invalid_value", ""),
    401: ("authentication_error", "invalid_api_key", ""),
    403: ("permission_error", "forbidden", ""),
    404: ("invalid_request_error", "unknown_url", "There is nothing at {method} {path}."),
    405: ("invalid_request_error", "method_not_allowed", "{path} does not answer to {method}."),
    413: (
        "invalid_request_error",
        "too_large",
        "The request's body is larger than this route accepts. Models of any size are sent "
        "through resumable uploads (POST /api/uploads).",
    ),
    415: ("invalid_request_error", "unsupported_media_type", ""),
    429: ("rate_limit_error", "rate_limited", ""),
    503: ("server_error", "unavailable", ""),
}


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error, but for those below /v2 and of /v1/messages."""

    error: ErrorDetail


class FlatErrorBody(msgspec.Struct, frozen=True):
    """As the Open Inference Protocol has it, where `error` is the sentence itself. What the other
    errors tell stands beside it."""

    error: str
    type: str
    param: str | None
    code: str | None


class MessagesErrorBody(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    """As Anthropic's clients read it; `error` has Anthropic's type, and our code and param."""

    error: ErrorDetail


# Anthropic's error types, by status. Every other refusal is an invalid request.
_MESSAGES_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def messages_error_body(detail: ErrorDetail, status: int) -> MessagesErrorBody:
    """How an error of `/v1/messages` reads; its streams send it as their last event."""
    kind = _MESSAGES_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return MessagesErrorBody(msgspec.structs.replace(detail, type=kind))


def _body(
    request: AnyRequest, detail: ErrorDetail, status: int
) -> ErrorBody | FlatErrorBody | MessagesErrorBody:
    if request.url.path.startswith("/v1/messages"):
        return messages_error_body(detail, status)
    if request.url.path.startswith("/v2/"):
        return FlatErrorBody(detail.message, detail.type, detail.param, detail.code)
    return ErrorBody(detail)


def error_body(error: AppError) -> ErrorBody:
    """How an error reads on the wire; streams send it as their last event."""
    return ErrorBody(
        ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)
    )


def headers_of(error: AppError) -> dict[str, str]:
    """`Retry-After` where waiting helps. Where a body was given up, the connection ends with the
    answer: who sends at leisure would keep it as long as they like."""
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, TookTooLong):
        headers["Connection"] = "close"
    return headers


def render_app_error(request: AnyRequest, error: AppError) -> Response[Any]:
    """An error of ours."""
    headers = headers_of(error)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(
        _body(request, error_body(error).error, error.status),
        status_code=error.status,
        headers=headers,
        media_type="application/json",
    )


def render_http_error(request: AnyRequest, error: HTTPException) -> Response[Any]:
    """A refusal of the web framework: unknown URL, wrong method, invalid parameter."""
    if error.status_code >= 500 and "disconnected" in error.detail:
        return Response(b"", status_code=499)  # nobody is there to read it
    if error.status_code not in _KNOWN:
        return render_unknown_error(request, error)
    kind, code, template = _KNOWN[error.status_code]
    message = template.format(method=request.method, path=request.url.path) or error.detail
    param: str | None = None
    if isinstance(error, ValidationException):
        message, param = _invalid_parameter(error)
    detail = ErrorDetail(message=message, type=kind, param=param, code=code)
    body = _body(request, detail, error.status_code)
    headers = {
        name: value
        for name, value in (error.headers or {}).items()
        if name.lower() in ("allow", "retry-after", "www-authenticate")
    }
    return Response(
        body, status_code=error.status_code, headers=headers, media_type="application/json"
    )


def render_unknown_error(request: AnyRequest, error: Exception) -> Response[Any]:
    """A fault of ours: logged in full under an id that the caller gets to quote."""
    if isinstance(error, RecursionError) and _is_of_the_body(error):
        return render_app_error(request, nested_too_deeply())
    if is_about_a_value(error):
        return render_app_error(request, Unstorable())
    error_id = new_id("err")
    # The route, as an address can hold names and one-time tokens.
    route = cast("dict[str, Any]", request.scope).get("path_template", "no route")
    logger.error("%s at %s %s", error_id, request.method, route, exc_info=error)
    return render_app_error(request, internal_error(error_id))


def internal_error(error_id: str) -> AppError:
    """A fault of ours, which the log has under this id."""
    return AppError(
        f"Something went wrong inside the box. Its operator finds it in the log as {error_id}."
    )


def _is_of_the_body(error: RecursionError) -> bool:
    """Whether the web framework raised it where it decodes bodies: no other one is the caller's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__") == DECODING


def _invalid_parameter(error: ValidationException) -> tuple[str, str | None]:
    """One line naming the field, from the framework's list of problems."""
    problems: list[dict[str, str]] = error.extra if isinstance(error.extra, list) else []
    if not problems:
        return error.detail, None
    if problems[0] == NO_BODY:
        return "The body is missing: send JSON.", None
    key, message = problems[0].get("key"), problems[0].get("message", error.detail)
    if missing := _MISSING.search(message):
        return f"{missing[1]} is required.", missing[1]
    return (f"{key}: {message}" if key else message), key


# For the application; the console's pages have their own.
EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[AnyRequest, Any], Response[Any]]] = {
    AppError: render_app_error,
    HTTPException: render_http_error,
    Exception: render_unknown_error,
}
