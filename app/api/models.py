"""Models and versions over HTTP: submit an upload to be built, follow it, cancel, delete.

What a model is: `app.registry.service`; what serves it: `app.deployments`.
"""

import asyncio
from collections.abc import AsyncIterator

import msgspec
from litestar import Request, Response, Router, delete, get, post
from litestar.datastructures import State, UploadFile
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.params import FromPath, FromQuery

from app.api.auth import allowed, authenticated, dependencies
from app.api.bodies import TAKES_FILE, decode, receive_form
from app.api.forms import FormRequest
from app.api.model_view import ModelList, ModelState, VersionState, read_models, read_version
from app.api.writing import writing
from app.core.database import Database
from app.core.errors import InvalidRequest, Unprocessable
from app.core.storage import Storage
from app.deployments import service as deployments
from app.deployments.logs import build_log_name, read_log
from app.organizations.principal import Principal
from app.registry import service as registry
from app.registry.input_hints import Said, read_said
from app.registry.uploads import UploadStore

AnyRequest = Request[object, object, State]

MAX_FORM_BYTES = 64 * 1024**2  # of a file sent at once; larger ones go through /api/uploads
FILE_READ_BYTES = 1024**2


class NewVersion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A complete upload of /api/uploads, perhaps one that another version was built of. `inputs`
    says what the model takes where its file does not, one input per line, as in
    `image: float32[batch, 3, 224, 224] in 0..1`. `accepts_loss` lets forms serve that change the
    answers measurably (int8). What is left out is as of the model's last version."""

    upload_id: str
    inputs: str | None = None
    accepts_loss: bool | None = None


_new_version = msgspec.json.Decoder(NewVersion)


@get("/models", guards=[allowed("read")], summary="List models")
async def list_models(request: AnyRequest, principal: NamedDependency[Principal]) -> ModelList:
    """Your organization's models with their newest versions, by name."""
    database: Database = request.app.state.database
    async with database.read() as session:
        return ModelList(await read_models(session, request.app.state.fleet, principal))


@get("/models/{name:str}", guards=[allowed("read")], summary="Show a model")
async def show_model(
    request: AnyRequest, principal: NamedDependency[Principal], name: FromPath[str]
) -> ModelState:
    """A model with its newest version and, under `versions`, all of them."""
    database: Database = request.app.state.database
    async with database.read() as session:
        await registry.get_model(session, principal.organization_id, name)
        (model,) = await read_models(session, request.app.state.fleet, principal, name)
        return model


@post(
    "/models/{name:str}/versions",
    guards=[allowed("write")],
    status_code=202,
    request_max_body_size=MAX_FORM_BYTES,
    opt=TAKES_FILE,
    summary="Build a version of an upload",
)
async def create_version(
    request: AnyRequest, principal: NamedDependency[Principal], name: FromPath[str]
) -> VersionState:
    """JSON `{"upload_id": ...}` of a complete upload, or, for small files, a multipart form with
    the file itself as `file` and the other fields beside it. The file is inspected at once (422
    says what to do about one that cannot be served) and then built; follow the version to see how
    that goes. A build that ends with the code `needs_inputs` wants the same upload again, with
    `inputs`."""
    registry.check_model_name(name)
    if request.content_type[0] == RequestEncodingType.MULTI_PART:
        new, said = await _receive_form(request, principal)
    else:
        new = decode(_new_version, await request.body())
        said = read_said(new.inputs, new.accepts_loss)
    return await _submit(request, principal, name, new.upload_id, said)


@get(
    "/models/{name:str}/versions/{number:int}",
    guards=[allowed("read")],
    summary="Show a version",
)
async def show_version(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    name: FromPath[str],
    number: FromPath[int],
) -> VersionState:
    """How its build goes, what came of it, and whether it serves; and how the search for a faster
    form goes then."""
    return await _version(request, principal, name, number)


