"""Resumable uploads over HTTP: tus 1.0 with creation (also with upload), expiration, checksum
and termination. Any tus client works. Where the bytes go: `app.registry.uploads`."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Response, Router, delete, get, head, patch, post
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from app.api import tus
from app.api.auth import allowed, authenticated, bearer_principal, dependencies
from app.api.bodies import TAKES_STREAM
from app.core.errors import InvalidRequest
from app.organizations.principal import Principal
from app.registry.received_file import Checksum
from app.registry.tables import Upload
from app.registry.uploads import UploadStore

AnyRequest = Request[object, object, State]


class OpenUpload(msgspec.Struct, frozen=True, kw_only=True):
    """An upload that bytes are missing of. `expires_at` moves with every piece that arrives."""

    id: str
    filename: str
    length_bytes: int
    received_bytes: int
    created_at: datetime
    expires_at: datetime


class OpenUploads(msgspec.Struct, frozen=True):
    """Newest first."""

    data: list[OpenUpload]


@get("/uploads", summary="List unfinished uploads")
async def list_uploads(request: AnyRequest, principal: NamedDependency[Principal]) -> OpenUploads:
    """What can be gone on with, or discarded. This is no part of tus."""
    store: UploadStore = request.app.state.uploads
    uploads = await store.list_open(principal.organization_id)
    return OpenUploads([msgspec.convert(one, OpenUpload, from_attributes=True) for one in uploads])


@post("/uploads", status_code=201, request_max_body_size=None, summary="Begin an upload")
async def create_upload(
    request: AnyRequest, principal: NamedDependency[Principal]
) -> Response[None]:
    """`Upload-Length` announces the size, `Upload-Metadata` may hold a `filename`; `Location` in
    the answer is the upload's address. A body of the upload's first bytes is taken too."""
    tus.check_version(request)
    store: UploadStore = request.app.state.uploads
    header = tus.metadata_header(request)
    filename = tus.read_metadata(header).get("filename", "")
    checksum = tus.read_checksum(request)
    upload = await store.create(principal, filename, tus.upload_length(request), header)
    if tus.has_piece(request):
        upload = await _first_piece(request, store, upload, checksum)
    headers = {"Location": f"/api/uploads/{upload.id}", **tus.progress(upload)}
    return Response(None, status_code=201, headers=headers)


@head("/uploads/{upload_id:str}", summary="Ask where to go on")
async def show_offset(
    request: AnyRequest, principal: NamedDependency[Principal], upload_id: FromPath[str]
) -> Response[None]:
    """`Upload-Offset` in the answer is how many bytes the box has."""
    return await _offset(request, principal, upload_id)


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
    return await _append(request, principal, upload_id)


@delete("/uploads/{upload_id:str}", status_code=204, summary="Discard an upload")
async def discard_upload(
    request: AnyRequest, principal: NamedDependency[Principal], upload_id: FromPath[str]
) -> Response[None]:
    """Refused while a version is being built of it."""
    return await _discard(request, principal, upload_id)


@post(
    "/uploads/{upload_id:str}",
    status_code=204,
    request_max_body_size=None,
    summary="Any of these, where only POST passes",
)
async def call_by_override(
    request: AnyRequest, principal: NamedDependency[Principal], upload_id: FromPath[str]
) -> Response[None]:
    """`X-HTTP-Method-Override` is the method that is meant: HEAD, PATCH or DELETE."""
    methods = {"HEAD": _offset, "PATCH": _append, "DELETE": _discard}
    meant = request.headers.get("x-http-method-override", "")
    if meant.upper() not in methods:
        raise InvalidRequest(
            "POST here needs X-HTTP-Method-Override: HEAD, PATCH or DELETE.",
            param="X-HTTP-Method-Override",
        )
    return await methods[meant.upper()](request, principal, upload_id)


@HTTPRouteHandler(
    ["/uploads", "/uploads/{upload_id:str}"],
    http_method="OPTIONS",
    status_code=204,
    summary="What tus can do",
)
async def show_abilities(request: Request[Any, Any, State]) -> Response[None]:
    """Versions, extensions and the largest upload."""
    store: UploadStore = request.app.state.uploads
    return Response(None, status_code=204, headers=tus.abilities(store.max_bytes))


# --- what the methods do ----------------------------------------------------------------


async def _offset(request: AnyRequest, principal: Principal, upload_id: str) -> Response[None]:
    tus.check_version(request)
    store: UploadStore = request.app.state.uploads
    upload = await store.get(upload_id, principal.organization_id)
    return Response(None, headers=tus.progress(upload, await store.metadata(upload_id)))


async def _first_piece(
    request: AnyRequest, store: UploadStore, upload: Upload, checksum: Checksum | None
) -> Upload:
    """With the creation. Where it fails, nobody is told where the upload is: it goes."""
    organization_id = upload.organization_id
    try:
        await store.append(upload.id, organization_id, 0, _chunks(request), checksum)
        return await store.get(upload.id, organization_id)
    except BaseException:
        await asyncio.shield(store.delete(upload.id, organization_id))
        raise


async def _append(request: AnyRequest, principal: Principal, upload_id: str) -> Response[None]:
    tus.check_version(request)
    tus.check_content_type(request)
    store: UploadStore = request.app.state.uploads
    offset = tus.byte_count(request, "Upload-Offset")
    checksum = tus.read_checksum(request)
    await store.append(upload_id, principal.organization_id, offset, _chunks(request), checksum)
    upload = await store.get(upload_id, principal.organization_id)
    return Response(None, status_code=204, headers=tus.progress(upload))


def _chunks(request: AnyRequest) -> AsyncIterator[bytes]:
    """Until the key is revoked, at the latest."""

    async def check() -> None:
        (await bearer_principal(request)).require("write")

    return tus.while_allowed(request, check)


async def _discard(request: AnyRequest, principal: Principal, upload_id: str) -> Response[None]:
    tus.check_version(request)
    store: UploadStore = request.app.state.uploads
    await store.delete(upload_id, principal.organization_id)
    return Response(None, status_code=204)


router = Router(
    "/api",
    route_handlers=[
        Router("", route_handlers=[show_abilities]),
        Router(
            "",
            route_handlers=[
                list_uploads,
                create_upload,
                append_bytes,
                discard_upload,
                show_offset,
                call_by_override,
            ],
            guards=[authenticated, allowed("write")],
            opt=TAKES_STREAM,
            dependencies=dependencies,
        ),
    ],
    middleware=[tus.versioned],
    tags=["Uploads"],
)
