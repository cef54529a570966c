"""What a prediction is asked of: JSON, npy, npz, raw bytes, an image, or a form of such parts.

Owns telling bodies apart and the refusals of what a model does not take. Arrays are `npy.py`'s
and `tensors.py`'s; images and texts go to the worker as they come, and are decoded there.
"""

import base64
import binascii
from typing import Any, cast

import msgspec
from litestar import Request

from app.api import tensors
from app.api.bodies import count_unpacked, receive_body, receive_parts
from app.api.compression import unpacked
from app.api.forms import close
from app.api.large_bodies import NUMBERS, NumbersDecoder, check_size
from app.api.npy import NPY, NPZ, read_npy, read_npz
from app.api.threads import LARGE_BODY_BYTES, convert
from app.core.errors import InvalidRequest, UnsupportedMediaType
from runtime.protocol import Manifest, Schema, Tensor

AnyRequest = Request[Any, Any, Any]

RAW = "application/octet-stream"
FORM = "multipart/form-data"
IMAGES = ("image/png", "image/jpeg", "image/webp")
# curl's `-d` says the second, other clients nothing.
JSON = ("application/json", "application/x-www-form-urlencoded", "text/plain", "")
NPY_MAGIC = b"\x93NUMPY"
MAX_TEXTS = 2048  # rows of one request


class PredictRequest(msgspec.Struct, frozen=True):
    """Exactly one of three: `inputs`, by name (checked against the model's schema, not here), or
    of a model that takes them `texts`, each a text or a pair of two; or `image`, a PNG or JPEG
    in base64."""

    inputs: Any = msgspec.UNSET
    texts: list[str | list[str]] | msgspec.UnsetType = msgspec.UNSET
    image: str | msgspec.UnsetType = msgspec.UNSET


class Given(msgspec.Struct, frozen=True):
    """What `Predict` is sent with: one of the three."""

    inputs: list[Tensor] | None = None
    texts: list[list[str]] | None = None
    image: bytes | None = None


class Received(msgspec.Struct, frozen=True):
    """A body that is here whole, and not looked into yet."""

    media_type: str
    content: bytes = b""
    parts: dict[str, bytes] = {}  # of a form


_decoder: NumbersDecoder[PredictRequest] = NumbersDecoder(PredictRequest)
_list_decoder: NumbersDecoder[Any] = NumbersDecoder(Any)


