"""The upload page: a plain form for small files, and the tus 1.0 protocol for its script.

The same protocol as under `/api`, but for people: session and CSRF token instead of a key, and
errors as pages. What an upload is and where its bytes go is `app.registry.uploads`'s.
"""

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from litestar import Response, Router, delete, get, head, patch, post
from litestar.datastructures import UploadFile
from litestar.params import FromPath, FromQuery

from app.api import tus
from app.api.bodies import (
    FIELDS_BYTES,
    TAKES_FILE,
    TAKES_STREAM,
    length_of_file,
    may_hold_file,
    receive_form,
)
from app.console.sessions import (
    authenticate,
    check_origin,
    form_field,
    go,
    require_person,
    signed_in,
)
from app.console.templating import PageRequest, base_url, page
from app.core.database import Database
from app.core.errors import AppError, InvalidRequest, NotFound, Unprocessable
from app.registry import service as registry
from app.registry.input_hints import read_said, show_inputs
from app.registry.tables import ModelVersion, Upload
from app.registry.uploads import UploadGone, UploadStore
from app.settings import Settings
from runtime.protocol import BuildHints

PLAIN_FORM_BYTES = 512 * 1024**2  # the form without a script holds the file in a temporary one
CHUNK_BYTES = 1024**2


@get("/upload")
async def show_upload(request: PageRequest, name: FromQuery[str] = "") -> Response[str]:
    """The form; `name` is a model that gets a new version."""
    signed_in(request).principal.require("write")
    return await _upload_page(request, name)


async def admit_plain_form(request: PageRequest) -> None:
    """Before anything of the form is read: whether its sender may upload, and there is room."""
    check_origin(request)
    person = await authenticate(request)
    person.principal.require("write")
    num_bytes = tus.byte_count(request, "Content-Length")
    if may_hold_file(request):
        uploads: UploadStore = request.app.state.uploads
        num_bytes = length_of_file(request, uploads.max_bytes)
        async with uploads.receiving_form(person.principal, num_bytes) as arriving:
            await receive_form(request, arriving.came)
    elif num_bytes > FIELDS_BYTES:
        raise InvalidRequest("A form with a file must be sent as multipart/form-data.")
    await require_person(request)


@post(
    "/upload",
    status_code=200,
    request_max_body_size=PLAIN_FORM_BYTES,
    before_request=admit_plain_form,
    opt=TAKES_FILE,
)
async def send_plain_form(request: PageRequest) -> Response[Any]:
    """Upload and build in one request, for browsers without JavaScript."""
    principal = signed_in(request).principal
    principal.require("write")
    name = (await form_field(request, "name")).strip()
    file: Any = (await request.form()).get("file")
    try:
        if not isinstance(file, UploadFile) or not file.filename:
            raise InvalidRequest("Choose a file first.", param="file")
        registry.check_model_name(name)
        upload = await _store(request, file)
        version = await submit(request, name, upload.id)
    except AppError as error:
        if error.status >= 500:
            raise
        return await _upload_page(request, name, error)
    return go(request, f"/console/models/{name}/versions/{version.number}")


@post("/versions", status_code=200)
async def create_version(request: PageRequest) -> Response[Any]:
    """Queues a complete upload to be built, and leads to its model's page."""
    signed_in(request).principal.require("write")
    name = (await form_field(request, "name")).strip()
    version = await submit(request, name, await form_field(request, "upload_id"))
    return go(request, f"/console/models/{name}/versions/{version.number}")


async def _store(request: PageRequest, file: UploadFile) -> Upload:
    uploads: UploadStore = request.app.state.uploads
    principal = signed_in(request).principal
    file.file.seek(0, 2)
    num_bytes = file.file.tell()
    await file.seek(0)
    upload = await uploads.create(principal, file.filename, num_bytes)
    await uploads.append(upload.id, principal.organization_id, 0, _chunks(file))
    return upload


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(CHUNK_BYTES):
        yield chunk


async def submit(request: PageRequest, name: str, upload_id: str) -> ModelVersion:
    """Inspects and queues, with what the form says of the model; what can never be served does
    not keep its place on the disk."""
    inputs: str | None = (await form_field(request, "inputs")).strip()
    # A field that was empty from the start says nothing; one that was emptied says: no longer.
    if not inputs and not await form_field(request, "had_inputs"):
        inputs = None
    said = read_said(inputs, bool(await form_field(request, "accepts_loss")))
    state = request.app.state
    organization_id = signed_in(request).principal.organization_id
    database: Database = state.database
    uploads: UploadStore = state.uploads
    try:
        version, _ = await registry.submit(
            database,
            uploads,
            state.storage,
            state.broadcast,
            organization_id,
            name,
            upload_id,
            said,
        )
    except Unprocessable:
        await uploads.delete(upload_id, organization_id)
        raise
    return version


