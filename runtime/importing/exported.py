"""Loads a program that `torch.export.save` wrote and runs it on flat lists of tensors.

Loading such a file can run code: only ever called inside a sandboxed build or worker. The
archive's members are `pt2.py`'s to judge, names and axes `signature.py`'s.
"""

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from runtime.importing.program import ImportFailure
from runtime.importing.pt2 import check_pt2, is_pt2
from runtime.importing.signature import Leaf, Signature, read_signature
from runtime.importing.tensor_program import MAX_REFERENCE_BYTES
from runtime.importing.widening import widen
from runtime.protocol import Schema

logger = logging.getLogger(__name__)

# Where each operator of a training-time layer says that it is training.
_TRAINING_ARGUMENTS = {
    "aten.batch_norm.default": 5,
    "aten.instance_norm.default": 5,
    "aten.dropout.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.alpha_dropout.default": 2,
    "aten.rrelu.default": 3,
    "aten.native_dropout.default": 2,
    "aten.native_batch_norm.default": 5,
}


class ExportedProgramModel:
    """A loaded tensor program. Tensors go in and out in the order of `schema`; `state` holds its
    parameters, buffers and constants by name."""

    def __init__(self, program: ExportedProgram, signature: Signature) -> None:
        self.program = program
        self.signature = signature
        self._may_write_inputs = _may_write(program)
        self.schema: Schema = signature.schema
        self.notes: list[str] = [signature.batch_note] if signature.batch_note else []
        self.module = program.module()
        self.example_inputs = _example_inputs(program, signature)
        self.state = _state(self.module)
        self.num_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        self.weight_bytes = sum(tensor.nbytes for tensor in self.state.values())
        self._device = next((tensor.device for tensor in self.state.values()), torch.device("cpu"))

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs on the CPU in their wire dtypes. Whatever the graph raises, this raises."""
        with torch.inference_mode():
            outputs = self.call(self.module, inputs)
            return [
                output.detach().to("cpu", getattr(torch, spec.dtype))
                for output, spec in zip(outputs, self.schema.outputs, strict=True)
            ]

    def run_float64(self, batches: list[list[torch.Tensor]]) -> list[list[torch.Tensor]] | None:
        """What the graph gives in float64; None when it is too large or fixes a dtype somewhere."""
        if self.weight_bytes > MAX_REFERENCE_BYTES:
            return None
        try:
            module = widen(self.program)
            with torch.inference_mode():
                return [
                    [output.cpu() for output in self.call(module, inputs, torch.float64)]
                    for inputs in batches
                ]
        except Exception:  # many graphs fix a dtype somewhere; the floor then decides
            logger.info("the program does not run in float64", exc_info=True)
            return None

    def call(
        self,
        module: torch.nn.Module,
        inputs: list[torch.Tensor],
        float_dtype: torch.dtype | None = None,
    ) -> list[torch.Tensor]:
        """What `module`, some form of this graph, gives for `inputs`, with constants filled in.
        `float_dtype` replaces the dtype of floating inputs; outputs stay as they come."""
        tensors = iter(inputs)
        leaves = []
        for leaf in self.signature.inputs:
            if leaf.spec is None:
                leaves.append(leaf.constant)
                continue
            assert leaf.dtype is not None, "a tensor has a dtype"
            is_widened = float_dtype is not None and leaf.dtype.is_floating_point
            dtype = float_dtype if is_widened else leaf.dtype
            leaves.append(next(tensors).to(self._device, dtype, copy=self._may_write_inputs))
        in_spec = self.program.call_spec.in_spec
        assert in_spec is not None, "an exported program knows its inputs"
        args, kwargs = pytree.tree_unflatten(leaves, in_spec)
        results = pytree.tree_leaves(module(*args, **kwargs))
        pairs = zip(results, self.signature.outputs, strict=True)
        return [value for value, leaf in pairs if leaf.spec]


def load_exported(path: Path, device: str = "cpu") -> ExportedProgramModel:
    """Raises `ImportFailure` when the file is refused, or torch cannot load it."""
    with zipfile.ZipFile(path) as archive:
        if not is_pt2(archive):
            raise ImportFailure("pt2_damaged", "The file is not a program from torch.export.save.")
        check_pt2(archive, path.stat().st_size)
        _check_sample_inputs(archive)
    program = _load(path)
    _check_inference(program)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return ExportedProgramModel(program, read_signature(program))


def _load(path: Path) -> ExportedProgram:
    try:
        # A buffer, since torch warns about names that do not end in .pt2.
        with path.open("rb") as file:
            return torch.export.load(file)
    except Exception as error:
        reason = first_line(error)
        raise ImportFailure(
            "pt2_unloadable",
            f"torch {torch.__version__} cannot load the program: {reason}. If another version "
            "saved it, export it again with this one; custom operators are not available here.",
        ) from error


def first_line(error: BaseException) -> str:
    """An exception in one short line, for a message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300].rstrip('.')}" if text else type(error).__name__


