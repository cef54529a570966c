"""Loads a TorchScript module and looks into its graph: training mode, state that it changes.

Runs nothing. How its inputs become a schema is `probing.py`'s.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from runtime.importing.exported import first_line, mutation_failure
from runtime.importing.formats import EXPORT_LINES
from runtime.importing.program import ImportFailure

DEPRECATED = (
    "This is TorchScript, which PyTorch has deprecated and does not support from Python 3.14 on. "
    f"Export the model that it was made from instead:\n{EXPORT_LINES}"
)

# Where each operator says that it is training.
_TRAINING_ARGUMENTS = {
    "aten::batch_norm": 5,
    "aten::instance_norm": 5,
    "aten::native_batch_norm": 5,
    "aten::dropout": 2,
    "aten::dropout_": 2,
    "aten::feature_dropout": 2,
    "aten::feature_dropout_": 2,
    "aten::alpha_dropout": 2,
    "aten::alpha_dropout_": 2,
    "aten::feature_alpha_dropout": 2,
    "aten::native_dropout": 2,
    "aten::rrelu": 3,
    "aten::rrelu_": 3,
}


def load_module(path: Path, device: str = "cpu") -> torch.jit.ScriptModule:
    """Raises `ImportFailure` when torch cannot load it."""
    if sys.version_info >= (3, 14):
        raise ImportFailure("torchscript_unsupported", DEPRECATED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated is told to its owner instead
            module = torch.jit.load(str(path), map_location=device)
    except Exception as error:
        raise ImportFailure(
            "torchscript_unloadable",
            f"torch {torch.__version__} cannot load the TorchScript module: {first_line(error)}. "
            f"Custom operators and classes are not available here. {DEPRECATED}",
        ) from error
    return module


def check_module(module: torch.jit.ScriptModule) -> None:
    """Raises `ImportFailure` for a module in training mode, or one that changes itself."""
    nodes = list(_nodes(module.inlined_graph))
    trained = [node for node in nodes if _is_training(node, module)]
    if trained:
        kind = trained[0].kind().rpartition(":")[2].replace("_", " ").strip()
        what = "it asks whether it is training, and is" if kind == "GetAttr" else f"its {kind}"
        raise ImportFailure(
            "training_mode",
            f"The model was saved in training mode ({what}), so its answers would be random or "
            "depend on other requests. Save it again after model.eval():\n"
            f"{EXPORT_LINES}",
        )
    if changed := [node.s("name") for node in nodes if node.kind() == "prim::SetAttr"]:
        raise mutation_failure(sorted(set(changed)))


def module_state(module: torch.jit.ScriptModule) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def lookup_rows(module: torch.jit.ScriptModule, name: str) -> int | None:
    """The rows of the smallest embedding that the input `name` of forward indexes directly."""
    limits = []
    for node in _nodes(module.inlined_graph):
        inputs = list(node.inputs())
        if node.kind() == "aten::embedding" and _source(inputs[1]) == name:
            weight = resolve(inputs[0], module)
            if isinstance(weight, torch.Tensor):
                limits.append(weight.shape[0])
    return min(limits, default=None)


def resolve(value: Any, module: torch.jit.ScriptModule) -> Any:
    """What an attribute or constant of the graph is; None for what only a run knows."""
    node = value.node()
    if node.kind() == "prim::Constant":
        return value.toIValue()
    if node.kind() != "prim::GetAttr":
        return module if node.kind() == "prim::Param" and _is_self(value) else None
    owner = resolve(next(iter(node.inputs())), module)
    return getattr(owner, node.s("name"), None) if owner is not None else None


def _is_self(value: Any) -> bool:
    return value.type().kind() == "ClassType"


def _source(value: Any) -> str:
    """The name of the input that `value` is, casts and copies aside; empty for other values."""
    node = value.node()
    while node.kind() in ("aten::to", "aten::contiguous", "aten::clone", "aten::detach"):
        value = next(iter(node.inputs()))
        node = value.node()
    # A saved graph numbers its values: `ids.1`.
    return value.debugName().partition(".")[0] if node.kind() == "prim::Param" else ""


def _is_training(node: Any, module: torch.jit.ScriptModule) -> bool:
    if node.kind() == "prim::GetAttr" and node.s("name") == "training":
        return resolve(node.output(), module) is True
    at = _TRAINING_ARGUMENTS.get(node.kind())
    inputs = list(node.inputs())
    return at is not None and at < len(inputs) and resolve(inputs[at], module) is True


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)
