"""Request bodies: decoded against a schema, with errors that name the field; and forms."""

import asyncio
import re
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.connection import ASGIConnection
from litestar.datastructures import FormMultiDict
from litestar.enums import RequestEncodingType
from litestar.exceptions import ClientException
from litestar.types import HTTPReceiveMessage, WebSocketReceiveMessage

from app.api.arriving import ArrivingBodies, Came
from app.core.errors import AppError, InvalidRequest, TookTooLong, TooLarge
from app.core.storage import is_full
from app.registry.transfers import LEAST_BYTES, STALL_SECONDS, Pace
from app.registry.upload_limits import form_does_not_fit

BODY_SECONDS = 30.0  # for all of a body that is neither an upload nor for a model

FIELDS_BYTES = 64 * 1024  # at most so much of a body for a file is not the file

# What a route says in its `opt` of a body that may take longer. Of the first only a form may.
TAKES_FILE = {"body": "a form with a file in it"}
TAKES_STREAM = {"body": "received by the handler, as it comes"}

AnyRequest = Request[Any, Any, Any]
Connection = ASGIConnection[Any, Any, Any, Any]
T = TypeVar("T")
_SENDER = "sender"
_AT = re.compile(r"^(?P<problem>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$")


def decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Raises `InvalidRequest` with `param` naming the field that is wrong or missing."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, param = describe(error)
        raise InvalidRequest(message, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise nested_too_deeply() from None


def nested_too_deeply() -> InvalidRequest:
    """JSON whose nesting is deeper than any request's."""
    return InvalidRequest("The body is nested too deeply.", code="invalid_json")


@asynccontextmanager
async def body_deadline() -> AsyncGenerator[None]:
    """Around reading a body that is small: one that trickles in would hold its connection, and
    what was found out about its sender, for as long as they like. Raises `TookTooLong`."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            yield
    except TimeoutError:
        raise TookTooLong(
            f"The body of this request took more than {BODY_SECONDS:.0f} seconds to arrive. "
            "Send it again."
        ) from None


def takes_file(request: AnyRequest) -> bool:
    """Whether the route takes a form with a file in it."""
    return request.route_handler.opt.get("body") == TAKES_FILE["body"]


def may_hold_file(request: AnyRequest) -> bool:
    """Whether the body is a form with a file in it, on a route that takes one."""
    return takes_file(request) and request.content_type[0] == RequestEncodingType.MULTI_PART


def length_of_file(request: AnyRequest, max_bytes: int) -> int:
    """Of a form that nothing was read of: what its length leaves for the file or, where it has
    none, the largest that may be in it."""
    length_bytes = request.content_length
    most_bytes = request.route_handler.resolve_request_max_body_size()
    assert most_bytes is not None, "only streams have no limit"
    if length_bytes is None:
        return min(most_bytes, max_bytes)
    return max(min(length_bytes, most_bytes) - FIELDS_BYTES, 1)


def is_streamed(request: AnyRequest) -> bool:
    """Whether nobody but the handler receives anything of the body."""
    return request.route_handler.opt.get("body") == TAKES_STREAM["body"]


def remember_sender(connection: Connection, organization_id: str) -> None:
    """Whose body it is that is received from here on."""
    connection.scope["state"][_SENDER] = organization_id


@contextmanager
def _counted(request: AnyRequest) -> Generator[Came]:
    """What is told of the body's bytes, on the account of whoever sends it."""
    sender: str | None = request.scope["state"].get(_SENDER)
    if sender is None:  # somebody who is not signed in, and has the deadline of small bodies
        yield lambda num_bytes: None
        return
    arriving: ArrivingBodies = request.app.state.arriving
    with arriving.counting(sender) as came:
        yield came


async def receive_body(request: AnyRequest) -> bytes:
    """What a model is asked, however long it is. Raises `RateLimited` where too much comes at once
    and `TookTooLong` where next to nothing of it comes for a while."""
    with _counted(request) as came, _watched(request, came):
        return await request.body()


async def receive_fields(request: AnyRequest) -> None:
    """What comes without a file to a route that takes one: large bodies are for files. Raises
    `TooLarge` and `TookTooLong`."""
    num_bytes = 0

    def came(num_more: int) -> None:
        nonlocal num_bytes
        num_bytes += num_more
        if max(num_bytes, request.content_length or 0) > FIELDS_BYTES:
            raise TooLarge(
                f"A body that is no multipart/form-data may have {FIELDS_BYTES:,} bytes here; "
                "a file is sent in such a form, or through /api/uploads."
            )

    async with body_deadline():
        with _watched(request, came):
            await request.body()


async def receive_form(request: AnyRequest, came: Came | None = None) -> FormMultiDict:
    """The form, whoever made it; `came` counts one that is no request to a model. Raises
    `InvalidRequest`, `TooLarge`, what `came` or `receive_body` does."""
    try:
        with _counted(request) as counted, _watched(request, came or counted):
            return await request.form()
    except (LookupError, ValueError):  # of a charset that there is not, or of bytes not in it
        raise InvalidRequest(
            "A part of the form without a file name must be text in UTF-8."
        ) from None
    except OSError as error:
        if not is_full(error):
            raise
        raise form_does_not_fit() from error
    except ClientException as error:
        if error.status_code != 400:
            raise
        if "Large" in error.detail:  # the framework's word for the number of parts, too
            limit = request.app.multipart_form_part_limit
            raise TooLarge(
                f"The form has more than {limit:,} parts or too long headers; send one part for "
                "each field."
            ) from None
        raise InvalidRequest(
            "The form is no multipart/form-data that can be read: send it with the boundary that "
            "its Content-Type names, and every part whole."
        ) from None


@contextmanager
def _watched(request: AnyRequest, came: Came) -> Generator[None]:
    """Only the wait for the sender counts, not the work on what they sent. A body that stalls, or
    that `came` refuses, ends there for whoever takes it apart, who then closes a form's temporary
    files."""
    receive = request.receive
    pace = Pace(STALL_SECONDS)
    failure: AppError | None = None

    async def receive_watched() -> HTTPReceiveMessage | WebSocketReceiveMessage:
        nonlocal failure
        try:
            async with pace.waiting():
                message = await receive()
            if message["type"] == "http.request":
                pace.came(len(message["body"]))
                came(len(message["body"]))
            return message
        except TimeoutError:
            failure = TookTooLong(
                f"Less than {LEAST_BYTES // 1024} KiB of this body came in {STALL_SECONDS:.0f} "
                "seconds. Send it again."
            )
        except AppError as error:
            failure = error
        return {"type": "http.request", "body": b"", "more_body": False}

    request.receive = receive_watched
    try:
        yield
    finally:
        request.receive = receive
        if failure is not None:
            raise failure from None


def describe(error: msgspec.ValidationError) -> tuple[str, str | None]:
    """A sentence and the field's path, such as `messages[0].role`."""
    problem, path = str(error), ""
    if located := _AT.match(problem):
        problem, path = located["problem"], located["path"].removeprefix(".")
    if missing := _MISSING.match(problem):
        path = f"{path}.{missing['field']}" if path else missing["field"]
        return f"{path} is required.", path
    if not path:
        return f"{problem}.", None
    return f"{path}: {problem[0].lower()}{problem[1:]}.", path
