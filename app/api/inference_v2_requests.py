"""Inference requests of the Open Inference Protocol, version 2, read against a model's schema.

JSON, or JSON followed by binary tensors (`Inference-Header-Content-Length` says where they
begin). Owns the refusals; does not run anything.
"""

import math
import struct
from typing import Any

import msgspec
import numpy as np

from app.api import tensors
from app.api.large_bodies import NumbersDecoder
from app.api.predict_bodies import Given, checked_texts
from app.core.errors import InvalidRequest
from runtime.protocol import Manifest, Schema, Tensor, TensorSpec

# The protocol's names for numpy's. Complex numbers have none.
DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
}
MAX_ID_CHARS = 256
MAX_RANK = 32
MAX_SIZE = 2**63  # of an axis
LENGTH = struct.Struct("<I")  # before each element of BYTES
Parameters = dict[str, Any]


class InferInput(msgspec.Struct, frozen=True):
    """`data` is flat, in C order, or nested; absent where `binary_data_size` is a parameter."""

    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters = {}
    data: Any = msgspec.UNSET


class InferOutput(msgspec.Struct, frozen=True):
    """An output to answer with. Parameters: `binary_data`, `classification`."""

    name: str
    parameters: Parameters = {}


class InferRequest(msgspec.Struct, frozen=True):
    """`outputs`: those wanted, all where it is empty. Parameter: `binary_data_output`."""

    inputs: list[InferInput]
    id: str = ""
    parameters: Parameters = {}
    outputs: list[InferOutput] = []


class WantedOutput(msgspec.Struct, frozen=True):
    """`num_classes`: so many of the greatest values as text, instead of the tensor."""

    index: int
    is_binary: bool
    num_classes: int = 0


class Asked(msgspec.Struct, frozen=True):
    id: str
    given: Given
    outputs: list[WantedOutput]


_decoder: NumbersDecoder[InferRequest] = NumbersDecoder(InferRequest)


def datatype_of(spec: TensorSpec) -> str:
    """Raises `InvalidRequest` for numbers that the protocol has no name for."""
    if spec.dtype not in DATATYPES:
        raise InvalidRequest(
            f"{spec.name!r} is of type {spec.dtype}, which this protocol cannot carry; use "
            "POST /models/{name}/predict with npy.",
            code="unsupported_datatype",
        )
    return DATATYPES[spec.dtype]


def read_infer(body: bytes, header_length: str | None, manifest: Manifest, schema: Schema) -> Asked:
    """Raises `InvalidRequest`."""
    json, binary = _split(body, header_length)
    request = _decoder.decode(json)
    if len(request.id) > MAX_ID_CHARS:
        raise InvalidRequest(f"id has more than {MAX_ID_CHARS} characters.", param="id")
    if request.parameters.get("sequence_id"):
        raise InvalidRequest(
            "Sequences (sequence_id) are for stateful models, which this box does not serve.",
            param="parameters.sequence_id",
        )
    chunks = _binary_inputs(request.inputs, binary)
    outputs = _wanted_outputs(request, schema)
    if any(given.datatype == "BYTES" for given in request.inputs):
        return Asked(request.id, Given(texts=_texts(request.inputs, chunks, manifest)), outputs)
    return Asked(request.id, Given(inputs=_tensors(request.inputs, chunks, schema)), outputs)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    text = header_length.strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 16) or int(text) > len(body):
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {text[:40]!r}, but the body has {len(body):,} "
            "bytes; it must be the length of the JSON that the body begins with."
        )
    return body[: int(text)], body[int(text) :]


def _binary_inputs(inputs: list[InferInput], binary: bytes) -> list[bytes | None]:
    """The bytes of each input that has any after the JSON, in the order of the inputs."""
    chunks: list[bytes | None] = []
    at = 0
    for index, given in enumerate(inputs):
        where = f"inputs[{index}]"
        if "shared_memory_region" in given.parameters:
            raise _wrong(where, "lies in shared memory, which this box cannot see; send its data")
        size: Any = given.parameters.get("binary_data_size")
        if size is None:
            if given.data is msgspec.UNSET:
                raise _wrong(where, "has neither data nor the parameter binary_data_size")
            chunks.append(None)
            continue
        if type(size) is not int or size < 0:
            raise _wrong(where, "has a binary_data_size that is no number of bytes")
        if given.data is not msgspec.UNSET:
            raise _wrong(where, "has both data and binary_data_size")
        if at + size > len(binary):
            raise _wrong(
                where,
                f"announces {size:,} bytes, but {len(binary) - at:,} are left after the JSON "
                "(see Inference-Header-Content-Length)",
            )
        chunks.append(binary[at : at + size])
        at += size
    if at != len(binary):
        raise InvalidRequest(
            f"{len(binary) - at:,} bytes after the JSON belong to no input; set "
            "binary_data_size on those that are binary.",
            param="inputs",
        )
    return chunks


# --- inputs -----------------------------------------------------------------------------


def _tensors(inputs: list[InferInput], chunks: list[bytes | None], schema: Schema) -> list[Tensor]:
    """In the schema's order."""
    specs = {spec.name: spec for spec in schema.inputs}
    made: dict[str, Tensor] = {}
    for index, (given, chunk) in enumerate(zip(inputs, chunks, strict=True)):
        where = f"inputs[{index}]"
        spec = specs.get(given.name)
        if spec is None:
            raise _wrong(
                where,
                f"is called {given.name[:80]!r}, but this model takes {', '.join(specs)}",
            )
        if given.name in made:
            raise _wrong(where, f"is the second {given.name!r}")
        made[given.name] = _tensor(given, chunk, spec, schema, where)
    for name, spec in specs.items():
        if name not in made:
            raise InvalidRequest(
                f"The input {name!r} is missing: {datatype_of(spec)} of shape {shape_of(spec)}.",
                param="inputs",
            )
    return tensors.check_rows([made[name] for name in specs], schema)


