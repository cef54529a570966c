"""Request bodies: decoded against a schema, with errors that name the field; and forms."""

import asyncio
import re
from collections.abc import AsyncGenerator, Generator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.connection import ASGIConnection
from litestar.datastructures import FormMultiDict
from litestar.enums import RequestEncodingType
from litestar.types import HTTPReceiveMessage, WebSocketReceiveMessage

from app.api.arriving import ArrivingBodies, Came
from app.api.forms import FormRequest, Parts
from app.core.errors import AppError, InvalidRequest, TookTooLong, TooLarge
from app.core.storage import is_full
from app.registry.transfers import LEAST_BYTES, STALL_SECONDS, Pace
from app.registry.upload_limits import form_does_not_fit

BODY_SECONDS = 30.0  # for all of a body that is neither an upload nor for a model

FIELDS_BYTES = 64 * 1024  # at most so much of a body for a file is not the file
SMALL_BODY_BYTES = 256 * 1024  # of what is for no model, and has no file
BOOK_BYTES = 4 * 1024**2

# What a route says in its `opt` of a body that may take longer, or be longer. Of the first only a
# form may.
TAKES_FILE = {"body": "a form with a file in it"}
TAKES_BOOK = {"body": "a price book, which may be long"}
TAKES_STREAM = {"body": "received by the handler, as it comes"}

AnyRequest = Request[Any, Any, Any]
Connection = ASGIConnection[Any, Any, Any, Any]
T = TypeVar("T")
_SENDER, _HELD, _CAME = "sender", "held body", "came"  # in a request's state
_AT = re.compile(r"^(?P<problem>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$")


def decode(decoder: "msgspec.json.Decoder[T]", body: bytes, what: str = "The body") -> T:
    """Raises `InvalidRequest` with `param` naming the field that is wrong or missing."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, param = describe(error)
        raise InvalidRequest(message, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{what} is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise nested_too_deeply(what) from None


def nested_too_deeply(what: str = "The body") -> InvalidRequest:
    """JSON whose nesting is deeper than any request's."""
    return InvalidRequest(f"{what} is nested too deeply.", code="invalid_json")


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
def holding_body(request: AnyRequest) -> Generator[None]:
    """Around receiving a body and taking it apart: it waits for that in memory, and counts as
    arriving until then."""
    with ExitStack() as stack:
        state = request.scope["state"]
        state[_HELD] = stack
        stack.callback(state.pop, _HELD)  # nothing that comes later is held by what has ended
        yield


@contextmanager
def _counted(request: AnyRequest) -> Generator[Came]:
    """What is told of the body's bytes, on the account of whoever sends it."""
    state = request.scope["state"]
    sender: str | None = state.get(_SENDER)
    if sender is None:  # somebody who is not signed in, and has the deadline of small bodies
        yield lambda num_bytes: None
        return
    arriving: ArrivingBodies = request.app.state.arriving
    held: ExitStack | None = state.get(_HELD)
    if held is not None:
        state[_CAME] = came = held.enter_context(arriving.counting(sender))
        yield came
    else:
        with arriving.counting(sender) as came:
            yield came


def count_unpacked(request: AnyRequest, num_bytes: int) -> None:
    """What a body that is held came to. Raises `RateLimited`."""
    request.scope["state"][_CAME](num_bytes)


async def receive_body(request: AnyRequest) -> bytes:
    """What a model is asked, however long it is; the caller alone has it, for a request is kept
    while its answer runs, and as long as its connection idles. Raises `RateLimited` where too much
    comes at once and `TookTooLong` where next to nothing of it comes for a while."""
    with _counted(request) as came, _watched(request, came):
        return b"".join([chunk async for chunk in request.stream()])


async def receive_kept(request: AnyRequest) -> None:
    """What is taken apart later, by `receive_form`. Raises as `receive_body` does."""
    with _counted(request) as came, _watched(request, came):
        await request.body()


async def receive_small_body(request: AnyRequest) -> bytes:
    """What is for no model. Raises `TooLarge`, `RateLimited` and `TookTooLong`."""
    is_book = request.route_handler.opt.get("body") == TAKES_BOOK["body"]
    max_bytes = BOOK_BYTES if is_book else SMALL_BODY_BYTES
    refusal = f"The body of this request may have at most {max_bytes:,} bytes."
    with _counted(request) as came:
        return await _receive_at_most(request, max_bytes, refusal, came)


async def receive_fields(request: AnyRequest) -> None:
    """What comes without a file to a route that takes one: large bodies are for files. Raises
    `TooLarge` and `TookTooLong`."""
    refusal = (
        f"A body that is no multipart/form-data may have {FIELDS_BYTES:,} bytes here; "
        "a file is sent in such a form, or through /api/uploads."
    )
    await _receive_at_most(request, FIELDS_BYTES, refusal)


async def _receive_at_most(
    request: AnyRequest, max_bytes: int, refusal: str, counted: Came | None = None
) -> bytes:
    num_bytes = 0

    def came(num_more: int) -> None:
        nonlocal num_bytes
        num_bytes += num_more
        if max(num_bytes, request.content_length or 0) > max_bytes:
            raise TooLarge(refusal)
        if counted is not None:
            counted(num_more)

    async with body_deadline():
        with _watched(request, came):
            return await request.body()


async def receive_form(request: AnyRequest, came: Came | None = None) -> FormMultiDict:
    """The form, whoever made it; `came` counts one that is no request to a model: of that, only
    the file may be large. Raises `InvalidRequest`, `TooLarge`, what `came` or `receive_body`
    does."""
    assert isinstance(request, FormRequest)
    with _receiving_form(request, came):
        return await request.form(None if came is None else FIELDS_BYTES)


async def receive_parts(request: AnyRequest) -> Parts:
    """A form to a model, as bytes. Raises as `receive_form` does."""
    assert isinstance(request, FormRequest)
    with _receiving_form(request, None):
        return await request.parts()


@contextmanager
def _receiving_form(request: AnyRequest, came: Came | None) -> Generator[None]:
    try:
        with _counted(request) as counted, _watched(request, came or counted):
            yield
    except OSError as error:
        if not is_full(error):
            raise
        raise form_does_not_fit() from error


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
