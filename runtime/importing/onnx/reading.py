"""Reads an ONNX file with the real library and refuses what cannot be served.

Weights in other files are found, not read. Only ever used inside a sandboxed build or worker.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, TypeProto, ValueInfoProto

from runtime.importing.onnx.tensors import (
    DTYPES,
    attributes_of,
    constants_of,
    find_file,
    graphs_of,
    is_external,
    nodes_of,
    num_bytes,
    place_of,
    tensors_of,
)
from runtime.importing.program import ImportFailure

MAX_FILE_BYTES = 2**31 - 1  # that protobuf reads
MIN_OPSET = 7  # that ONNX Runtime promises to run
STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
# What loads files or code of its own, besides operators that are not there at all.
BANNED_OPERATORS = frozenset({"EPContext"})

EXPORT_LINES = """\
    torch.onnx.export(model.eval(), (example,), "model.onnx", dynamo=True,
                      dynamic_shapes=({0: torch.export.Dim("batch")},))"""


def read_onnx(path: Path, *, may_have_files: bool = True) -> ModelProto:
    """The model without the weights that lie in other files, which must be beside it. Raises
    `ImportFailure` for what cannot be served."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ImportFailure(
            "onnx_size",
            "The ONNX file is larger than 2 GB, which the format does not allow. Save its weights "
            'beside it:\n    onnx.save(model, "model.onnx", save_as_external_data=True, '
            'location="model.onnx.data")\n    tar -cf model.tar model.onnx model.onnx.data',
        )
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise _damaged("it is no protobuf") from error
    if not model.HasField("graph") or not model.ir_version:
        raise _damaged("it holds no graph")
    if not all(isinstance(text, str) for text in _texts(model)):
        raise _damaged("a name in it is no text")  # protobuf gives such names as bytes
    _check_versions(model)
    _check_operators(model)
    _check_inference(model)
    _check_tensors(model, path.parent if may_have_files else None)
    for what, values in (("input", real_inputs(model)), ("output", list(model.graph.output))):
        for value in values:
            _check_value(what, value)
        if not values:
            raise ImportFailure(
                "no_tensors",
                f"The model has no {what}s. It must take at least one tensor and return at least "
                "one.",
            )
    return model