async def _upload_page(
    request: PageRequest, name: str, error: AppError | None = None
) -> Response[str]:
    """Filled in with what was sent, or else with what is known of the model `name`."""
    settings: Settings = request.app.state.settings
    uploads: UploadStore = request.app.state.uploads
    if error is not None:
        inputs = await form_field(request, "inputs")
        accepts_loss = bool(await form_field(request, "accepts_loss"))
        had_inputs = bool(await form_field(request, "had_inputs"))
    else:
        hints = await _last_hints(request, name)
        inputs, accepts_loss = show_inputs(hints.inputs), hints.accepts_loss
        had_inputs = bool(inputs)
    return page(
        request,
        "uploads/upload.html",
        status_code=error.status if error else 200,
        name=name,
        inputs=inputs,
        accepts_loss=accepts_loss,
        had_inputs=had_inputs,
        error=error.message if error else "",
        base_url=base_url(request),
        max_bytes=settings.max_upload_bytes,
        unfinished=await uploads.list_open(signed_in(request).principal.organization_id),
    )


async def _last_hints(request: PageRequest, name: str) -> BuildHints:
    """Of the newest version; of no model, none."""
    database: Database = request.app.state.database
    organization_id = signed_in(request).principal.organization_id
    try:
        async with database.read() as session:
            versions = await registry.list_versions(session, organization_id, name)
    except NotFound:
        return BuildHints()
    return registry.version_hints(versions[0]) if versions else BuildHints()


@post("/uploads/{upload_id:str}/discard", status_code=200)
async def discard_by_form(request: PageRequest, upload_id: FromPath[str]) -> Response[Any]:
    """From the list of unfinished uploads."""
    principal = signed_in(request).principal
    principal.require("write")
    uploads: UploadStore = request.app.state.uploads
    with suppress(UploadGone):
        await uploads.delete(upload_id, principal.organization_id)
    return go(request, "/console/upload")


# --- tus --------------------------------------------------------------------------------


@post("/uploads", status_code=201)
async def begin_upload(request: PageRequest) -> Response[None]:
    """tus creation. The model's name comes along, so that a bad one is refused before the file
    has travelled."""
    tus.check_version(request)
    header = tus.metadata_header(request)
    metadata = tus.read_metadata(header)
    registry.check_model_name(metadata.get("name", ""))
    uploads: UploadStore = request.app.state.uploads
    upload = await uploads.create(
        signed_in(request).principal,
        metadata.get("filename", ""),
        tus.upload_length(request),
        header,
    )
    headers = {"Location": f"/console/uploads/{upload.id}", **tus.progress(upload)}
    return Response(None, status_code=201, headers=headers)


@head("/uploads/{upload_id:str}")
async def upload_offset(request: PageRequest, upload_id: FromPath[str]) -> Response[None]:
    """Where to go on."""
    tus.check_version(request)
    uploads: UploadStore = request.app.state.uploads
    upload = await uploads.get(upload_id, signed_in(request).principal.organization_id)
    return Response(None, headers=tus.progress(upload, await uploads.metadata(upload_id)))


@patch("/uploads/{upload_id:str}", status_code=204, request_max_body_size=None)
async def append_to_upload(request: PageRequest, upload_id: FromPath[str]) -> Response[None]:
    """Bytes from an offset on; they stay, whatever cuts the connection."""
    tus.check_version(request)
    tus.check_content_type(request)
    principal = signed_in(request).principal
    principal.require("write")
    uploads: UploadStore = request.app.state.uploads
    offset = tus.byte_count(request, "Upload-Offset")
    checksum = tus.read_checksum(request)
    organization_id = principal.organization_id
    chunks = tus.while_allowed(request, lambda: _require_sender(request, organization_id))
    await uploads.append(upload_id, organization_id, offset, chunks, checksum)
    upload = await uploads.get(upload_id, organization_id)
    return Response(None, status_code=204, headers=tus.progress(upload))


async def _require_sender(request: PageRequest, organization_id: str) -> None:
    """Raises for who was removed, or may no longer upload; and for who went to another
    organization, where this upload is not: of what they may here nothing is known any more."""
    principal = (await authenticate(request)).principal
    principal.require("write")
    if principal.organization_id != organization_id:
        raise NotFound("There is no such upload in your organization.", code="upload_not_found")


@delete("/uploads/{upload_id:str}", status_code=204)
async def discard_upload(request: PageRequest, upload_id: FromPath[str]) -> Response[None]:
    """tus termination."""
    tus.check_version(request)
    principal = signed_in(request).principal
    principal.require("write")
    uploads: UploadStore = request.app.state.uploads
    await uploads.delete(upload_id, principal.organization_id)
    return Response(None, status_code=204)


router = Router(
    "",
    route_handlers=[
        show_upload,
        send_plain_form,
        create_version,
        discard_by_form,
        Router(
            "",
            route_handlers=[begin_upload, upload_offset, append_to_upload, discard_upload],
            middleware=[tus.versioned],
            opt=TAKES_STREAM,
        ),
    ],
)
