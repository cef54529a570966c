"""A TorchScript module as a tensor program: called with flat lists of tensors, served as it is.

Its schema is what `probing.py` found, kept beside it in an artifact so that a worker need not
find it again.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import sympy
import torch
from torch.jit._fuser import optimized_execution
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from runtime.importing.examples import Arrays, pick_arrays
from runtime.importing.program import ImportFailure
from runtime.importing.signature import WIRE_DTYPES, Leaf, Signature, axis_bounds, find_batch
from runtime.importing.tensor_program import MAX_REFERENCE_BYTES
from runtime.importing.torchscript.arguments import (
    Argument,
    flatten_result,
    make_call,
    read_arguments,
)
from runtime.importing.torchscript.description import describe_inputs
from runtime.importing.torchscript.module import (
    DEPRECATED,
    check_module,
    load_module,
    lookup_rows,
    module_state,
)
from runtime.importing.torchscript.probing import Description, probe, symbol
from runtime.protocol import BuildHints, InputHint, Schema, TensorSpec

logger = logging.getLogger(__name__)

MODULE_NAME = "program.pt"
DESCRIPTION_NAME = "torchscript.json"

BATCH_LINES = (
    "    traced = torch.jit.trace(model.eval(), example)  # sizes taken from x.shape, no numbers\n"
    "or export the model instead, with a batch of 2 in the example:\n"
    '    batch = {0: torch.export.Dim("batch")}  # one of these for each input\n'
    "    program = torch.export.export(model.eval(), example, dynamic_shapes=(batch,))\n"
    '    torch.export.save(program, "model.pt2")'
)


class TorchScriptProgram:
    """A loaded module with its description. There is no graph that torch could compile."""

    program = None

    def __init__(
        self, path: Path, module: torch.jit.ScriptModule, description: Description
    ) -> None:
        self.path = path
        self.module = module
        self.description = description
        self.arguments: list[Argument] = read_arguments(module)
        self.state = module_state(module)
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        self.weight_bytes = sum(tensor.nbytes for tensor in self.state.values())
        self.signature = _signature(description)
        self.schema: Schema = self.signature.schema
        self.notes: list[str] = [*description.notes]
        if self.signature.batch_note:
            self.notes.append(self.signature.batch_note)
        self.example_inputs: list[torch.Tensor] | None = None
        self._device = next((tensor.device for tensor in self.state.values()), torch.device("cpu"))

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs on the CPU in their wire dtypes. Whatever the module raises, this raises."""
        dtypes = [leaf.dtype for leaf in self.signature.inputs]
        # Copies, since a module may write to what it is given.
        given = [
            tensor.to(self._device, dtype, copy=True)
            for tensor, dtype in zip(inputs, dtypes, strict=True)
        ]
        _, outputs = call_module(self.module, self.arguments, self._names, given)
        return [
            output.detach().to("cpu", getattr(torch, spec.dtype))
            for output, spec in zip(outputs, self.schema.outputs, strict=True)
        ]

    def run_float64(self, batches: list[list[torch.Tensor]]) -> list[list[torch.Tensor]] | None:
        """The outputs of a copy in float64; None where the code fixes a dtype."""
        if self.weight_bytes > MAX_REFERENCE_BYTES:
            return None
        try:
            wide = load_module(self.path).double()
            results = []
            for inputs in batches:
                given = [x.double() if x.is_floating_point() else x.clone() for x in inputs]
                _, outputs = call_module(wide, self.arguments, self._names, given)
                results.append([output.cpu() for output in outputs])
        except Exception:  # many modules fix a dtype somewhere; the floor then decides
            logger.info("the module does not run in float64", exc_info=True)
            return None
        return results

    def sample_call(self) -> tuple[object, ...]:
        """Positional arguments of forward that are known to run, their varying axes at least 2."""
        tensors = []
        for hint in self.description.inputs:
            shape = [_size(axis, self.description.sizes) for axis in hint.axes]
            least = int(hint.minimum or 0)
            tensors.append(torch.full(shape, least, dtype=getattr(torch, hint.dtype)))
        return make_call(self.arguments, self._names, tensors)

    def save(self, artifact_dir: Path) -> None:
        """Writes module and description into an artifact."""
        shutil.copyfile(self.path, artifact_dir / MODULE_NAME)
        (artifact_dir / DESCRIPTION_NAME).write_bytes(msgspec.json.encode(self.description))

    @property
    def _names(self) -> list[str]:
        return [hint.name for hint in self.description.inputs]


