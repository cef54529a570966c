"""The id of a request that is metered: made first, told in every answer, errors included."""

from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException

from app.api.errors import render_app_error, render_http_error, render_unknown_error
from app.core.errors import AppError
from app.core.ids import new_id
from app.core.logs import request_id as current_request_id

AnyRequest = Request[Any, Any, Any]
KEY = "request_id"


def id_headers(request_id: str) -> dict[str, str]:
    """By the names under which OpenAI's clients and Anthropic's look for it."""
    return {"x-request-id": request_id, "request-id": request_id}


def new_request_id(request: AnyRequest) -> str:
    """An id that the error handlers of this module will find, and the log."""
    request_id = new_id("req")
    request.state[KEY] = request_id
    current_request_id.set(request_id)
    return request_id


def _named(request: AnyRequest, response: Response[Any]) -> Response[Any]:
    if (request_id := request.state.get(KEY)) is not None:
        response.headers.update(id_headers(request_id))
    return response


def _app_error(request: AnyRequest, error: AppError) -> Response[Any]:
    return _named(request, render_app_error(request, error))


def _http_error(request: AnyRequest, error: HTTPException) -> Response[Any]:
    return _named(request, render_http_error(request, error))


def _unknown_error(request: AnyRequest, error: Exception) -> Response[Any]:
    return _named(request, render_unknown_error(request, error))


exception_handlers: dict[int | type[Exception], Any] = {
    AppError: _app_error,
    HTTPException: _http_error,
    Exception: _unknown_error,
}
