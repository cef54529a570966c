"""The OpenAPI description of one model: its routes with the shapes, types and ranges that it
really takes and gives. Pure; `model_docs.py` serves it."""

from typing import Any

import msgspec

from app.api.errors import ErrorBody, FlatErrorBody
from app.api.inference_v2_requests import DATATYPES, shape_of
from app.api.labels import MAX_LABELS, Label
from app.api.npy import NPY, NPZ
from app.api.predict_answers import PredictUsage, complex_outputs
from app.api.predict_bodies import FORM, IMAGES, MAX_TEXTS, RAW, takes_image
from app.deployments.fleet import Target
from runtime.protocol import Manifest, Schema, TensorSpec

Json = dict[str, Any]
MAX_EXAMPLE_VALUES = 512  # more than that is no example
FILE: Json = {"type": "string", "contentMediaType": "application/octet-stream"}
INTEGERS: dict[str, tuple[int, int]] = {
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
}
ERRORS = {
    "400": "The body is not what the model takes; `param` names the field",
    "401": "The API key is missing or not known",
    "402": "A spending limit or the credit is reached",
    "403": "The key may not call models",
    "413": "The body is too large, or what the model would answer",
    "415": "The body is of a kind that is not read here",
    "422": "The model failed on these inputs",
    "429": "Too many requests wait; `Retry-After` says how long to",
    "500": "The box failed; this costs nothing",
    "503": "No replica answers now; `Retry-After` says how long to wait",
    "504": "The request did not finish in time",
}


def model_openapi(target: Target, name: str, url: str) -> Json:
    """OpenAPI 3.1. `name` is what the caller called it, `url` the address of the box."""
    manifest = target.manifest
    schema = manifest.schema
    assert schema is not None, "only tensor programs have one"
    paths: Json = {f"/models/{name}/predict": {"post": _predict(manifest, schema)}}
    specs = [*schema.inputs, *schema.outputs]
    if all(spec.dtype in DATATYPES for spec in specs):
        paths[f"/v2/models/{name}/infer"] = {"post": _infer(manifest, schema)}
        paths[f"/v2/models/{name}"] = {"get": _metadata()}
    _, components = msgspec.json.schema_components(
        [ErrorBody, FlatErrorBody, PredictUsage, Label], ref_template="#/components/schemas/{name}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": name,
            "version": str(target.version_number),
            "description": _description(manifest, schema),
        },
        "servers": [{"url": url}],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _description(manifest: Manifest, schema: Schema) -> str:
    words = [f"A model of {manifest.num_parameters:,} parameters."]
    if schema.is_batched:
        words.append("The first axis of every array is the batch: one row per item.")
    if manifest.text is not None:
        most = manifest.text.max_tokens
        words.append(f"Takes texts of up to {most:,} tokens each; longer ones are refused.")
    image = schema.inputs[0].image
    if image is not None and takes_image(schema):
        values = "" if image.mean else f", its bytes times {image.scale:.6g}"
        words.append(
            f"Takes a PNG, JPEG or WebP too: resized to {image.width} x {image.height}, "
            f"{'grey' if image.channels == 1 else 'red, green and blue'}{values}; "
            "what is transparent becomes white."
        )
    return " ".join(words)


# --- predict ----------------------------------------------------------------------------


def _predict(manifest: Manifest, schema: Schema) -> Json:
    content: Json = {"application/json": _json_body(manifest, schema)}
    if len(schema.inputs) == 1:
        content |= {NPY: {"schema": FILE}, RAW: {"schema": FILE}}
    content |= {NPZ: {"schema": FILE}, FORM: {"schema": _form(schema)}}
    if takes_image(schema):
        content |= {media_type: {"schema": FILE} for media_type in IMAGES}
    answers: Json = {NPZ: {"schema": FILE}}
    if not complex_outputs(schema):
        answers = {"application/json": {"schema": _answer(manifest, schema)}, **answers}
    if len(schema.outputs) == 1:
        answers[NPY] = {"schema": FILE}
    return {
        "operationId": "predict",
        "summary": "Predict",
        "description": "Runs the model. `Accept` chooses the form of the answer.",
        "tags": ["Predictions"],
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {"description": "The outputs", "content": answers},
            **_errors("ErrorBody"),
        },
    }


