"""The forms in which a prediction is answered: JSON, npy or npz, as `Accept` asks."""

from typing import Any, Literal

import msgspec

from app.api import npy, tensors
from app.api.json_answers import check_json_shapes, json_of, num_values
from app.api.labels import Label, labels_of
from app.core.errors import InvalidRequest
from app.metering.records import Usage
from runtime.protocol import Manifest, Predicted, Schema

Form = Literal["application/json", "application/x-npy", "application/x-npz"]
JSON: Form = "application/json"
NPY: Form = "application/x-npy"
NPZ: Form = "application/x-npz"
FORMS: tuple[Form, ...] = (JSON, NPY, NPZ)


class PredictUsage(msgspec.Struct, frozen=True):
    """`batch_rows` is how many rows, of all callers, ran together; `device_ms` is this request's
    share of that run, which it pays for."""

    device_ms: int
    batch_rows: int
    queue_ns: int


class PredictAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """`outputs` are nested lists by name; NaN and infinities, which JSON lacks, are null.
    `labels`, of a classifier alone: per row the best five, best first."""

    outputs: dict[str, Any]
    usage: PredictUsage
    labels: list[list[Label]] | None = None


_encoder = msgspec.json.Encoder()


def chosen_form(accept: str, schema: Schema) -> Form:
    """The first form that the client lists, else JSON. Raises `InvalidRequest` where it cannot
    hold what the model answers, so that nothing is run in vain."""
    form: Form = JSON
    if "x-np" in accept:
        listed = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
        named: list[Form] = [known for part in listed for known in FORMS if part == known]
        form = named[0] if named else JSON
    if form == NPY and len(schema.outputs) != 1:
        raise InvalidRequest(
            f"This model has several outputs and an npy file holds one; ask for {NPZ}."
        )
    if form == JSON and (names := complex_outputs(schema)):
        arrays = NPY if len(schema.outputs) == 1 else NPZ
        raise InvalidRequest(
            f"The output {names[0]!r} is of complex numbers, which JSON cannot hold; ask for "
            f"arrays (Accept: {arrays}).",
            code="unsupported_datatype",
        )
    return form


def complex_outputs(schema: Schema) -> list[str]:
    """Names of the outputs that JSON cannot hold."""
    return [spec.name for spec in schema.outputs if spec.dtype.startswith("complex")]


def answer_bytes(form: Form, predicted: Predicted, usage: Usage, manifest: Manifest) -> bytes:
    """The answer's body. Raises `TooLarge` where it has too many numbers for JSON, which a schema
    with dynamic axes does not tell before the run."""
    if form == NPY:
        return npy.npy_of(predicted.outputs[0])
    if form == NPZ:
        return npy.npz_of(predicted.outputs)
    check_json_shapes(tensor.shape for tensor in predicted.outputs)
    outputs = {tensor.name: json_of(tensors.array_of(tensor)) for tensor in predicted.outputs}
    used = PredictUsage(usage.device_ms, predicted.batch_rows, predicted.queue_ns)
    return _encoder.encode(PredictAnswer(outputs, used, labels_of(predicted, manifest)))


def answer_size(form: Form, predicted: Predicted) -> int:
    """About how many bytes are to be made."""
    if form == JSON:
        return 20 * sum(num_values(tensor.shape) for tensor in predicted.outputs)
    return sum(len(tensor.data) for tensor in predicted.outputs)
