"""Decides from an ONNX file's headers whether it can be served, and says why not.

Chooses early messages and guards the web process; the build checks again with the real library.
"""

from typing import BinaryIO

from app.core.errors import Unprocessable
from app.registry.archives import check_name
from app.registry.onnx_header import OnnxHeader, read_header
from app.registry.protobuf import Budget

MIN_OPSET, MAX_OPSET, MAX_IR_VERSION = 7, 26, 13  # that ONNX Runtime here takes
STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
MEMORY_MARKER = "_ORT_MEM_ADDR_"  # in a location, an address in the runtime's own memory

TORCH_LINES = """\
    torch.onnx.export(model.eval(), (example,), "model.onnx", dynamo=True,
                      dynamic_shapes=({0: torch.export.Dim("batch")},))"""
PACK_LINES = "    tar -cf model.tar model.onnx {locations}"


def check_onnx(
    file: BinaryIO, start: int, size_bytes: int, budget: Budget | None = None
) -> OnnxHeader:
    """What the file's headers say. Raises `Unprocessable` for a file that cannot be served; where
    external data lies is the caller's to check, with `check_external`."""
    try:
        header = read_header(file, start, size_bytes, budget or Budget())
    except (ValueError, OSError) as error:
        raise _damaged(str(error)) from error
    for location in header.external:
        _check_location(location)
    _check_versions(header)
    _check_operators(header)
    _check_ends(header)
    if header.has_sparse:
        raise Unprocessable(
            "The model holds sparse tensors, which are not served: few bytes may stand for any "
            "amount of memory. Store its weights densely and export it again.",
            code="onnx_sparse",
        )
    if header.has_training:
        raise Unprocessable(
            "The file holds training information. Export the model for inference:\n" + TORCH_LINES,
            code="training_mode",
        )
    return header


def check_external(header: OnnxHeader, sizes: dict[str, int], *, is_whole: bool = True) -> None:
    """Raises `Unprocessable` unless every external tensor lies inside a file of `sizes`, which are
    by path from the model's own directory. With `is_whole` false, files may be missing."""
    for location, num_bytes in header.external.items():
        plain = "/".join(part for part in location.split("/") if part not in ("", "."))
        if plain not in sizes:
            if not is_whole:
                continue
            names = " ".join(list(header.external)[:3])
            raise Unprocessable(
                f"The model's weights lie in {location[:120]!r}, which is not in the upload. Pack "
                f"the files together, beside each other:\n{PACK_LINES.format(locations=names)}",
                code="external_data_missing",
            )
        if num_bytes > sizes[plain]:
            raise Unprocessable(
                f"The model's tensors need {num_bytes:,} bytes of {location[:120]!r}, which has "
                f"{sizes[plain]:,}: it is cut short, or of another model. Pack both files again.",
                code="external_data_short",
            )


# --- judging ----------------------------------------------------------------------------


def _check_versions(header: OnnxHeader) -> None:
    opset = header.opsets.get("", header.opsets.get("ai.onnx"))
    if header.ir_version > MAX_IR_VERSION or (opset is not None and opset > MAX_OPSET):
        raise Unprocessable(
            f"The file is of a newer ONNX (IR version {header.ir_version}, opset {opset}) than is "
            f"served here (IR version {MAX_IR_VERSION}, opset {MAX_OPSET}). Export it with an "
            f"older one: torch.onnx.export(..., opset_version={MAX_OPSET}).",
            code="onnx_version",
        )
    if opset is not None and opset < MIN_OPSET:
        raise Unprocessable(
            f"The file is of ONNX opset {opset}, older than ONNX Runtime takes ({MIN_OPSET}). "
            "Convert it:\n"
            '    model = onnx.version_converter.convert_version(onnx.load("model.onnx"), 18)\n'
            '    onnx.save(model, "model.onnx")',
            code="onnx_version",
        )


def _check_operators(header: OnnxHeader) -> None:
    unknown = sorted(
        f"{domain}::{name}"
        for domain, name in header.operators - header.functions
        if domain not in STANDARD_DOMAINS or name == "EPContext"
    )
    if unknown:
        shown = ", ".join(name[:80] for name in unknown[:5])
        raise Unprocessable(
            f"The model uses operators of its own ({shown}), whose code is not in the file and is "
            "never loaded here. Only the operators of ONNX and ONNX Runtime are served "
            "(ai.onnx, ai.onnx.ml, com.microsoft). Export it with those alone, for example:\n"
            + TORCH_LINES,
            code="custom_operators",
        )


def _check_ends(header: OnnxHeader) -> None:
    inputs = {name: kind for name, kind in header.inputs.items() if name not in header.initializers}
    for what, ends in (("input", inputs), ("output", header.outputs)):
        for name, kind in ends.items():
            if kind != "tensor":
                raise not_a_tensor(what, name, kind)
        if not ends:
            raise Unprocessable(
                f"The model has no {what}s. It must take at least one tensor and return at least "
                "one.",
                code="no_tensors",
            )


def not_a_tensor(what: str, name: str, kind: str) -> Unprocessable:
    """The refusal of an input or output that has no place in a request."""
    hint = {
        "string": "Turn texts into numbers outside the model.",
        "sequence": "Of a scikit-learn classifier, leave out the list of dictionaries:\n"
        '    to_onnx(model, X[:1], options={"zipmap": False})',
        "map": "Return tensors instead.",
        "optional": "Make it an ordinary tensor.",
    }.get(kind, "Use ordinary tensors.")
    return Unprocessable(
        f"The {what} {name[:80]!r} is a {kind}; only tensors of numbers have a place in a request. "
        f"{hint}",
        code="non_tensor",
    )


def _check_location(location: str) -> None:
    if MEMORY_MARKER not in location and "*" not in location and location.isprintable():
        try:
            return check_name(location)
        except Unprocessable:
            pass  # the message below says what to do
    raise Unprocessable(
        f"The model's weights lie at {location[:120]!r}, outside the upload. They may lie in files "
        "beside the model alone. Save it again:\n"
        '    onnx.save(model, "model.onnx", save_as_external_data=True, '
        'location="model.onnx.data")',
        code="external_data_path",
    )


def _damaged(detail: str) -> Unprocessable:
    return Unprocessable(
        f"The ONNX file is damaged or beyond what is read of one ({detail[:200]}). Export and "
        "upload it again.",
        code="onnx_damaged",
    )