@get(
    "/models/{name:str}/versions/{number:int}/log",
    guards=[allowed("read")],
    media_type="text/plain",
    summary="Read a build's log",
)
async def show_build_log(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    name: FromPath[str],
    number: FromPath[int],
    offset: FromQuery[int] = 0,
) -> Response[str]:
    """From a byte offset on (negative: from the end); `X-Next-Offset` is where to go on."""
    database: Database = request.app.state.database
    storage: Storage = request.app.state.storage
    async with database.read() as session:
        version = await registry.get_version(session, principal.organization_id, name, number)
    part = await asyncio.to_thread(read_log, storage.log(build_log_name(version.id)), offset)
    return Response(part.text, headers={"X-Next-Offset": str(part.next_offset)})


@post(
    "/models/{name:str}/versions/{number:int}/cancel",
    guards=[allowed("write")],
    status_code=202,
    summary="Cancel a build",
)
async def cancel_build(
    request: AnyRequest,
    principal: NamedDependency[Principal],
    name: FromPath[str],
    number: FromPath[int],
) -> VersionState:
    """Ends a build that waits or runs. 409 if it is over."""
    database: Database = request.app.state.database
    async with database.read() as session:
        version = await registry.get_version(session, principal.organization_id, name, number)
    await request.app.state.builder.cancel(version.id)
    return await _version(request, principal, name, number)


@delete(
    "/models/{name:str}",
    guards=[allowed("write")],
    summary="Delete a model",
)
async def delete_model(
    request: AnyRequest, principal: NamedDependency[Principal], name: FromPath[str]
) -> None:
    """With its versions, files and endpoint. Usage and receipts stay."""
    state = request.app.state
    async with writing(request, principal, "write") as session:
        removed = await registry.delete_model(session, principal.organization_id, name)
    state.broadcast.publish(deployments.CHANGED)
    await registry.remove_files(state.storage, state.uploads, removed)


# --- steps ------------------------------------------------------------------------------


async def _submit(
    request: AnyRequest, principal: Principal, name: str, upload_id: str, said: Said
) -> VersionState:
    state = request.app.state
    uploads: UploadStore = state.uploads
    try:
        version, inspection = await registry.submit(
            state.database,
            uploads,
            state.storage,
            state.broadcast,
            principal.organization_id,
            name,
            upload_id,
            said,
        )
    except Unprocessable:
        # It will never be accepted, so it should not count against the quota for a day.
        await uploads.delete(upload_id, principal.organization_id)
        raise
    made = await _version(request, principal, name, version.number)
    return msgspec.structs.replace(made, notes=inspection.notes)


async def _version(
    request: AnyRequest, principal: Principal, name: str, number: int
) -> VersionState:
    database: Database = request.app.state.database
    async with database.read() as session:
        return await read_version(session, request.app.state.fleet, principal, name, number)


async def _receive_form(request: AnyRequest, principal: Principal) -> tuple[NewVersion, Said]:
    """The upload made of a form's file, and what is said of it."""
    uploads: UploadStore = request.app.state.uploads
    form = await receive_form(request)
    try:
        inputs = _form_text(form.get("inputs"), "inputs")
        said = read_said(inputs, _form_truth(form.get("accepts_loss"), "accepts_loss"))
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("The form has no file named 'file'.", param="file")
        length_bytes = await _length(file)
        upload = await uploads.create(principal, file.filename, length_bytes)
        await uploads.append(upload.id, principal.organization_id, 0, _chunks(file))
    finally:
        await form.close()
    return NewVersion(upload_id=upload.id), said


def _form_text(value: object, field: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InvalidRequest(f"The form's {field!r} must be one text, not a file.", param=field)


def _form_truth(value: object, field: str) -> bool | None:
    text = (_form_text(value, field) or "").lower()
    if text in ("", "true", "false", "on", "1", "0"):
        return None if not text else text in ("true", "on", "1")
    raise InvalidRequest(f"The form's {field!r} must be true or false.", param=field)


async def _length(file: UploadFile) -> int:
    await asyncio.to_thread(file.file.seek, 0, 2)
    length_bytes = file.file.tell()
    await file.seek(0)
    return length_bytes


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(FILE_READ_BYTES):
        yield chunk


router = Router(
    "/api",
    route_handlers=[
        list_models,
        show_model,
        create_version,
        show_version,
        show_build_log,
        cancel_build,
        delete_model,
    ],
    guards=[authenticated],
    dependencies=dependencies,
    request_class=FormRequest,
    tags=["Models"],
)
