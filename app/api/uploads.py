"""Resumable uploads over HTTP: tus 1.0 with creation (also with upload), expiration, checksum
and termination. Any tus client works. Where the bytes go: `app.registry.uploads`."""

import base64
import binascii
from collections.abc import AsyncIterator
from email.utils import format_datetime
from typing import Any

from litestar import Request, Response, Router, delete, head, patch, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from app.api.auth import allowed, authenticated, dependencies
from app.core.errors import AppError, InvalidRequest
from app.organizations.principal import Principal
from app.registry.tables import Upload
from app.registry.uploads import UploadStore

AnyRequest = Request[object, object, State]

VERSION = "1.0.0"
TUS = {"Tus-Resumable": VERSION}
CONTENT_TYPE = "application/offset+octet-stream"
MAX_METADATA_CHARS = 8192


class UnsupportedVersion(AppError):
    status, type, default_code = 412, "invalid_request_error", "unsupported_tus_version"


class UnsupportedMediaType(AppError):
    status, type, default_code = 415, "invalid_request_error", "unsupported_media_type"


@post("/uploads", status_code=201, request_max_body_size=None, summary="Begin an upload")
async def create_upload(
    request: AnyRequest, principal: NamedDependency[Principal]
) -> Response[None]:
    """`Upload-Length` announces the size, `Upload-Metadata` may hold a `filename`; `Location` in
    the answer is the upload's address. A body of the upload's first bytes is taken too."""
    _check_version(request)
    store: UploadStore = request.app.state.uploads
    metadata = _metadata(request.headers.get("upload-metadata", ""))
    length_bytes = _count(request, "Upload-Length")
    upload = await store.create(principal, metadata.get("filename", ""), length_bytes)
    headers = {**TUS, "Location": f"/api/uploads/{upload.id}", **_expiry(upload)}
    if request.headers.get("content-type") == CONTENT_TYPE:
        offset = await store.append(
            upload.id, principal.organization_id, 0, request.stream(), _checksum(request)
        )
        headers["Upload-Offset"] = str(offset)
    return Response(None, status_code=201, headers=headers)


@head("/uploads/{upload_id:str}", summary="Ask where to go on")
async def show_offset(
    request: AnyRequest, principal: NamedDependency[Principal], upload_id: FromPath[str]
) -> Response[None]:
    """`Upload-Offset` in the answer is how many bytes the box has."""
    _check_version(request)
    store: UploadStore = request.app.state.uploads
    upload = await store.get(upload_id, principal.organization_id)
    headers = {
        **TUS,
        "Upload-Offset": str(upload.received_bytes),
        "Upload-Length": str(upload.length_bytes),
        "Cache-Control": "no-store",
        **_expiry(upload),
    }
    return Response(None, headers=headers)


@patch(
    "/uploads/{upload_id:str}",
    status_code=204,
    request_max_body_size=None,
    summary="Send bytes from an offset on",
)
async def append_bytes(
    request: AnyRequest, principal: NamedDependency[Principal], upload_id: FromPath[str]
) -> Response[None]:
    """`Upload-Offset` must be what the box has. If the connection breaks, what arrived stays.
    `Upload-Checksum: sha256 <base64>` makes the piece count only as a whole."""
    _check_version(request)
    if request.headers.get("content-type") != CONTENT_TYPE:
        raise UnsupportedMediaType(f"The Content-Type must be {CONTENT_TYPE}.")
    store: UploadStore = request.app.state.uploads
    offset = await store.append(
        upload_id,
        principal.organization_id,
        _count(request, "Upload-Offset"),
        _body(request),
        _checksum(request),
    )
    return Response(None, status_code=204, headers={**TUS, "Upload-Offset": str(offset)})


@delete("/uploads/{upload_id:str}", status_code=204, summary="Discard an upload")
async def discard_upload(
    request: AnyRequest, principal: NamedDependency[Principal], upload_id: FromPath[str]
) -> Response[None]:
    """Refused while a version is being built of it."""
    _check_version(request)
    store: UploadStore = request.app.state.uploads
    await store.delete(upload_id, principal.organization_id)
    return Response(None, status_code=204, headers=TUS)


@HTTPRouteHandler("/uploads", http_method="OPTIONS", status_code=204, summary="What tus can do")
async def show_abilities(request: Request[Any, Any, State]) -> Response[None]:
    """Versions, extensions and the largest upload."""
    store: UploadStore = request.app.state.uploads
    headers = {
        **TUS,
        "Tus-Version": VERSION,
        "Tus-Max-Size": str(store.max_bytes),
        "Tus-Extension": "creation,creation-with-upload,expiration,checksum,termination",
        "Tus-Checksum-Algorithm": "sha256",
    }
    return Response(None, status_code=204, headers=headers)


# --- headers ----------------------------------------------------------------------------


def _check_version(request: AnyRequest) -> None:
    if request.headers.get("tus-resumable") != VERSION:
        raise UnsupportedVersion(f"This is tus {VERSION}: send the header Tus-Resumable: {VERSION}")


def _count(request: AnyRequest, header: str) -> int:
    text = request.headers.get(header, "")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequest(f"{header} must be a whole number of bytes.", param=header)
    return int(text)


def _metadata(header: str) -> dict[str, str]:
    """tus: `key base64, key base64`; a key may stand alone."""
    values: dict[str, str] = {}
    if len(header) > MAX_METADATA_CHARS:
        raise InvalidRequest("Upload-Metadata is too long.", param="Upload-Metadata")
    for pair in filter(None, map(str.strip, header.split(","))):
        key, _, encoded = pair.partition(" ")
        try:
            values[key] = base64.b64decode(encoded, validate=True).decode()
        except (binascii.Error, ValueError):
            raise InvalidRequest(
                f"Upload-Metadata: {key[:40]!r} is not base64 of UTF-8.", param="Upload-Metadata"
            ) from None
    return values


def _checksum(request: AnyRequest) -> bytes | None:
    header = request.headers.get("upload-checksum")
    if header is None:
        return None
    algorithm, _, encoded = header.partition(" ")
    try:
        digest = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if algorithm != "sha256" or len(digest) != 32:
        raise InvalidRequest(
            "Upload-Checksum must be `sha256` and the base64 of the digest.",
            param="Upload-Checksum",
        )
    return digest


def _expiry(upload: Upload) -> dict[str, str]:
    if upload.status != "receiving":
        return {}
    return {"Upload-Expires": format_datetime(upload.expires_at, usegmt=True)}


def _body(request: AnyRequest) -> AsyncIterator[bytes]:
    return request.stream()


router = Router(
    "/api",
    route_handlers=[
        Router("", route_handlers=[show_abilities]),
        Router(
            "",
            route_handlers=[create_upload, append_bytes, discard_upload, show_offset],
            guards=[authenticated, allowed("write")],
            dependencies=dependencies,
        ),
    ],
    tags=["Uploads"],
)
