"""Makes an exported program of a TorchScript module, so that it can be compiled like any other.

torch's converter is not always right, so what comes of it is only used once it is proved equal
to the module, which is the build's business.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch._export.converter import TS2EPConverter
from torch.export import Dim, ExportedProgram

from runtime.importing.exported import ExportedProgramModel, first_line, load_exported
from runtime.importing.knowledge import set_schema
from runtime.importing.torchscript.arguments import make_call
from runtime.importing.torchscript.program import TorchScriptProgram
from runtime.protocol import Schema, TensorSpec

NOISY = ("torch._export.converter", "torch._export.non_strict_utils", "torch.export")


class ConversionFailure(Exception):
    """The module cannot be made an exported program; the text says why in one plain sentence."""


class _Converter(TS2EPConverter):
    """Exports with the axes that are dynamic, and no others."""

    def __init__(
        self, module: torch.jit.ScriptModule, call: tuple[object, ...], dynamic_shapes: Any
    ) -> None:
        super().__init__(module, call)
        self._dynamic_shapes = dynamic_shapes

    def retrace_as_exported_program(
        self, gm: torch.fx.GraphModule, name_to_constant: dict[str, Any]
    ) -> ExportedProgram:
        # torch's own marks every axis as dynamic.
        return torch.export.export(
            gm, self.sample_args, dynamic_shapes=self._dynamic_shapes, strict=False
        )


def convert(model: TorchScriptProgram, path: Path) -> ExportedProgramModel:
    """Writes the exported program to `path` and loads it from there, as a worker will. Raises
    `ConversionFailure`."""
    try:
        with _quiet():
            call = model.sample_call()
            converter = _Converter(model.module, call, _dynamic_shapes(model))
            program = converter.convert()
            _drop_unused(program)
            torch.export.save(program, path)
        converted = load_exported(path)
    # The converter is experimental and raises whatever it stumbles over.
    except Exception as error:
        logging.getLogger(__name__).info("the module was not converted", exc_info=True)
        raise ConversionFailure(f"torch's converter fails ({first_line(error)})") from error
    set_schema(converted, _merge(model.schema, converted.schema))
    # What is said of it is said in the module's own names.
    note = model.signature.batch_note
    converted.signature = msgspec.structs.replace(converted.signature, batch_note=note)
    converted.notes = [*model.description.notes, *([note] if note else [])]
    # Parameters have become buffers.
    converted.num_parameters = model.num_parameters
    return converted


def _dynamic_shapes(model: TorchScriptProgram) -> Any:
    """For each argument of forward, in its structure: which axes are dynamic."""
    axes = []
    for hint in model.description.inputs:
        bounds = {
            name: Dim.AUTO(min=least if least > 1 else None, max=most)
            for name, (least, most) in hint.bounds.items()
        }
        axes.append(
            [bounds.get(axis, Dim.AUTO) if isinstance(axis, str) else None for axis in hint.axes]
        )
    names = [hint.name for hint in model.description.inputs]
    shapes = make_call(model.arguments, names, axes)
    return tuple(
        None if argument.kind == "constant" else shape
        for argument, shape in zip(model.arguments, shapes, strict=True)
    )


def _drop_unused(program: ExportedProgram) -> None:
    """The converter adds weights that no operator reads."""
    used = {spec.target for spec in program.graph_signature.input_specs}
    for name in [name for name in program.state_dict if name not in used]:
        del program.state_dict[name]


def _merge(original: Schema, converted: Schema) -> Schema:
    """The converted program's schema, with the names and values of the original's. Raises
    `ConversionFailure` for one that takes or gives something else."""
    if original.is_batched and not converted.is_batched:
        raise ConversionFailure("the rows of the converted program cannot share a run")
    return Schema(
        inputs=_merge_specs(original.inputs, converted.inputs),
        outputs=_merge_specs(original.outputs, converted.outputs),
        is_batched=converted.is_batched,
    )


def _merge_specs(original: list[TensorSpec], converted: list[TensorSpec]) -> list[TensorSpec]:
    if len(original) != len(converted):
        raise ConversionFailure("the converted program has other inputs or outputs")
    for spec, other in zip(original, converted, strict=True):
        if (spec.dtype, len(spec.shape)) != (other.dtype, len(other.shape)):
            raise ConversionFailure(f"the converted program has another {spec.name!r}")
        if [size is None for size in spec.shape] != [size is None for size in other.shape]:
            raise ConversionFailure(
                f"the converted program fixes sizes of {spec.name!r} that may vary"
            )
    return [
        # What varies is the same; how far, the module's own runs and its owner say.
        spec if spec.max_shape is None else _tighter(spec, other)
        for spec, other in zip(original, converted, strict=True)
    ]


def _tighter(spec: TensorSpec, other: TensorSpec) -> TensorSpec:
    """`spec`, with sizes that both allow."""
    assert spec.min_shape is not None, "dynamic axes have bounds"
    assert spec.max_shape is not None, "dynamic axes have bounds"
    least = [max(pair) for pair in zip(spec.min_shape, other.min_shape or [], strict=True)]
    most = [
        min((size for size in pair if size is not None), default=None)
        for pair in zip(spec.max_shape, other.max_shape or [], strict=True)
    ]
    return TensorSpec(
        name=spec.name,
        dtype=spec.dtype,
        shape=spec.shape,
        min_shape=least,
        max_shape=most,
        minimum=spec.minimum,
        maximum=spec.maximum,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of a converter that is used on purpose."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
