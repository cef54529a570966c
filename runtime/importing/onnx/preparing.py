"""Makes an uploaded ONNX file one that a worker can load as it is: names of other files, shapes
that it leaves out, and a batch that it fixes at 1.

Its operators and weights stay as they are. Only ever used in a build.
"""

import logging
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto

from runtime.importing.onnx.reading import read_onnx, real_inputs
from runtime.importing.onnx.session import OnnxRunError, make_session, run_session
from runtime.importing.onnx.tensors import (
    DTYPES,
    constants_of,
    find_file,
    is_external,
    place_of,
    tensors_of,
)
from runtime.importing.program import ImportFailure
from runtime.protocol import BuildHints, InputHint

logger = logging.getLogger(__name__)

FILES_DIRECTORY = "program.data"  # of a program's other files, beside it
MAX_INLINE_BYTES = 1024
BATCH = "batch"
PROBE_SIZE = 8  # of a dynamic axis, to see what comes out
BATCH_NOTE = (
    "The file fixes the batch at 1. Its first axis was made dynamic, and the proof found every "
    "row's answer the same, so that requests can share runs."
)


class Prepared(msgspec.Struct, frozen=True):
    """`path` is the model as uploaded; `batched` the same with a dynamic batch, where the upload
    fixes it at 1 and more rows run: whether their answers are right is the proof's to say. `used`
    are the names of the upload's files that are part of the model."""

    path: Path
    batched: Path | None
    used: set[str]


def prepare_onnx(path: Path, scratch: Path, hints: BuildHints) -> Prepared:
    """Files to load instead of the upload at `path`, in `scratch` where the upload itself does not
    do; other files it may have only inside `scratch`. Raises `ImportFailure`."""
    may_have_files = path.is_relative_to(scratch)
    model = read_onnx(path, may_have_files=may_have_files)
    directory = Path(tempfile.mkdtemp(dir=scratch))
    used = _gather_files(model, path.parent, directory)
    is_changed = _free_axes(model) or bool(used)
    is_changed = _complete_inputs(model, hints) or is_changed
    if any(_lacks_shape(value) for value in model.graph.output):
        _complete_outputs(model, _write(model, directory / "program.onnx"))
        is_changed = True
    is_changed = _name_batch(model) or is_changed
    plain = _write(model, directory / "program.onnx") if is_changed else path
    return Prepared(plain, _make_batched(model, plain, directory), used)