def shape_of(spec: TensorSpec) -> list[int]:
    """As the protocol writes it: -1 is dynamic."""
    return [-1 if size is None else size for size in spec.shape]


def _tensor(
    given: InferInput, chunk: bytes | None, spec: TensorSpec, schema: Schema, where: str
) -> Tensor:
    datatype = datatype_of(spec)
    # bfloat16 models speak float32 here, which holds every bfloat16.
    is_widened = given.datatype == "BF16" and spec.dtype == "float32"
    if given.datatype != datatype and not is_widened:
        raise _wrong(where, f"is of datatype {given.datatype[:20]!r}; {spec.name!r} is {datatype}")
    _check_sizes(given.shape, where)
    tensors.check_shape(given.shape, spec, schema)
    num_items = math.prod(given.shape)
    if chunk is None:
        array = tensors.array_of_lists(given.data, spec)
        if array.size != num_items:
            raise _wrong(where, f"holds {array.size:,} values; its shape needs {num_items:,}")
        array = tensors.cast_to(array.reshape(given.shape), spec)
        return tensors.tensor_of(array, spec, schema)
    item_bytes = 2 if is_widened else tensors.wire_dtype(spec).itemsize
    if len(chunk) != num_items * item_bytes:
        raise _wrong(
            where,
            f"has {len(chunk):,} bytes of data; its shape and datatype need "
            f"{num_items * item_bytes:,}",
        )
    if is_widened:
        chunk = (np.frombuffer(chunk, "<u2").astype("<u4") << np.uint32(16)).tobytes()
    return Tensor(name=spec.name, dtype=spec.dtype, shape=given.shape, data=chunk)


def _check_sizes(shape: list[int], where: str) -> None:
    """Before anything is multiplied: integers in JSON may have thousands of digits."""
    if len(shape) > MAX_RANK or not all(0 <= size < MAX_SIZE for size in shape):
        shown = tensors.shown_shape(shape[:MAX_RANK])
        raise _wrong(where, f"has a shape that no data has: {shown}")


def _texts(
    inputs: list[InferInput], chunks: list[bytes | None], manifest: Manifest
) -> list[list[str]]:
    """Of one BYTES input of shape [rows], or [rows, 1 or 2]."""
    if len(inputs) != 1:
        raise InvalidRequest("A BYTES input must be the only one: its texts make all the others.")
    (given,), (chunk,) = inputs, chunks
    shape = given.shape
    _check_sizes(shape, "inputs[0]")
    texts = _strings(given.data) if chunk is None else _unpacked_texts(chunk)
    if not 1 <= len(shape) <= 2 or any(size < 1 for size in shape):
        raise _wrong(
            "inputs[0]", f"has shape {tensors.shown_shape(shape)}; texts are [rows] or [rows, 2]"
        )
    if math.prod(shape) != len(texts):
        raise _wrong("inputs[0]", f"holds {len(texts):,} texts; its shape is {shape}")
    width = shape[1] if len(shape) == 2 else 1
    rows = [list(texts[at : at + width]) for at in range(0, len(texts), width)]
    return checked_texts([*rows], manifest)


def _strings(data: Any) -> list[str]:
    """Flat, or one list deep."""
    try:
        rows = msgspec.convert(data, list[str | list[str]])
    except msgspec.ValidationError:
        raise _wrong("inputs[0]", "must hold texts") from None
    return [text for row in rows for text in ([row] if isinstance(row, str) else row)]


def _unpacked_texts(chunk: bytes) -> list[str]:
    """Each has its length before it, 4 bytes, little-endian."""
    texts: list[str] = []
    at = 0
    while at < len(chunk):
        begin = at + LENGTH.size
        end = begin + LENGTH.unpack_from(chunk, at)[0] if begin <= len(chunk) else begin
        if end > len(chunk):
            raise _wrong("inputs[0]", "is cut short within a text")
        try:
            texts.append(chunk[begin:end].decode())
        except UnicodeDecodeError:
            raise _wrong("inputs[0]", "holds a text that is not UTF-8") from None
        at = end
    return texts


# --- outputs ----------------------------------------------------------------------------


def _wanted_outputs(request: InferRequest, schema: Schema) -> list[WantedOutput]:
    """Those asked for, in that order, else all."""
    is_binary = _flag(request.parameters, "binary_data_output", "parameters", default=False)
    if not request.outputs:
        return [WantedOutput(index, is_binary) for index in range(len(schema.outputs))]
    indices = {spec.name: index for index, spec in enumerate(schema.outputs)}
    wanted: list[WantedOutput] = []
    for number, output in enumerate(request.outputs):
        where = f"outputs[{number}]"
        index = indices.pop(output.name, None)
        if index is None:
            names = ", ".join(spec.name for spec in schema.outputs)
            raise _wrong(
                where, f"asks for {output.name[:80]!r} (again); the model gives {names}, once each"
            )
        if "shared_memory_region" in output.parameters:
            raise _wrong(where, "is to go to shared memory, which this box cannot write")
        num_classes: Any = output.parameters.get("classification", 0)
        if type(num_classes) is not int or num_classes < 0:
            raise _wrong(where, "has a classification that is no number of classes")
        is_output_binary = _flag(output.parameters, "binary_data", where, default=is_binary)
        wanted.append(WantedOutput(index, is_output_binary, num_classes))
    return wanted


def _flag(parameters: Parameters, name: str, where: str, *, default: bool) -> bool:
    value: Any = parameters.get(name, default)
    if not isinstance(value, bool):
        raise _wrong(where, f"has a {name} that is neither true nor false")
    return value


def _wrong(where: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{where} {problem}.", param=where)
