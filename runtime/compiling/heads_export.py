"""Exports transformers' models with a head as tensor programs: tensors in, logits out by name.

Does not load models, and does not judge what comes out.
"""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from runtime.importing.exported import first_line
from runtime.importing.heads import BATCH, HeadInput, HeadModel
from runtime.importing.program import ImportFailure

logger = logging.getLogger(__name__)

EXAMPLE_ROWS = 2


class NamedLogits(nn.Module):
    """The model called by its inputs' names; of its outputs, those that are logits. Floats come
    in the wire's dtype, whatever dtype the weights have."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    # By name, since torch.export takes the names of a program's inputs from here.
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "input_features": input_features,
        }
        dtype = next(self.module.parameters()).dtype
        cast = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in given.items()
            if tensor is not None
        }
        output: Any = self.module(**cast, return_dict=True)
        return {name: value for name, value in output.items() if name.endswith("logits")}


def example_inputs(model: HeadModel, rows: int = EXAMPLE_ROWS) -> dict[str, Tensor]:
    """By name, of the sizes that `bounds` names; integers span what the model takes, and masks are
    of ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = {BATCH: rows} | {name: size for name, (_, _, size) in model.bounds.items()}
    return {each.name: _example(each, sizes, generator) for each in model.inputs}


def _example(each: HeadInput, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in each.axes]
    if each.most is None:
        return torch.randn(shape, generator=generator)
    if each.name == "attention_mask":
        return torch.ones(shape, dtype=torch.long)
    values = torch.randint(each.most + 1, shape, generator=generator)
    values.view(-1)[0], values.view(-1)[-1] = 0, each.most
    return values


def export_head(model: HeadModel) -> ExportedProgram:
    """With a dynamic batch and dynamic lengths; with a batch of one where torch can export no
    other. Raises `ImportFailure` with the first reason where it can export none."""
    reason: Exception | None = None
    for rows, options in _ways(model.max_rows):
        try:
            return _export(model, rows, options)
        except Exception as error:  # noqa: BLE001 - the model's own code runs here
            logger.info("an export failed: %s", first_line(error))
            reason = reason or error
    assert reason is not None, "there is at least one way"
    raise ImportFailure(
        "export_failed",
        f"{type(model.module).__name__} cannot be exported as a graph: {first_line(reason)}. "
        "Models are served as graphs, whose control flow must not depend on values.",
    ) from reason


def _ways(max_rows: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Examples' rows, and options: plain; with conditions on sizes checked as the graph runs
    (convolutions over time ask for some); and for one row at a time."""
    deferred = {"prefer_deferred_runtime_asserts_over_guards": True}
    if max_rows is None or max_rows >= EXAMPLE_ROWS:
        yield EXAMPLE_ROWS, {}
        yield EXAMPLE_ROWS, deferred
    yield 1, deferred


def _export(model: HeadModel, rows: int, options: dict[str, Any]) -> ExportedProgram:
    names = {name: Dim(name, min=low, max=high) for name, (low, high, _) in model.bounds.items()}
    if rows > 1:
        names[BATCH] = Dim(BATCH, min=1, max=model.max_rows)
    shapes = {
        each.name: {at: names[axis] for at, axis in enumerate(each.axes) if axis in names}
        for each in model.inputs
    }
    examples = example_inputs(model, rows)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            NamedLogits(model.module).eval(),
            (),
            examples,
            dynamic_shapes=shapes,
            strict=False,
            **options,
        )
    if rows > 1:
        _try_one_row(program, model)
    return program


def _try_one_row(program: ExportedProgram, model: HeadModel) -> None:
    """torch may have settled for batches of more than one without saying so."""
    with torch.inference_mode():
        program.module()(**example_inputs(model, 1))