def _write(model: ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


# --- other files ------------------------------------------------------------------------


def _gather_files(model: ModelProto, source: Path, directory: Path) -> set[str]:
    """Moves the files that tensors lie in to `directory` and renames them there; small tensors,
    which may be shapes that ONNX Runtime wants to see, go into the model. Returns the top names of
    where they were."""
    places = [(tensor, place_of(tensor)) for tensor in tensors_of(model) if is_external(tensor)]
    new_names: dict[Path, str] = {}
    used: set[str] = set()
    for tensor, place in places:
        found = find_file(place, source)
        used.add(found.relative_to(source).parts[0])
        del tensor.external_data[:]
        if place.num_bytes <= MAX_INLINE_BYTES:
            tensor.ClearField("data_location")
            with found.open("rb") as file:
                file.seek(place.offset)
                tensor.raw_data = file.read(place.num_bytes)
            continue
        new_names.setdefault(found, f"{FILES_DIRECTORY}/{len(new_names)}")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {
            "location": new_names[found],
            "offset": str(place.offset),
            "length": str(place.num_bytes),
        }
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    if new_names:
        (directory / FILES_DIRECTORY).mkdir()
    for found, name in new_names.items():
        found.rename(directory / name)
    return used


# --- shapes -----------------------------------------------------------------------------


def _lacks_shape(value: ValueInfoProto) -> bool:
    return not value.type.tensor_type.HasField("shape")


def _free_axes(model: ModelProto) -> bool:
    """Sizes of 0 and -1, which some exporters write for dynamic axes, are left out. Returns whether
    there were any."""
    is_changed = False
    for value in [*real_inputs(model), *model.graph.output]:
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_value") and axis.dim_value <= 0:
                axis.ClearField("dim_value")
                is_changed = True
    return is_changed


def _complete_inputs(model: ModelProto, hints: BuildHints) -> bool:
    """Shapes that the file leaves out, as the owner says them. Returns whether there were any."""
    by_name = {hint.name: hint for hint in hints.inputs}
    is_changed = False
    for value in real_inputs(model):
        if _lacks_shape(value):
            is_changed = True
            if (hint := by_name.get(value.name)) is None:
                raise ImportFailure(
                    "no_shape",
                    f"The file does not say the shape of the input {value.name[:80]!r}. Say it as "
                    f"an input: {value.name[:80]}: float32[batch,3,224,224]",
                    param="inputs",
                )
            _set_axes(value, hint)
    return is_changed


def _set_axes(value: ValueInfoProto, hint: InputHint) -> None:
    shape = value.type.tensor_type.shape
    shape.SetInParent()
    for axis in hint.axes:
        if isinstance(axis, int):
            shape.dim.add(dim_value=axis)
        else:
            shape.dim.add(dim_param=axis)


def _complete_outputs(model: ModelProto, path: Path) -> None:
    """Shapes that the file leaves out: as ONNX Runtime infers them, or as a run shows them."""
    session = make_session(path, device="cpu", num_threads=torch.get_num_threads())
    inferred = {output.name: output.shape for output in session.get_outputs()}
    names = [value.name for value in model.graph.output]
    seen: list[list[int]] | None = None
    for index, value in enumerate(model.graph.output):
        if not _lacks_shape(value):
            continue
        axes = inferred.get(value.name) or []
        if not axes:  # no shape, or a scalar's
            if seen is None:
                inputs = _probe(model, 2)
                outputs = run_session(session, [*inputs], [*inputs.values()], names)
                seen = [list(output.shape) for output in outputs]
            axes = [None] * len(seen[index])
        shape = value.type.tensor_type.shape
        shape.SetInParent()
        for axis in axes:
            dimension = shape.dim.add()
            if isinstance(axis, int):
                dimension.dim_value = axis
            elif axis and not axis.startswith("unk__"):  # ONNX Runtime's word for unnamed
                dimension.dim_param = axis


def _name_batch(model: ModelProto) -> bool:
    """Gives first axes without a name or size that of the batch, where all inputs' first axes are
    dynamic: the proof says whether they are the batch. Returns whether there were any."""
    firsts = [value.type.tensor_type.shape.dim[:1] for value in real_inputs(model)]
    if not all(firsts) or any(first[0].HasField("dim_value") for first in firsts):
        return False
    name = next((first[0].dim_param for first in firsts if first[0].dim_param), BATCH)
    outputs = [value.type.tensor_type.shape.dim[:1] for value in model.graph.output]
    unnamed = [
        first[0] for first in [*firsts, *outputs] if first and not first[0].WhichOneof("value")
    ]
    for dimension in unnamed:
        dimension.dim_param = name
    return bool(unnamed)


def _probe(model: ModelProto, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Small random inputs with `rows` rows, in the graph's own dtypes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for value in real_inputs(model):
        sizes = [
            axis.dim_value if axis.dim_value > 0 else (PROBE_SIZE if at else rows)
            for at, axis in enumerate(value.type.tensor_type.shape.dim)
        ]
        dtype = DTYPES[value.type.tensor_type.elem_type]
        if dtype.is_floating_point:
            inputs[value.name] = torch.randn(sizes, generator=generator).to(dtype)
        else:
            inputs[value.name] = torch.randint(0, 2, sizes, generator=generator).to(dtype)
    return inputs


# --- a fixed batch ----------------------------------------------------------------------


def _make_batched(model: ModelProto, plain: Path, directory: Path) -> Path | None:
    """The same graph with a dynamic batch, if the file fixes it at 1 and several rows run through.
    Shapes written into the graph as constants are tried as they are, then with a first size of 1
    taken from the batch."""
    ends = [*real_inputs(model), *model.graph.output]
    if not all(_is_one(value) for value in ends):
        return None
    for is_reshaped in (False, True):
        batched = ModelProto()
        batched.CopyFrom(model)
        for value in [*real_inputs(batched), *batched.graph.output]:
            value.type.tensor_type.shape.dim[0].dim_param = BATCH
        del batched.graph.value_info[:]
        if is_reshaped and not _free_reshapes(batched):
            break
        path = _write(batched, directory / "batched.onnx")
        if _takes_rows(model, plain, path):
            return path
        path.unlink()
    return None


def _is_one(value: ValueInfoProto) -> bool:
    axes = value.type.tensor_type.shape.dim
    return len(axes) > 0 and axes[0].dim_value == 1


def _free_reshapes(model: ModelProto) -> bool:
    """Constant shapes `[1, ...]` become `[0, ...]`, which takes the first size from the input.
    Returns whether there were any."""
    constants = constants_of(model)
    has_changed = False
    for node in model.graph.node:
        tensor = constants.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type != "Reshape" or tensor is None or is_external(tensor):
            continue
        sizes = onnx.numpy_helper.to_array(tensor).astype(np.int64)
        zeros = [each for each in node.attribute if each.name == "allowzero"]
        if any(each.i for each in zeros) and not sizes.all():
            continue  # a 0 means no values there
        if sizes.ndim == 1 and len(sizes) > 1 and sizes[0] == 1:
            for attribute in zeros:
                node.attribute.remove(attribute)
            sizes[0] = 0
            name = f"{node.output[0]}__batched_shape"
            model.graph.initializer.append(onnx.numpy_helper.from_array(sizes, name))
            node.input[1] = name
            has_changed = True
    return has_changed


def _takes_rows(model: ModelProto, plain: Path, batched: Path) -> bool:
    """Whether one row gives the very same answer, and two and three give as many each."""
    names = [value.name for value in model.graph.output]
    threads = torch.get_num_threads()
    try:
        before = make_session(plain, device="cpu", num_threads=threads)
        after = make_session(batched, device="cpu", num_threads=threads)
        one = _probe(model, 1)
        expected = run_session(before, [*one], [*one.values()], names)
        found = run_session(after, [*one], [*one.values()], names)
        for left, right in zip(expected, found, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
        for rows in (2, 3):
            many = {
                name: tensor.expand(rows, *tensor.shape[1:]).contiguous()
                for name, tensor in one.items()
            }
            outputs = run_session(after, [*many], [*many.values()], names)
            pairs = zip(outputs, expected, strict=True)
            if any(output.shape != (rows, *single.shape[1:]) for output, single in pairs):
                return False
    except (ImportFailure, OnnxRunError, AssertionError):
        logger.info("the batch cannot be made dynamic", exc_info=True)
        return False
    return True