def _check_sample_inputs(archive: zipfile.ZipFile) -> None:
    """torch falls back to a full unpickle when the example inputs do not load as plain tensors;
    such a program is refused before that."""
    for member in archive.infolist():
        if not member.filename.partition("/")[2].startswith("data/sample_inputs/"):
            continue
        try:
            if data := archive.read(member):
                torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:
            raise ImportFailure(
                "sample_inputs",
                "The program's example inputs hold more than plain tensors, and loading them would "
                "run code. Export again with tensors (in tuples, lists and dicts) as arguments.",
            ) from error


def _check_inference(program: ExportedProgram) -> None:
    """Refuses graphs captured in training mode, and graphs that write to their own tensors."""
    for node in program.graph.nodes:
        at = _TRAINING_ARGUMENTS.get(str(node.target))
        if node.op == "call_function" and at is not None and node.args[at : at + 1] == (True,):
            layer = str(node.target).split(".")[1].replace("_", " ")
            raise ImportFailure(
                "training_mode",
                f"The model was exported in training mode (its {layer} is still training), so its "
                "answers would be random or depend on other requests. Export again after "
                "model.eval():\n"
                "    program = torch.export.export(model.eval(), example, dynamic_shapes=...)\n"
                '    torch.export.save(program, "model.pt2")',
            )
    if mutated := sorted(program.graph_signature.buffers_to_mutate.values()):
        raise mutation_failure(mutated)


def mutation_failure(names: list[str]) -> ImportFailure:
    """The refusal of a program whose runs change what it is."""
    return ImportFailure(
        "stateful",
        f"The model changes its own tensors as it runs ({', '.join(names[:3])}), so one request "
        "would change the answers of the next. Keep such state outside the model, as an input "
        "and an output.",
    )


def _may_write(program: ExportedProgram) -> bool:
    """Whether any operator works in place: what it writes to may be a view of an input."""
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {**dict(module.named_parameters())}
    state.update(module.named_buffers())
    for prefix, owner in module.named_modules():
        constants = {name: v for name, v in vars(owner).items() if isinstance(v, torch.Tensor)}
        state.update({f"{prefix}.{name}".lstrip("."): v for name, v in constants.items()})
    return state


def _example_inputs(program: ExportedProgram, signature: Signature) -> list[torch.Tensor] | None:
    """The tensors the program was exported with, in the order of its schema; None when the file
    does not hold them."""
    if program.example_inputs is None:
        return None
    leaves = pytree.tree_leaves(program.example_inputs)
    if len(leaves) != len(signature.inputs):
        return None
    pairs = [
        (value, leaf) for value, leaf in zip(leaves, signature.inputs, strict=True) if leaf.spec
    ]
    if not all(_fits(value, leaf) for value, leaf in pairs):
        return None
    return [value for value, _ in pairs]


def _fits(value: Any, leaf: Leaf) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == len(leaf.axes)
        and value.dtype == leaf.dtype
        and all(
            not axis.is_Integer or int(axis) == size  # type: ignore[arg-type]
            for axis, size in zip(leaf.axes, value.shape, strict=True)
        )
    )