async def receive(request: AnyRequest) -> Received:
    """Waits for the body. Raises `InvalidRequest` or `TooLarge`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        return Received(kind, parts=await _receive_parts(request))
    return Received(kind, await read_bytes(request))


async def read_body(received: Received, manifest: Manifest, schema: Schema) -> Given:
    """Raises `InvalidRequest`, `UnsupportedMediaType` or `TooLarge`."""
    kind, body = received.media_type, received.content
    if kind == FORM:
        return await _of_form(received.parts, schema)
    if kind in JSON:
        return await convert(len(body), lambda: of_json(_decoder.decode(body), manifest, schema))
    if kind == NPY:
        return Given(inputs=await convert(len(body), lambda: _of_npy(body, schema)))
    if kind == NPZ:
        unpacked = LARGE_BODY_BYTES + 1  # a small file may hold much
        return Given(inputs=await convert(unpacked, lambda: _of_npz(body, schema)))
    if kind == RAW:
        return Given(inputs=tensors.tensors_of_bytes(body, schema))
    if kind in IMAGES:
        return Given(image=checked_image(body, schema))
    raise UnsupportedMediaType(
        f"A body of type {kind[:80]!r} is not read here; send {', '.join((JSON[0], NPY, NPZ))}, "
        f"{RAW}, {FORM}, or {', '.join(IMAGES)}."
    )


async def read_bytes(request: AnyRequest) -> bytes:
    """The body, unpacked where `Content-Encoding` says so, to no more than a request may have."""
    body = await receive_body(request)
    encoding = request.headers.get("content-encoding", "")
    if not encoding:
        return body
    max_bytes: int = request.app.state.settings.max_request_bytes
    whole = await convert(max_bytes, lambda: unpacked(body, encoding, max_bytes))
    count_unpacked(request, len(whole))
    return whole


def of_json(body: PredictRequest, manifest: Manifest, schema: Schema) -> Given:
    """Raises `InvalidRequest`."""
    given = [name for name in ("inputs", "texts", "image") if getattr(body, name) is not _UNSET]
    if len(given) != 1:
        said = " and ".join(given) + " exclude each other." if given else "inputs is required."
        raise InvalidRequest(said[0].upper() + said[1:] if given else said, param="inputs")
    if body.inputs is not _UNSET:
        return Given(inputs=tensors.tensors_of(body.inputs, schema))
    if not isinstance(body.texts, msgspec.UnsetType):
        return Given(texts=checked_texts(body.texts, manifest))
    try:
        image = base64.b64decode(cast(str, body.image), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("image must be a PNG or JPEG in base64.", param="image") from None
    return Given(image=checked_image(image, schema))


def checked_texts(texts: list[str | list[str]], manifest: Manifest) -> list[list[str]]:
    """Rows of one text, or of two where the model takes pairs. Raises `InvalidRequest`."""
    if manifest.text is None:
        raise InvalidRequest(
            "This model takes numbers, not texts; send inputs.", param="texts", code="no_texts"
        )
    if not 0 < len(texts) <= MAX_TEXTS:
        raise InvalidRequest(
            f"texts holds {len(texts)} rows; a request takes 1 to {MAX_TEXTS}.", param="texts"
        )
    rows = [[text] if isinstance(text, str) else text for text in texts]
    most = 2 if manifest.text.takes_pairs else 1
    for index, row in enumerate(rows):
        if not 1 <= len(row) <= most:
            takes = "one text, or a pair of two" if most == 2 else "one text"
            raise InvalidRequest(
                f"texts[{index}] has {len(row)} texts; a row of this model is {takes}.",
                param=f"texts[{index}]",
            )
    return rows


def checked_image(image: bytes, schema: Schema) -> bytes:
    """Raises `InvalidRequest` for a model that takes none; the worker looks at the rest."""
    if not takes_image(schema):
        raise InvalidRequest(
            "This model has no input that images fit; send inputs.",
            param="image",
            code="no_images",
        )
    if not image:
        raise InvalidRequest("The image is empty.", param="image")
    return image


def takes_image(schema: Schema) -> bool:
    """Whether an image is all that the model needs."""
    return len(schema.inputs) == 1 and schema.inputs[0].image is not None


def _of_npy(body: bytes, schema: Schema) -> list[Tensor]:
    tensors.only_input(schema, "one array")
    return tensors.tensors_of_array(read_npy(body), schema)


def _of_npz(body: bytes, schema: Schema) -> list[Tensor]:
    return tensors.tensors_of_arrays(read_npz(body), schema)


async def _receive_parts(request: AnyRequest) -> dict[str, bytes]:
    parts: dict[str, bytes] = {}
    received = await receive_parts(request)
    try:
        for name, part in received:
            if name in parts:
                raise InvalidRequest(f"The part {name[:80]!r} comes twice.", param=name[:80])
            parts[name] = part if isinstance(part, bytes) else await part.read()
    finally:
        await close(received)
    return parts


async def _of_form(parts: dict[str, bytes], schema: Schema) -> Given:
    """Parts by the inputs' names: npy files or lists in JSON; or one part that is an image."""
    if len(parts) == 1 and takes_image(schema):
        (part,) = parts.values()
        if _is_image(part):
            return Given(image=part)
    size = sum(map(len, parts.values()))
    return Given(inputs=await convert(size, lambda: _of_parts(parts, schema)))


def _of_parts(parts: dict[str, bytes], schema: Schema) -> list[Tensor]:
    for name, part in parts.items():
        if _is_image(part):
            checked_image(part, schema)
            raise InvalidRequest(f"Beside an image, {name[:80]!r} must be the only part.")
    tensors.check_names(parts, schema)  # the rest is not decoded
    lists = {name: part for name, part in parts.items() if not part.startswith(NPY_MAGIC)}
    given = decode_lists(lists, "The part '{}'")
    for name in parts.keys() - lists.keys():
        given[name] = read_npy(parts[name], f"The part {name[:80]!r}")
    return tensors.tensors_of_values(given, schema)


def decode_lists(texts: dict[str, bytes], what: str) -> dict[str, Any]:
    """The numbers of several inputs, however nested, which are bounded together. `what` says which
    one, of a name. Raises `InvalidRequest`."""
    # Each is decoded only after those before it, so that none hides in another's open text.
    size = check_size(b",".join(texts.values()), NUMBERS, "The form")
    lists: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            lists[name] = _list_decoder.decode(text, what.format(name[:80]), size)
        except InvalidRequest as error:
            error.param = name[:80]
            raise
    return lists


def _is_image(part: bytes) -> bool:
    return part.startswith((b"\x89PNG", b"\xff\xd8\xff")) or (
        part.startswith(b"RIFF") and part[8:12] == b"WEBP"
    )


_UNSET = msgspec.UNSET
