"""What the Open Inference Protocol, version 2, says of models: metadata, configuration,
statistics and the index."""

from typing import Any

import msgspec

from app.api.inference_v2_requests import datatype_of, shape_of
from app.deployments.fleet import EndpointView, LiveReplica, Target
from runtime.protocol import Schema, TensorSpec

PLATFORMS = {
    "pt2": "pytorch_export",
    "onnx": "onnxruntime_onnx",
    "torchscript": "pytorch_libtorch",
    "huggingface": "pytorch_transformers",
}
MAX_BATCH_ROWS = 128  # of one run, whatever a request holds


class TensorMetadata(msgspec.Struct, frozen=True):
    """-1 in `shape` is a dynamic axis."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`alternative_inputs` may be sent instead of all of `inputs`."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    alternative_inputs: list[TensorMetadata] = []


class IndexEntry(msgspec.Struct, frozen=True):
    """`reason` says why a model is not ready."""

    name: str
    version: str
    state: str
    reason: str


class IndexRequest(msgspec.Struct, frozen=True):
    ready: bool = False  # list those alone that answer


def model_metadata(target: Target, schema: Schema) -> ModelMetadata:
    """Raises `InvalidRequest` for types that the protocol has no name for."""
    manifest = target.manifest
    texts: list[TensorMetadata] = []
    if manifest.text is not None:
        texts.append(TensorMetadata("text", "BYTES", [-1]))
        if manifest.text.takes_pairs:
            texts.append(TensorMetadata("text", "BYTES", [-1, 2]))
    return ModelMetadata(
        name=target.endpoint_name,
        versions=[str(target.version_number)],
        platform=PLATFORMS[manifest.format],
        inputs=[_tensor(spec) for spec in schema.inputs],
        outputs=[_tensor(spec) for spec in schema.outputs],
        alternative_inputs=texts,
    )


def model_config(target: Target, schema: Schema) -> dict[str, Any]:
    """In the form of Triton's `ModelConfig`. Of batched models `dims` leave the batch out."""
    limits = [spec.max_shape[0] for spec in schema.inputs if spec.max_shape and schema.is_batched]
    most = min([MAX_BATCH_ROWS, *(limit for limit in limits if limit is not None)])
    config: dict[str, Any] = {
        "name": target.endpoint_name,
        "platform": PLATFORMS[target.manifest.format],
        "backend": "tapeout",
        "version_policy": {"specific": {"versions": [target.version_number]}},
        "max_batch_size": most if schema.is_batched else 0,
        "input": [_config(spec, schema) for spec in schema.inputs],
        "output": [_config(spec, schema) for spec in schema.outputs],
    }
    if schema.is_batched:
        config["dynamic_batching"] = {}
    return config


def model_statistics(view: EndpointView, replicas: list[LiveReplica]) -> dict[str, Any]:
    """Sums over the replicas that run, each since its start. What is not measured is 0."""
    stats = [replica.stats for replica in replicas]
    num_requests = sum(each.requests for each in stats)
    device_ns = sum(each.device_ns for each in stats)
    nothing = {"count": 0, "ns": 0}
    return {
        "name": view.name,
        "version": str(view.desired.version_number),
        "last_inference": 0,
        "inference_count": sum(each.rows for each in stats),
        "execution_count": sum(each.runs for each in stats),
        "inference_stats": {
            "success": {"count": num_requests, "ns": device_ns},
            "fail": nothing,
            "queue": nothing,
            "compute_input": nothing,
            "compute_infer": {"count": num_requests, "ns": device_ns},
            "compute_output": nothing,
        },
        "batch_stats": [],
    }


def index_entry(view: EndpointView) -> IndexEntry:
    is_ready = view.is_ready
    return IndexEntry(
        name=view.name,
        version=str(view.desired.version_number),
        state="READY" if is_ready else "UNAVAILABLE",
        reason="" if is_ready else "It is stopped or starting.",
    )


def _tensor(spec: TensorSpec) -> TensorMetadata:
    return TensorMetadata(spec.name, datatype_of(spec), shape_of(spec))


def _config(spec: TensorSpec, schema: Schema) -> dict[str, Any]:
    shape = shape_of(spec)
    return {
        "name": spec.name,
        "data_type": f"TYPE_{datatype_of(spec)}",
        "dims": shape[1:] if schema.is_batched else shape,
    }
