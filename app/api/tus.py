"""tus 1.0 as headers: what requests say and answers must. For the API and the console's script
alike; what an upload is and where its bytes go is `app.registry.uploads`'s."""

import base64
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import format_datetime
from typing import Any

from litestar import Request
from litestar.datastructures import MutableScopeHeaders
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.core import clock
from app.core.errors import AppError, InvalidRequest, UnsupportedMediaType
from app.registry.received_file import CHECKSUMS, Checksum
from app.registry.tables import Upload

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,expiration,checksum,termination"
CONTENT_TYPE = "application/offset+octet-stream"
MAX_METADATA_CHARS = 8192
CHECK_NS = 1_000_000_000  # as long as keys are believed, too

AnyRequest = Request[Any, Any, Any]


class UnsupportedVersion(AppError):
    """A request of another tus, or of none."""

    status, type, default_code = 412, "invalid_request_error", "unsupported_tus_version"


def versioned(app: ASGIApp) -> ASGIApp:
    """Middleware: every answer, an error too, names the version, and is not kept anywhere."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_versioned(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableScopeHeaders.from_message(message)
                headers["Tus-Resumable"] = VERSION
                headers["Cache-Control"] = "no-store"
                if message["status"] == UnsupportedVersion.status:
                    headers["Tus-Version"] = VERSION
            await send(message)

        await app(scope, receive, send_versioned)

    return wrapped


def abilities(max_bytes: int) -> dict[str, str]:
    """The answer to OPTIONS."""
    return {
        "Tus-Version": VERSION,
        "Tus-Max-Size": str(max_bytes),
        "Tus-Extension": EXTENSIONS,
        "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
    }


def progress(upload: Upload, metadata: str = "") -> dict[str, str]:
    """Of an upload as it is now: the answer to HEAD, and what PATCH and POST take from it."""
    headers = {
        "Upload-Offset": str(upload.received_bytes),
        "Upload-Length": str(upload.length_bytes),
    }
    if metadata:
        headers["Upload-Metadata"] = metadata
    if upload.status == "receiving":
        headers["Upload-Expires"] = format_datetime(upload.expires_at, usegmt=True)
    return headers


async def while_allowed(
    request: AnyRequest, check: Callable[[], Awaitable[object]]
) -> AsyncIterator[bytes]:
    """The body as it comes, for as long as its sender may send it: `check` raises once they may
    not, and is asked again each second before anything more is taken."""
    checked_at_ns = clock.monotonic_ns()
    async for chunk in request.stream():
        now_ns = clock.monotonic_ns()
        if now_ns - checked_at_ns >= CHECK_NS:
            await check()
            checked_at_ns = now_ns
        yield chunk


# --- what requests say ------------------------------------------------------------------


def check_version(request: AnyRequest) -> None:
    """Raises `UnsupportedVersion`."""
    if request.headers.get("tus-resumable") != VERSION:
        raise UnsupportedVersion(f"This is tus {VERSION}: send the header Tus-Resumable: {VERSION}")


def check_content_type(request: AnyRequest) -> None:
    """Raises `UnsupportedMediaType` unless the body is a piece of an upload."""
    if not has_piece(request):
        raise UnsupportedMediaType(f"The Content-Type must be {CONTENT_TYPE}.")


def has_piece(request: AnyRequest) -> bool:
    """Whether the body is a piece of an upload, by its Content-Type."""
    return request.headers.get("content-type", "").partition(";")[0].strip() == CONTENT_TYPE


def upload_length(request: AnyRequest) -> int:
    """Raises `InvalidRequest`, also for a length that is to come later."""
    if "upload-defer-length" in request.headers:
        raise InvalidRequest(
            "The length must be known from the start: send Upload-Length instead of "
            "Upload-Defer-Length.",
            param="Upload-Defer-Length",
        )
    return byte_count(request, "Upload-Length")


def byte_count(request: AnyRequest, header: str) -> int:
    """Raises `InvalidRequest` for what is no whole number."""
    text = request.headers.get(header, "")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequest(f"{header} must be a whole number of bytes.", param=header)
    return int(text)


def metadata_header(request: AnyRequest) -> str:
    """As it came. Raises `InvalidRequest` where it is longer than anybody needs."""
    header = request.headers.get("upload-metadata", "")
    if len(header) > MAX_METADATA_CHARS:
        raise InvalidRequest("Upload-Metadata is too long.", param="Upload-Metadata")
    return header


def read_metadata(header: str) -> dict[str, str]:
    """`key base64, key base64`; a key may stand alone, and none comes twice."""
    values: dict[str, str] = {}
    for pair in filter(None, map(str.strip, header.split(","))):
        key, _, encoded = pair.partition(" ")
        if key in values:
            raise InvalidRequest(
                f"Upload-Metadata: {key[:40]!r} comes twice.", param="Upload-Metadata"
            )
        try:
            values[key] = base64.b64decode(encoded, validate=True).decode()
        except (binascii.Error, ValueError):
            raise InvalidRequest(
                f"Upload-Metadata: {key[:40]!r} is not base64 of UTF-8.", param="Upload-Metadata"
            ) from None
    return values


def read_checksum(request: AnyRequest) -> Checksum | None:
    """Raises `InvalidRequest` for an algorithm that is not offered, and for no digest of it."""
    header = request.headers.get("upload-checksum")
    if header is None:
        return None
    algorithm, _, encoded = header.partition(" ")
    try:
        digest = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != CHECKSUMS.get(algorithm):
        raise InvalidRequest(
            f"Upload-Checksum must be one of {', '.join(CHECKSUMS)} and the base64 of the digest.",
            param="Upload-Checksum",
        )
    return Checksum(algorithm, digest)
