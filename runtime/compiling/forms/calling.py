"""How wire tensors become the arguments of a compiled graph, and its results wire tensors again.

Kept beside a form, so that a worker need not load the program to call it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.export import ExportedProgram

from runtime.compiling.forms.form import FormFailure, Run
from runtime.importing.signature import Leaf, read_signature
from runtime.protocol import Schema

CALLING_NAME = "calling.json"


class Calling(msgspec.Struct, frozen=True):
    """The dtypes of the graph's tensor arguments, whether each is laid out with channels last,
    the wire dtypes of the results, and whether the graph may write to its arguments."""

    input_dtypes: list[str]
    is_channels_last: list[bool]
    output_dtypes: list[str]
    writes_inputs: bool = False

    def prepare(self, inputs: Sequence[Tensor], device: str = "cpu") -> list[Tensor]:
        """Arguments as the graph was compiled for them: dtype, device and layout in memory."""
        if len(inputs) != len(self.input_dtypes):
            raise ValueError(f"{len(inputs)} inputs for a program of {len(self.input_dtypes)}")
        return [
            tensor.to(
                device,
                getattr(torch, dtype),
                copy=self.writes_inputs,
                memory_format=torch.channels_last if is_last else torch.contiguous_format,
            ).contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
            for tensor, dtype, is_last in zip(
                inputs, self.input_dtypes, self.is_channels_last, strict=True
            )
        ]

    def finish(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Results as they go on the wire."""
        return [
            output.detach().to("cpu", getattr(torch, dtype))
            for output, dtype in zip(outputs, self.output_dtypes, strict=True)
        ]

    def wrap(self, call: Callable[[list[Tensor]], Sequence[Tensor]], device: str = "cpu") -> Run:
        """A `Run` around a compiled graph's own call."""

        def run(inputs: list[Tensor]) -> list[Tensor]:
            with torch.inference_mode():
                return self.finish(call(self.prepare(inputs, device)))

        return run


def read_program_calling(program: ExportedProgram, schema: Schema) -> Calling:
    """How `program`, some precision of an upload of `schema`, is called. Raises `FormFailure` for
    arguments laid out in memory as no wire tensor can be."""
    leaves = [leaf for leaf in read_signature(program).inputs if leaf.spec]
    values = _argument_values(program)
    assert len(values) == len(leaves), "every tensor argument has a placeholder"
    return Calling(
        input_dtypes=[_dtype_name(leaf) for leaf in leaves],
        is_channels_last=[_is_channels_last(value) for value in values],
        output_dtypes=[spec.dtype for spec in schema.outputs],
        writes_inputs=_may_write(program),
    )


def save_calling(directory: Path, calling: Calling) -> None:
    (directory / CALLING_NAME).write_bytes(msgspec.json.encode(calling))


def load_calling(directory: Path) -> Calling:
    """Raises `FormFailure`."""
    try:
        return msgspec.json.decode((directory / CALLING_NAME).read_bytes(), type=Calling)
    except (OSError, msgspec.DecodeError) as error:
        raise FormFailure(f"{CALLING_NAME} of the form cannot be read: {error}.") from error


def _argument_values(program: ExportedProgram) -> list[Tensor]:
    names = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("val") for node in nodes if node.name in names]
    return [value for value in values if isinstance(value, Tensor)]


def _may_write(program: ExportedProgram) -> bool:
    """Whether any operator works in place: what it writes to may be a view of an argument."""
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    writes = any(schema is not None and schema.is_mutable for schema in schemas)
    return writes or bool(program.graph_signature.user_inputs_to_mutate)


def _dtype_name(leaf: Leaf) -> str:
    return str(leaf.dtype).removeprefix("torch.")


def _is_channels_last(value: Tensor) -> bool:
    if value.is_contiguous():
        return False
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return True
    raise FormFailure("The program was exported for inputs with gaps or swapped axes in memory.")
