"""What a worker claims, held against what can be true.

A worker runs somebody's model and is billed by what it reports, so nothing it sends is believed
that the request, the manifest or our own clock contradicts. Owns the bounds; acting on a breach
is `link.py`'s.
"""

import json
import math

import msgspec

from app.core.errors import AppError, RuntimeFailure
from app.deployments.logs import clean_text
from runtime.protocol import (
    DecoderInfo,
    FrameError,
    Generate,
    Manifest,
    Predicted,
    Prepared,
    Tensor,
    TensorSpec,
    WireError,
)

SPECIAL_TOKENS = 8  # that a tokenizer may put around plain text
INDENT = 64  # bytes before a line of JSON, in a template that lays it out
NO_PARAMETERS = 64  # what a template writes where a tool has none
CLOCK_SLACK_NS = 10_000_000
MAX_MESSAGE_CHARS = 2_000
MAX_TOKEN_CHARS = 1_024  # of text per token; the longest of known vocabularies have a few hundred
RETRY_SECONDS = 1  # where the worker names no time
MAX_RETRY_SECONDS = 60

_ITEM_BYTES = {
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("float16", "int16", "uint16", "bfloat16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
}
# What a worker may make of a request; anything else it says becomes a plain 500.
_STATUSES = {400, 404, 408, 409, 413, 422, 429, 500, 501, 503, 504}


class FalseClaim(FrameError):
    """The worker claimed something that cannot be true."""


def worker_failure(message: str, code: str, status: int = 503) -> RuntimeFailure:
    """A failure that is the box's fault, never the caller's."""
    failure = RuntimeFailure(message, status=status, type="server_error", code=code, param=None)
    failure.retry_after_seconds = RETRY_SECONDS if status == 503 else None
    return failure


def lost_worker(reason: str, *, is_false: bool) -> RuntimeFailure:
    """What requests fail with whose worker is gone: `reason` follows `The model's worker`."""
    if is_false:
        return worker_failure(
            "The model's worker reported something impossible and was stopped. "
            "This request costs nothing; try again.",
            "worker_untrusted",
        )
    return worker_failure(f"The model's worker {reason}. Try again.", "worker_lost")


def slow_worker() -> RuntimeFailure:
    return worker_failure("The model did not prepare the request.", "worker_slow")


def cancelled() -> RuntimeFailure:
    return worker_failure("The request was cancelled.", "cancelled", 499)


def failure_of(error: WireError) -> RuntimeFailure:
    """What a caller is told of a worker's error, made harmless and kept to known statuses."""
    status = error.status if error.status in _STATUSES else 500
    failure = RuntimeFailure(
        clean_text(error.message, MAX_MESSAGE_CHARS),
        status=status,
        type=clean_text(error.type, 64),
        code=clean_text(error.code, 64),
        param=None if error.param is None else clean_text(error.param, 200),
    )
    if status in (429, 503):
        failure.retry_after_seconds = _retry_seconds(error.retry_after_seconds)
    return failure


def _retry_seconds(claimed: float | None) -> int:
    """Whole seconds, at least one, of what a worker says of its queue; NaN counts as nothing."""
    if claimed is None or not claimed > RETRY_SECONDS:
        return RETRY_SECONDS
    return math.ceil(min(claimed, MAX_RETRY_SECONDS))


def max_prompt_tokens(request: Generate, decoder: DecoderInfo) -> int:
    """The most tokens `request` can have: one per byte, plus what the template adds."""
    if request.token_ids is not None:
        return len(request.token_ids)
    if request.text is not None:
        return _num_bytes(request.text) + SPECIAL_TOKENS
    messages = request.messages or []
    num_bytes = sum(
        _num_bytes(part)
        for message in messages
        for part in (message.role, message.content, message.name or "", message.tool_call_id or "")
    )
    template = decoder.template_tokens + decoder.template_tokens_per_message * len(messages)
    return num_bytes + template + _max_tool_tokens(request, decoder) + SPECIAL_TOKENS


def _max_tool_tokens(request: Generate, decoder: DecoderInfo) -> int:
    """What tools, calls and results can add, which a template may lay out as it likes."""
    calls = [call for message in request.messages or [] for call in message.tool_calls]
    num_results = sum(message.role == "tool" for message in request.messages or [])
    num_uses = len(calls) + num_results + bool(request.tools)
    num_bytes = sum(_laid_out(call.name + call.arguments) for call in calls)
    num_bytes += sum(
        _laid_out(tool.name + tool.description) + _laid_out(tool.parameters) + NO_PARAMETERS
        for tool in request.tools
    )
    per_use = decoder.template_tokens_per_tool_use
    return num_uses * per_use + num_bytes * decoder.template_tool_factor


def _laid_out(text: str) -> int:
    """At least the bytes of JSON when every member has a line of its own and every character
    outside ASCII is escaped."""
    num_lines = text.count(",") + 2 * (text.count("{") + text.count("["))
    return len(json.dumps(text)) + text.count(":") + INDENT * num_lines


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def check_prepared(prepared: Prepared, request: Generate, decoder: DecoderInfo) -> None:
    """Raises `RuntimeFailure`: nothing was promised or charged yet, and text that some tokenizers
    blow up must not let one caller stop a replica that others use."""
    bound = max_prompt_tokens(request, decoder)
    is_plausible = (
        1 <= prepared.num_prompt_tokens <= bound
        and 0 <= prepared.max_tokens <= request.sampling.max_tokens
        and (
            request.is_count
            or prepared.num_prompt_tokens + prepared.max_tokens <= decoder.max_context_tokens
        )
    )
    if request.token_ids is not None:
        is_plausible = is_plausible and prepared.num_prompt_tokens == len(request.token_ids)
    if not is_plausible:
        raise worker_failure(
            f"The model's tokenizer reported {prepared.num_prompt_tokens} prompt tokens and "
            f"{prepared.max_tokens} to come, which this request cannot have (at most {bound} and "
            f"{request.sampling.max_tokens}); it was not run and costs nothing.",
            "implausible_token_count",
            500,
        )


def check_device_time(device_ns: int, elapsed_ns: int, num_devices: int) -> None:
    """Device time within the wall time of as many devices, but for what clocks differ."""
    if device_ns > (elapsed_ns + elapsed_ns // 100 + CLOCK_SLACK_NS) * num_devices:
        raise FalseClaim(f"claimed {device_ns} ns of device time in {elapsed_ns} ns")


def is_form_of(served: Manifest, built: Manifest) -> bool:
    """Whether a worker serves what was built: as it is, or in its eager form where the one that
    was chosen cannot be had."""
    if served.form not in (built.form, "eager"):
        return False
    chosen = {"form": built.form, "environment": built.environment}
    return msgspec.structs.replace(served, **chosen) == built


def check_predicted(predicted: Predicted, manifest: Manifest) -> None:
    """The outputs are those of the manifest's schema."""
    if predicted.device_ns < 0 or predicted.queue_ns < 0 or predicted.batch_rows < 1:
        raise FalseClaim("sent a negative measurement")
    if manifest.schema is None:
        return
    specs = manifest.schema.outputs
    if [tensor.name for tensor in predicted.outputs] != [spec.name for spec in specs]:
        raise FalseClaim("sent outputs other than its schema's")
    for tensor, spec in zip(predicted.outputs, specs, strict=True):
        _check_tensor(tensor, spec)


def _check_tensor(tensor: Tensor, spec: TensorSpec) -> None:
    item_bytes = _ITEM_BYTES.get(tensor.dtype)
    is_of_shape = len(tensor.shape) == len(spec.shape) and all(
        size >= 0 and (expected is None or size == expected)
        for size, expected in zip(tensor.shape, spec.shape, strict=True)
    )
    if item_bytes is None or tensor.dtype != spec.dtype or not is_of_shape:
        raise FalseClaim(f"sent output {spec.name!r} in another shape or dtype than its schema's")
    if len(tensor.data) != math.prod(tensor.shape) * item_bytes:
        raise FalseClaim(f"sent output {spec.name!r} with data that does not fill its shape")


def copy_of(error: AppError) -> AppError:
    """An instance of its own for each request that fails of one cause: an exception collects the
    traceback of everyone who raises it."""
    fresh = RuntimeFailure(
        error.message, status=error.status, type=error.type, code=error.code, param=error.param
    )
    fresh.retry_after_seconds = error.retry_after_seconds
    return fresh
