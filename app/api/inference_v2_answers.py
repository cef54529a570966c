"""Answers of the Open Inference Protocol, version 2: JSON, with binary tensors after it where
asked, or the greatest values of an output as text (the classification extension)."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from app.api import tensors
from app.api.inference_v2_requests import LENGTH, Asked, WantedOutput, datatype_of
from app.api.json_answers import check_json_values, json_of, num_values
from runtime.protocol import Manifest, Predicted, Schema, Tensor, TensorSpec


class InferredOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """`data` is flat, in C order; absent where `binary_data_size` is a parameter."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: Any = msgspec.UNSET


class Inferred(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`id` is the request's own."""

    id: str = ""
    model_name: str
    model_version: str
    outputs: list[InferredOutput]


_encoder = msgspec.json.Encoder()


def infer_answer(
    asked: Asked, predicted: Predicted, manifest: Manifest, name: str, version: int
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON where binary tensors follow. Raises `TooLarge`."""
    schema = manifest.schema
    assert schema is not None, "only tensor programs predict"
    check_answer_values(asked.outputs, [tensor.shape for tensor in predicted.outputs], schema)
    outputs: list[InferredOutput] = []
    chunks: list[bytes] = []
    for wanted in asked.outputs:
        output, chunk = _output(wanted, predicted.outputs[wanted.index], schema, manifest.labels)
        outputs.append(output)
        if chunk is not None:
            chunks.append(chunk)
    json = _encoder.encode(
        Inferred(id=asked.id, model_name=name, model_version=str(version), outputs=outputs)
    )
    return (b"".join((json, *chunks)), len(json)) if chunks else (json, None)


def check_answer_values(
    wanted: Sequence[WantedOutput], shapes: Sequence[Sequence[int]], schema: Schema
) -> None:
    """Raises `TooLarge` where outputs of these shapes are too many numbers, or texts of classes;
    binary tensors have no bound but a frame's."""
    total = 0
    for each in wanted:
        shape = shapes[each.index]
        count = num_values(shape)
        if each.num_classes:
            num_rows = max(1, shape[0]) if schema.is_batched and shape else 1
            total += num_rows * min(each.num_classes, count // num_rows)
        elif not each.is_binary:
            total += count
    check_json_values(total)


def _output(
    wanted: WantedOutput, tensor: Tensor, schema: Schema, labels: list[str]
) -> tuple[InferredOutput, bytes | None]:
    spec = schema.outputs[wanted.index]
    if wanted.num_classes:
        named = labels if wanted.index == 0 else []
        return _classes(wanted, tensor, spec, named, is_batched=schema.is_batched)
    datatype = datatype_of(spec)
    if wanted.is_binary:
        parameters = {"binary_data_size": len(tensor.data)}
        return InferredOutput(tensor.name, datatype, tensor.shape, parameters), tensor.data
    data = json_of(tensors.array_of(tensor).reshape(-1))
    return InferredOutput(tensor.name, datatype, tensor.shape, data=data), None


def _classes(
    wanted: WantedOutput, tensor: Tensor, spec: TensorSpec, labels: list[str], *, is_batched: bool
) -> tuple[InferredOutput, bytes | None]:
    """`value:index`, and `:label` where the model names its classes; of each row where there are
    rows."""
    values = tensors.array_of(tensor)
    rows = values.reshape(values.shape[0] if is_batched else 1, -1)
    num_classes = min(wanted.num_classes, rows.shape[1])
    best = np.argsort(-rows.astype("f8"), axis=1, kind="stable")[:, :num_classes]
    texts = [
        ":".join([f"{row[index]:f}", str(index), *labels[index : index + 1]])
        for row, indices in zip(rows, best.tolist(), strict=True)
        for index in indices
    ]
    shape = [rows.shape[0], num_classes] if is_batched else [num_classes]
    if not wanted.is_binary:
        return InferredOutput(spec.name, "BYTES", shape, data=texts), None
    chunk = b"".join(LENGTH.pack(len(text)) + text for text in map(str.encode, texts))
    return InferredOutput(spec.name, "BYTES", shape, {"binary_data_size": len(chunk)}), chunk
