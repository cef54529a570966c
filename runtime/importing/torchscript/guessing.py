"""Guesses what an input of a TorchScript module looks like from the first layer that reads it.

Only ever a suggestion to the owner: nothing is built of it.
"""

from collections.abc import Callable
from typing import Any

import torch

from runtime.importing.torchscript.module import lookup_rows, resolve
from runtime.protocol import InputHint

Axes = list[int | str]
UNKNOWN: Axes = ["batch", 3, 224, 224]

_PASSED = {"aten::to", "aten::contiguous", "aten::clone", "aten::detach", "aten::float"}


def guess_input(module: torch.jit.ScriptModule, name: str) -> InputHint:
    """The likeliest description of the input `name`."""
    if (rows := lookup_rows(module, name)) is not None:
        return InputHint(name, "int64", ["batch", "tokens"], 0, rows - 1)
    waiting = [
        value
        for value in module.inlined_graph.inputs()
        if value.debugName().partition(".")[0] == name
    ]
    while waiting:
        value = waiting.pop()
        for use in value.uses():
            node = use.user
            guess = _FIRST_LAYERS.get(node.kind())
            if guess is not None and (axes := guess(node, module)) is not None:
                return InputHint(name, "float32", axes)
            if node.kind() in _PASSED:
                waiting.append(node.output())
    return InputHint(name, "float32", UNKNOWN)


def _convolution(node: Any, module: torch.jit.ScriptModule) -> Axes | None:
    inputs = list(node.inputs())
    weight = resolve(inputs[1], module)
    if not isinstance(weight, torch.Tensor):
        return None
    groups_at = 8 if node.kind() == "aten::_convolution" else len(inputs) - 1
    groups = resolve(inputs[groups_at], module)
    channels = weight.shape[1] * (groups if isinstance(groups, int) else 1)
    sides: dict[int, Axes] = {1: [16000], 2: [224, 224], 3: [16, 112, 112]}
    return ["batch", channels, *sides.get(weight.dim() - 2, [])]


def _linear(node: Any, module: torch.jit.ScriptModule) -> Axes | None:
    weight = resolve(list(node.inputs())[1], module)
    return ["batch", weight.shape[-1]] if isinstance(weight, torch.Tensor) else None


_FIRST_LAYERS: dict[str, Callable[[Any, torch.jit.ScriptModule], Axes | None]] = {
    "aten::_convolution": _convolution,
    "aten::conv1d": _convolution,
    "aten::conv2d": _convolution,
    "aten::conv3d": _convolution,
    "aten::linear": _linear,
}