def _json_body(manifest: Manifest, schema: Schema) -> Json:
    """Exactly one of the properties: what the model is asked of."""
    named = _object({spec.name: array_schema(spec, schema) for spec in schema.inputs})
    inputs = named = {**named, "additionalProperties": False}
    if len(schema.inputs) == 1:
        inputs = {"oneOf": [named, array_schema(schema.inputs[0], schema)]}
    properties: Json = {"inputs": inputs}
    if manifest.text is not None:
        properties["texts"] = _texts(manifest)
    if takes_image(schema):
        properties["image"] = {
            "type": "string",
            "contentEncoding": "base64",
            "description": "A PNG, JPEG or WebP file.",
        }
    body: Json = {"type": "object", "properties": properties}
    if len(properties) == 1:
        body["required"] = ["inputs"]
    else:
        body["oneOf"] = [{"required": [name]} for name in properties]
    media: Json = {"schema": body}
    if manifest.text is not None:
        pair = ["First text", "second text"]
        media["example"] = {"texts": [pair] if manifest.text.takes_pairs else ["A text"]}
    elif (values := _example(schema)) is not None:
        media["example"] = {"inputs": values}
    return media


def _texts(manifest: Manifest) -> Json:
    assert manifest.text is not None, "the model takes texts"
    text: Json = {"type": "string"}
    row: Json = {"type": "array", "items": text, "minItems": 1, "maxItems": 1}
    if manifest.text.takes_pairs:
        row["maxItems"] = 2
    items = {"oneOf": [text, row]}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MAX_TEXTS}


def _form(schema: Schema) -> Json:
    """A part for each input."""
    part = {"description": "An npy file, or nested lists in JSON.", "type": "string"}
    return _object({spec.name: part for spec in schema.inputs})


def _answer(manifest: Manifest, schema: Schema) -> Json:
    outputs = {spec.name: array_schema(spec, schema, is_output=True) for spec in schema.outputs}
    properties = {
        "outputs": _object(outputs),
        "usage": {"$ref": "#/components/schemas/PredictUsage"},
    }
    if manifest.labels:
        label = {"$ref": "#/components/schemas/Label"}
        best: Json = {"type": "array", "items": label, "maxItems": MAX_LABELS}
        properties["labels"] = {
            "type": "array",
            "items": best,
            "description": "The best labels of each row, best first.",
        }
    return {"type": "object", "required": ["outputs", "usage"], "properties": properties}


def array_schema(spec: TensorSpec, schema: Schema, *, is_output: bool = False) -> Json:
    """Lists within lists, with the sizes and values that there may be."""
    made = _value(spec, is_output=is_output)
    for axis in reversed(range(len(spec.shape))):
        least, most = _bounds(spec, schema, axis)
        made = {"type": "array", "items": made, "minItems": least}
        if most is not None:
            made["maxItems"] = most
    shape = ", ".join("any" if size is None else str(size) for size in spec.shape)
    return {**made, "description": f"{spec.dtype} [{shape}]"}


def _bounds(spec: TensorSpec, schema: Schema, axis: int) -> tuple[int, int | None]:
    fixed = spec.shape[axis]
    if fixed is not None:
        return fixed, fixed
    least = spec.min_shape[axis] if spec.min_shape else 1
    most = spec.max_shape[axis] if spec.max_shape else None
    return least, most


def _value(spec: TensorSpec, *, is_output: bool) -> Json:
    if spec.dtype == "bool":
        return {"type": "boolean"} if is_output else {"enum": [True, False, 0, 1]}
    if spec.dtype in INTEGERS:
        least, most = INTEGERS[spec.dtype]
        return {"type": "integer", "minimum": least, "maximum": most}
    if is_output:  # not a number, and infinities, which JSON lacks
        return {"type": ["number", "null"]}
    value: Json = {"type": "number"}
    if spec.minimum is not None and spec.maximum is not None:
        value["description"] = f"The model is known to take {spec.minimum:g} to {spec.maximum:g}."
    return value