def real_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs a caller gives: those that no initializer fills."""
    filled = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in filled]


def _texts(model: ModelProto) -> Iterator[object]:
    """Every name that is looked at anywhere."""
    for opset in model.opset_import:
        yield opset.domain
    for function in model.functions:
        yield from (function.domain, function.name)
    for node in nodes_of(model):
        yield from (node.domain, node.op_type, node.name, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for tensor in tensors_of(model):
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for value in [*model.graph.input, *model.graph.output]:
        yield value.name
        yield from (axis.dim_param for axis in value.type.tensor_type.shape.dim)


# --- the graph --------------------------------------------------------------------------


def _check_versions(model: ModelProto) -> None:
    versions = {each.domain: each.version for each in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx"))
    newest = onnx.defs.onnx_opset_version()
    if model.ir_version > onnx.IR_VERSION or (opset or 0) > newest:
        raise ImportFailure(
            "onnx_version",
            f"The file is of a newer ONNX (IR version {model.ir_version}, opset {opset}) than is "
            f"served here (IR version {onnx.IR_VERSION}, opset {newest}). Export it with an older "
            f"one: torch.onnx.export(..., opset_version={newest}).",
        )
    if opset is not None and opset < MIN_OPSET:
        raise ImportFailure(
            "onnx_version",
            f"The file is of ONNX opset {opset}, older than ONNX Runtime takes ({MIN_OPSET}). "
            "Convert it:\n"
            '    model = onnx.version_converter.convert_version(onnx.load("model.onnx"), 18)\n'
            '    onnx.save(model, "model.onnx")',
        )


def _check_operators(model: ModelProto) -> None:
    functions = {(function.domain, function.name) for function in model.functions}
    unknown = sorted(
        {
            f"{node.domain}::{node.op_type}"
            for node in nodes_of(model)
            if (node.domain, node.op_type) not in functions
            and (node.domain not in STANDARD_DOMAINS or node.op_type in BANNED_OPERATORS)
        }
    )
    if unknown:
        shown = ", ".join(name[:80] for name in unknown[:5])
        raise ImportFailure(
            "custom_operators",
            f"The model uses operators of its own ({shown}), whose code is not in the file and is "
            "never loaded here. Only the operators of ONNX and ONNX Runtime are served "
            "(ai.onnx, ai.onnx.ml, com.microsoft). Export it with those alone, for example:\n"
            + EXPORT_LINES,
        )


def _check_inference(model: ModelProto) -> None:
    """Refuses graphs that were exported while they trained."""
    constants = constants_of(model)
    layer = ""
    for node in nodes_of(model):
        if node.op_type == "BatchNormalization":
            is_training = any(a.name == "training_mode" and a.i for a in node.attribute)
            layer = "batch normalisation" if is_training else layer
        elif node.op_type == "Dropout" and len(node.input) > 2:
            mode = constants.get(node.input[2])
            is_training = mode is not None and _is_true(mode)
            layer = "dropout" if is_training else layer
    if model.training_info or layer:
        raise ImportFailure(
            "training_mode",
            f"The model was exported in training mode (its {layer or 'graph'} is still training), "
            "so its answers would be random or depend on other requests. Export it again after "
            "model.eval():\n" + EXPORT_LINES,
        )


def _is_true(tensor: TensorProto) -> bool:
    return any(tensor.raw_data) or any(tensor.int32_data)


# --- tensors ----------------------------------------------------------------------------


def _check_tensors(model: ModelProto, directory: Path | None) -> None:
    """`directory` is where other files may lie; None where there are none."""
    has_sparse = any(graph.sparse_initializer for graph in graphs_of(model)) or any(
        attribute.HasField("sparse_tensor") or attribute.sparse_tensors
        for attribute in attributes_of(model)
    )
    if has_sparse:
        raise ImportFailure(
            "onnx_sparse",
            "The model holds sparse tensors, which are not served: few bytes may stand for any "
            "amount of memory. Store its weights densely and export it again.",
        )
    for tensor in tensors_of(model):
        if is_external(tensor):
            place = place_of(tensor)
            if directory is None:
                raise _missing(place.location)
            find_file(place, directory)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != num_bytes(tensor):
            raise _damaged(
                f"the tensor {tensor.name[:80]!r} has not the bytes that its shape needs"
            )


def _check_value(what: str, value: ValueInfoProto) -> None:
    kind = value.type.WhichOneof("value")
    if kind not in ("tensor_type", None):
        words = kind.removesuffix("_type").replace("_", " ")
        raise _no_tensor(what, value.name, f"a {words}", _hint(value.type))
    if value.type.tensor_type.elem_type == TensorProto.STRING:
        hint = "Turn texts into numbers outside the model."
        raise _no_tensor(what, value.name, "text", hint)
    if value.type.tensor_type.elem_type not in DTYPES:
        number = value.type.tensor_type.elem_type
        names = {each: name for name, each in TensorProto.DataType.items()}
        name = names.get(number, "UNDEFINED").lower()
        hint = "Convert it inside the model, for example to float32."
        raise _no_tensor(what, value.name, f"of type {name}", hint)


def _hint(kind: TypeProto) -> str:
    if kind.HasField("sequence_type"):
        return (
            "Of a scikit-learn classifier, leave out the list of dictionaries:\n"
            '    to_onnx(model, X[:1], options={"zipmap": False})'
        )
    return "Make it an ordinary tensor."


def _no_tensor(what: str, name: str, found: str, hint: str) -> ImportFailure:
    return ImportFailure(
        "non_tensor",
        f"The {what} {name[:80]!r} is {found}; only tensors of numbers have a place in a request. "
        f"{hint}",
    )


def _missing(location: str) -> ImportFailure:
    return ImportFailure(
        "external_data_missing",
        f"The model's weights lie in {location[:120]!r}, which is not in the upload. Pack the "
        f"files together:\n    tar -cf model.tar model.onnx {location[:120]}",
    )


def _damaged(detail: str) -> ImportFailure:
    return ImportFailure(
        "onnx_damaged", f"The ONNX file is damaged ({detail}). Export and upload it again."
    )