def import_torchscript(
    path: Path, hints: BuildHints, examples: Arrays | None
) -> TorchScriptProgram:
    """The module of an upload. Raises `ImportFailure`: its code is `needs_inputs` if neither hints
    nor examples say enough of its inputs."""
    module = load_module(path)
    check_module(module)
    arguments = read_arguments(module)
    described = describe_inputs(module, arguments, hints, examples)
    described = [_with_lookup(module, hint) for hint in described]
    names = [hint.name for hint in described]
    arrays = None
    if examples is not None:
        arrays = pick_arrays(examples, names)
        _check_arrays(arrays, described)

    def call(tensors: list[torch.Tensor]) -> tuple[list[str], list[torch.Tensor]]:
        return call_module(module, arguments, names, tensors)

    program = TorchScriptProgram(path, module, probe(described, call, arrays))
    program.notes.insert(0, DEPRECATED)
    return program


def load_torchscript(artifact_dir: Path, device: str = "cpu") -> TorchScriptProgram:
    """The module that a build packaged. Raises `ImportFailure`."""
    path = artifact_dir / MODULE_NAME
    description = msgspec.json.decode(
        (artifact_dir / DESCRIPTION_NAME).read_bytes(), type=Description
    )
    return TorchScriptProgram(path, load_module(path, device), description)


def call_module(
    module: torch.jit.ScriptModule,
    arguments: Sequence[Argument],
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
) -> tuple[list[str], list[torch.Tensor]]:
    """Names and tensors of what forward gives."""
    # Without profiling: an answer must not depend on which run it is.
    with torch.inference_mode(), optimized_execution(False):
        return flatten_result(module(*make_call(arguments, names, tensors)))


def _with_lookup(module: torch.jit.ScriptModule, hint: InputHint) -> InputHint:
    """With the rows of the table that an integer input indexes as its range, if none was said."""
    is_integer = hint.dtype in ("int64", "int32")
    if not is_integer or hint.minimum is not None or hint.maximum is not None:
        return hint
    rows = lookup_rows(module, hint.name)
    return msgspec.structs.replace(hint, minimum=0, maximum=rows - 1) if rows else hint


def _check_arrays(arrays: Sequence[torch.Tensor], hints: Sequence[InputHint]) -> None:
    for tensor, hint in zip(arrays, hints, strict=True):
        sizes = zip(hint.axes, tensor.shape, strict=False)
        is_alike = WIRE_DTYPES[getattr(torch, hint.dtype)] == WIRE_DTYPES[tensor.dtype]
        if (
            not is_alike
            or len(hint.axes) != tensor.dim()
            or any(isinstance(axis, int) and axis != size for axis, size in sizes)
        ):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ImportFailure(
                "examples",
                f"examples.npz gives {hint.name!r} as {dtype} of shape {list(tensor.shape)}; it is "
                f"said to be `{hint.text}`.",
            )


# --- the signature ----------------------------------------------------------------------


def _signature(description: Description) -> Signature:
    ranges: dict[sympy.Symbol, ValueRanges[sympy.Expr]] = {}
    for hint in description.inputs:
        for axis in hint.axes:
            if isinstance(axis, str):
                ranges.setdefault(symbol(axis), ValueRanges(1, int_oo))
        for axis, (least, most) in hint.bounds.items():
            ranges[symbol(axis)] = ValueRanges(least, int_oo if most is None else most)
    inputs = [
        _leaf(
            hint.name,
            getattr(torch, hint.dtype),
            [symbol(axis) if isinstance(axis, str) else sympy.Integer(axis) for axis in hint.axes],
            ranges,
            hint,
        )
        for hint in description.inputs
    ]
    outputs = [
        _leaf(
            output.name,
            getattr(torch, output.dtype),
            [axis.expression() for axis in output.axes],
            ranges,
        )
        for output in description.outputs
    ]
    batch, note = find_batch(inputs, outputs, ranges, BATCH_LINES)
    schema = Schema(
        inputs=[leaf.spec for leaf in inputs if leaf.spec],
        outputs=[leaf.spec for leaf in outputs if leaf.spec],
        is_batched=bool(batch),
    )
    return Signature(
        schema=schema,
        inputs=inputs,
        outputs=outputs,
        ranges=ranges,
        batch=frozenset(batch),
        batch_note=note,
    )


def _leaf(
    name: str,
    dtype: torch.dtype,
    axes: Sequence[sympy.Expr],
    ranges: dict[sympy.Symbol, ValueRanges[sympy.Expr]],
    hint: InputHint | None = None,
) -> Leaf:
    bounds = [axis_bounds(axis, ranges) for axis in axes]
    is_dynamic = any(not axis.is_Integer for axis in axes)
    spec = TensorSpec(
        name=name,
        dtype=WIRE_DTYPES[dtype],
        shape=[int(axis) if axis.is_Integer else None for axis in axes],  # type: ignore[arg-type]
        min_shape=[least for least, _ in bounds] if is_dynamic else None,
        max_shape=[most for _, most in bounds] if is_dynamic else None,
        minimum=hint.minimum if hint else None,
        maximum=hint.maximum if hint else None,
    )
    return Leaf(spec=spec, dtype=dtype, axes=tuple(axes))


def _size(axis: int | str, sizes: dict[str, int]) -> int:
    return sizes[axis] if isinstance(axis, str) else axis
