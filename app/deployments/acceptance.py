"""Whether what a build or an optimisation reports can be believed, stored and served.

They run somebody's code, so their manifest and receipt are claims: bounded, finite, printable and
consistent, or the result is refused. What a schema may say is `schema_claims.py`'s.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, cast

import msgspec

from app.deployments.logs import clean_text
from app.deployments.schema_claims import NotAcceptable, check_labels, check_schema, check_text
from runtime.protocol import (
    BuildReceipt,
    Built,
    CandidateReport,
    DecoderInfo,
    EmbedderInfo,
    Manifest,
    Optimised,
)

__all__ = ["NotAcceptable"]

MAX_STORED_BYTES = 4 * 1024**2  # of manifest and receipt together, as JSON
MAX_STRING_CHARS = 8_192
MAX_INTEGER = 2**53  # beyond it JSON readers round
MAX_VOCAB_SIZE = 16_000_000
MAX_CONTEXT_TOKENS = 100_000_000
MAX_TOOL_FACTOR = 16
MAX_TEMPLATE_TOKENS = 100_000
MAX_EMBEDDING_DIMENSIONS = 1_000_000  # at least one vector fits a frame
MAX_MATRYOSHKA_SIZES = 256
MAX_CANDIDATES = 64
MAX_BATCH_SIZES = 32
FORM_NAME = re.compile(r"[a-z0-9_]{1,64}")  # it names a folder of the artifact too


def check_built(built: Built | Optimised) -> None:
    """Raises `NotAcceptable`."""
    stored = {"manifest": manifest_json(built.manifest), "receipt": receipt_json(built.receipt)}
    for value in _leaves(stored):
        _check_leaf(value)
    if len(msgspec.json.encode(stored)) > MAX_STORED_BYTES:
        raise NotAcceptable("its manifest and receipt are too large")
    _check_manifest(built.manifest)
    if built.receipt.verdict == "different":
        raise NotAcceptable("its proof found that the served form answers differently")
    if any(duration < 0 for duration in built.receipt.phase_seconds.values()):
        raise NotAcceptable("it reports negative durations")
    _check_candidates(built.receipt.candidates)


def check_optimised(optimised: Optimised, before: Manifest, accepts_loss: bool) -> None:
    """Of a version that serves with the manifest `before`. Raises `NotAcceptable`."""
    check_built(optimised)
    manifest, receipt = optimised.manifest, optimised.receipt
    if not FORM_NAME.fullmatch(manifest.form):
        raise NotAcceptable("its form has no name")
    if not is_same_program(manifest, before):
        raise NotAcceptable("it describes another program than the one that was built")
    if manifest.form != "eager" and not manifest.environment:
        raise NotAcceptable("it does not say where its form holds")
    chosen = [candidate.name for candidate in receipt.candidates if candidate.is_chosen]
    if chosen != [manifest.form]:
        raise NotAcceptable("its receipt does not say that its form was chosen")
    if receipt.verdict == "lossy" and not accepts_loss:
        raise NotAcceptable("it loses accuracy, which the owner has not allowed")


def is_same_program(manifest: Manifest, before: Manifest) -> bool:
    """Whether the two differ in the form that serves alone."""
    form = {"form": before.form, "environment": before.environment}
    return msgspec.structs.replace(manifest, **form) == before


def _check_candidates(candidates: list[CandidateReport]) -> None:
    if len(candidates) > MAX_CANDIDATES:
        raise NotAcceptable("it reports too many candidates")
    for candidate in candidates:
        measured = (candidate.p50_ms, candidate.p99_ms, candidate.rows_per_second)
        batch_sizes = {size for values in measured for size in values}
        if len(batch_sizes) > MAX_BATCH_SIZES or any(size < 1 for size in batch_sizes):
            raise NotAcceptable("a candidate was measured at batch sizes that are none")
        sizes = candidate.row_ms_by_size
        if len(sizes) > MAX_BATCH_SIZES or any(size < 1 for size in sizes):
            raise NotAcceptable("a candidate was measured at sizes of rows that are none")
        durations = [
            *sizes.values(),
            *(value for values in measured for value in values.values()),
            candidate.device_ms_max,
            candidate.prefill_ms or 0.0,
            candidate.prepare_seconds or 0.0,
        ]
        if any(duration < 0 for duration in durations):
            raise NotAcceptable("it reports negative durations")
        counts = (candidate.num_runs, candidate.memory_bytes or 0, candidate.error or 0.0)
        if any(count < 0 for count in counts):
            raise NotAcceptable("a candidate reports less than nothing")
        if not 0 <= (candidate.top_1_agreement or 0.0) <= 1:
            raise NotAcceptable("a candidate agrees on a share of rows that is none")
        is_chosen_by_fate = candidate.fate in (None, "chosen") if candidate.is_chosen else True
        if not is_chosen_by_fate or (candidate.fate == "chosen" and not candidate.is_chosen):
            raise NotAcceptable("a candidate was chosen and not chosen")


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
        check_schema(manifest.schema)
        check_text(manifest.text, manifest.schema)
        check_labels(manifest.labels)
    elif manifest.kind == "decoder":
        if manifest.decoder is None:
            raise NotAcceptable("it lacks the description of a decoder")
        _check_decoder(manifest.decoder)
    else:
        if manifest.embedder is None:
            raise NotAcceptable("it lacks the description of an embedder")
        _check_embedder(manifest.embedder)


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
        and len(sizes) <= MAX_MATRYOSHKA_SIZES
        and all(1 <= size <= embedder.dimensions for size in sizes)
    )
    if not is_plausible:
        raise NotAcceptable("its description of the embedder is implausible")
