"""Whether what a build reports can be believed, stored and served.

A build runs somebody's code, so its manifest and receipt are claims: bounded, finite, printable
and consistent, or the version is refused.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import msgspec

from app.deployments.logs import clean_text
from runtime.protocol import BuildReceipt, Built, DecoderInfo, EmbedderInfo, Manifest, Schema

MAX_STORED_BYTES = 4 * 1024**2  # of manifest and receipt together, as JSON
MAX_STRING_CHARS = 8_192
MAX_INTEGER = 2**53  # beyond it JSON readers round
MAX_TENSORS = 256
MAX_DIMENSIONS = 32
MAX_VOCAB_SIZE = 16_000_000
MAX_CONTEXT_TOKENS = 100_000_000
MAX_TOOL_FACTOR = 16
MAX_TEMPLATE_TOKENS = 100_000
MAX_EMBEDDING_DIMENSIONS = 1_000_000  # at least one vector fits a frame


class NotAcceptable(Exception):
    """The build's result contradicts itself or cannot be kept. The message says what is wrong."""


def check_built(built: Built) -> None:
    """Raises `NotAcceptable`."""
    stored = {"manifest": manifest_json(built.manifest), "receipt": receipt_json(built.receipt)}
    for value in _leaves(stored):
        _check_leaf(value)
    if len(msgspec.json.encode(stored)) > MAX_STORED_BYTES:
        raise NotAcceptable("its manifest and receipt are too large")
    _check_manifest(built.manifest)
    if built.receipt.verdict == "different":
        raise NotAcceptable("its proof found that the served form answers differently")
    durations = [
        *built.receipt.phase_seconds.values(),
        *(candidate.device_ms_max for candidate in built.receipt.candidates),
    ]
    if any(duration < 0 for duration in durations):
        raise NotAcceptable("it reports negative durations")


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """As stored in the version's row."""
    return msgspec.to_builtins(manifest, str_keys=True)


def receipt_json(receipt: BuildReceipt) -> dict[str, Any]:
    """As stored in the version's row. Its texts may quote the uploaded model and its errors, so
    they are made harmless."""
    return _cleaned(msgspec.to_builtins(receipt, str_keys=True))


def _cleaned(value: Any) -> Any:
    match value:
        case dict():
            return {key: _cleaned(item) for key, item in cast(dict[Any, Any], value).items()}
        case list():
            return [_cleaned(item) for item in cast(list[Any], value)]
        case str():
            return clean_text(value, MAX_STRING_CHARS)
        case _:
            return value


def read_manifest(stored: Any) -> Manifest:
    return msgspec.convert(stored, Manifest, str_keys=True)


def read_receipt(stored: Any) -> BuildReceipt:
    return msgspec.convert(stored, BuildReceipt, str_keys=True)


def _leaves(value: Any) -> Iterator[Any]:
    """Keys included. Depth is bounded by the structs' own."""
    match value:
        case dict():
            for key, item in cast(dict[Any, Any], value).items():
                yield key
                yield from _leaves(item)
        case list():
            for item in cast(list[Any], value):
                yield from _leaves(item)
        case _:
            yield value


def _check_leaf(value: Any) -> None:
    if isinstance(value, str):
        if len(value) > MAX_STRING_CHARS:
            raise NotAcceptable("it contains an overlong text")
        if clean_text(value) != value:
            raise NotAcceptable("it contains control characters")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NotAcceptable("it contains a number that is not finite")
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise NotAcceptable("it contains a number out of range")


def _check_manifest(manifest: Manifest) -> None:
    if manifest.num_parameters < 0 or manifest.weight_bytes < 0:
        raise NotAcceptable("it reports a negative size")
    if manifest.kind == "tensor":
        if manifest.schema is None:
            raise NotAcceptable("it lacks the schema of its inputs and outputs")
        _check_schema(manifest.schema)
    elif manifest.kind == "decoder":
        if manifest.decoder is None:
            raise NotAcceptable("it lacks the description of a decoder")
        _check_decoder(manifest.decoder)
    else:
        if manifest.embedder is None:
            raise NotAcceptable("it lacks the description of an embedder")
        _check_embedder(manifest.embedder)


def _check_schema(schema: Schema) -> None:
    for specs in (schema.inputs, schema.outputs):
        names = {spec.name for spec in specs}
        if not specs or len(specs) > MAX_TENSORS or len(names) != len(specs):
            raise NotAcceptable("its schema lists no tensors, too many, or one twice")
        for spec in specs:
            shapes = [spec.shape, spec.min_shape or spec.shape, spec.max_shape or spec.shape]
            if len(spec.shape) > MAX_DIMENSIONS or len({len(shape) for shape in shapes}) != 1:
                raise NotAcceptable(f"the shapes of {spec.name!r} do not agree")
            if any(size is not None and size < 0 for shape in shapes for size in shape):
                raise NotAcceptable(f"{spec.name!r} has a negative size")


def _check_decoder(decoder: DecoderInfo) -> None:
    is_plausible = (
        1 <= decoder.vocab_size <= MAX_VOCAB_SIZE
        and 1 <= decoder.max_context_tokens <= MAX_CONTEXT_TOKENS
        and 0 <= decoder.num_embedded_ids <= decoder.vocab_size
        and decoder.num_layers >= (1 if decoder.is_paged else 0)
        and decoder.kv_bytes_per_token >= 0
        and 0 <= decoder.template_tokens <= MAX_TEMPLATE_TOKENS
        and 0 <= decoder.template_tokens_per_message <= MAX_TEMPLATE_TOKENS
        and 0 <= decoder.template_tokens_per_tool_use <= MAX_TEMPLATE_TOKENS
        and 1 <= decoder.template_tool_factor <= MAX_TOOL_FACTOR
    )
    if not is_plausible:
        raise NotAcceptable("its description of the decoder is implausible")


def _check_embedder(embedder: EmbedderInfo) -> None:
    sizes = embedder.matryoshka_dimensions or []
    is_plausible = (
        1 <= embedder.vocab_size <= MAX_VOCAB_SIZE
        and 1 <= embedder.max_tokens <= MAX_CONTEXT_TOKENS
        and 1 <= embedder.dimensions <= MAX_EMBEDDING_DIMENSIONS
        and 0 <= embedder.special_tokens <= MAX_TEMPLATE_TOKENS
        and len(sizes) <= MAX_TENSORS
        and all(1 <= size <= embedder.dimensions for size in sizes)
    )
    if not is_plausible:
        raise NotAcceptable("its description of the embedder is implausible")
