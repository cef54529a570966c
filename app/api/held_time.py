"""The device time that is held for a prediction: what the build measured, for a request's size.

Pure. The safety factor and how time grows with size are `billing/rating.py`'s.
"""

import math
from typing import TYPE_CHECKING

from app.billing.rating import held_device_ms, slowest_row_ms
from app.deployments.claims import SPECIAL_TOKENS
from runtime.protocol import BuildReceipt, Manifest, Predict, Schema, TextInput

if TYPE_CHECKING:
    from app.deployments.replica import Target


def max_device_ms(target: "Target", request: Predict, timeout_seconds: float) -> int:
    """No more than the time that a request gets; what has not run by then is not answered."""
    return min(
        _measured_ms(target.receipt, target.manifest, request), math.ceil(timeout_seconds * 1e3)
    )


def _measured_ms(receipt: BuildReceipt, manifest: Manifest, request: Predict) -> int:
    """Of as many of the build's slowest batches as the rows fill; where rows are larger than those
    of the batches were, of the rows one by one if that is more."""
    chosen = [candidate for candidate in receipt.candidates if candidate.is_chosen]
    slowest_ms = max((candidate.device_ms_max for candidate in chosen), default=0.0)
    largest = max((size for candidate in chosen for size in candidate.p50_ms), default=1)
    schema = manifest.schema
    assert schema is not None, "only tensor programs predict"
    num_rows = _num_rows(request, schema)
    held = held_device_ms(slowest_ms) * max(1, math.ceil(num_rows / largest))
    size = _row_size(request, schema, manifest.text)
    for candidate in chosen:
        measured = candidate.row_ms_by_size
        if measured and size > min(measured):
            held = max(held, held_device_ms(num_rows * slowest_row_ms(measured, size)))
    return held


def _num_rows(request: Predict, schema: Schema) -> int:
    if not schema.is_batched:
        return 1
    if request.texts is not None:
        return len(request.texts)
    return request.inputs[0].shape[0] if request.inputs else 1


def _row_size(request: Predict, schema: Schema, text: TextInput | None) -> int:
    """`Schema.row_size` of the request, of texts the largest that they may become."""
    if request.inputs is not None:
        return schema.row_size([tensor.shape for tensor in request.inputs])
    if request.texts is None or text is None:
        return 0
    longest = max((sum(len(part.encode()) for part in row) for row in request.texts), default=0)
    length = min(text.max_tokens, longest + SPECIAL_TOKENS)
    shapes = [[length if size is None else size for size in spec.shape] for spec in schema.inputs]
    if not schema.is_batched:
        for shape in shapes:
            shape[0] = len(request.texts)
    return schema.row_size(shapes)