def _example(schema: Schema) -> Json | None:
    """Zeros of the least size, unless they are many."""
    values: Json = {}
    for spec in schema.inputs:
        sizes = [max(1, _bounds(spec, schema, axis)[0]) for axis in range(len(spec.shape))]
        made: Any = False if spec.dtype == "bool" else 0 if spec.dtype in INTEGERS else 0.0
        if spec.minimum is not None and not spec.minimum <= 0:
            made = type(made)(spec.minimum)
        num_values = 1
        for size in reversed(sizes):
            num_values *= size
            if num_values > MAX_EXAMPLE_VALUES:
                return None
            made = [made] * size
        values[spec.name] = made
    return values


# --- the Open Inference Protocol --------------------------------------------------------


def _infer(manifest: Manifest, schema: Schema) -> Json:
    tensors = [_infer_input(spec, schema) for spec in schema.inputs]
    count = len(tensors)
    inputs: Json = {"type": "array", "items": {"oneOf": tensors}, "minItems": count}
    if manifest.text is not None:
        tensors.append(_infer_texts(manifest))
        inputs["minItems"] = 1
    inputs["maxItems"] = count
    names = [spec.name for spec in schema.outputs]
    wanted = _object({"name": {"enum": names}, "parameters": {"type": "object"}}, {"name"})
    body = _object(
        {
            "id": {"type": "string", "maxLength": 256},
            "inputs": inputs,
            "outputs": {"type": "array", "items": wanted, "maxItems": len(names)},
            "parameters": {"type": "object"},
        },
        {"inputs"},
    )
    outputs = [_infer_input(spec, schema, is_output=True) for spec in schema.outputs]
    answer = _object(
        {
            "id": {"type": "string"},
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "outputs": {"type": "array", "items": {"anyOf": outputs}},
        },
        {"model_name", "model_version", "outputs"},
    )
    return {
        "operationId": "infer",
        "summary": "Infer",
        "description": "The same by the Open Inference Protocol, version 2, with binary tensors.",
        "tags": ["Open Inference Protocol"],
        "parameters": [
            {
                "name": "Inference-Header-Content-Length",
                "in": "header",
                "description": "Length of the JSON, where binary tensors follow it.",
                "schema": {"type": "integer", "minimum": 0},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": body}, RAW: {"schema": FILE}},
        },
        "responses": {
            "200": {
                "description": "The outputs",
                "content": {"application/json": {"schema": answer}, RAW: {"schema": FILE}},
            },
            **_errors("FlatErrorBody"),
        },
    }


def _infer_input(spec: TensorSpec, schema: Schema, *, is_output: bool = False) -> Json:
    shape: list[Json] = []
    for axis in range(len(spec.shape)):
        least, most = _bounds(spec, schema, axis)
        size: Json = {"type": "integer", "minimum": least}
        shape.append(size if most is None else {**size, "maximum": most})
    return _object(
        {
            "name": {"const": spec.name},
            "datatype": {"const": DATATYPES[spec.dtype]},
            "shape": {
                "type": "array",
                "prefixItems": shape,
                "minItems": len(shape),
                "maxItems": len(shape),
                "description": str(shape_of(spec)),
            },
            "parameters": {"type": "object"},
            "data": {"type": "array", "description": "Flat in C order, or nested."},
        },
        {"name", "datatype", "shape"},
    )


def _infer_texts(manifest: Manifest) -> Json:
    assert manifest.text is not None, "the model takes texts"
    return _object(
        {
            "name": {"type": "string"},
            "datatype": {"const": "BYTES"},
            "shape": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
            "parameters": {"type": "object"},
            "data": _texts(manifest),
        },
        {"name", "datatype", "shape"},
    )


def _metadata() -> Json:
    return {
        "operationId": "metadata",
        "summary": "Metadata",
        "description": "Inputs and outputs as the Open Inference Protocol tells them.",
        "tags": ["Open Inference Protocol"],
        "responses": {
            "200": {
                "description": "Names, datatypes and shapes",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
            **_errors("FlatErrorBody", ("401", "404", "503")),
        },
    }


def _errors(body: str, statuses: tuple[str, ...] = tuple(ERRORS)) -> Json:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}}
    return {
        status: {"description": ERRORS.get(status, "There is no such model"), "content": content}
        for status in statuses
    }


def _object(properties: Json, required: set[str] | None = None) -> Json:
    needed = list(properties) if required is None else sorted(required)
    return {"type": "object", "properties": properties, "required": needed}
