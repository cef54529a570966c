"""Writes a graph as one straight function over its constants, for the least Python per step.

torch.fx's own code looks up each weight through its module and calls each submodule through
`nn.Module.__call__`, which costs as much as a small product.
"""

import linecache
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from runtime.compiling.fusions.evaluated import fetch


class _Writer:
    """Collects the lines of the function and the names that they read."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": float("inf")}
        self._known: dict[int, str] = {}

    def name_of(self, prefix: str, value: Any) -> str:
        """A global name for an object; equal for the same object."""
        name = self._known.get(id(value))
        if name is None:
            name = self._known[id(value)] = f"{prefix}{len(self._known)}"
            self.names[name] = value
        return name

    def expression(self, node: fx.Node) -> str:
        args = [self.argument(each) for each in node.args]
        args += [f"{key}={self.argument(each)}" for key, each in node.kwargs.items()]
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join(args[1:])})"
        if node.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        if node.op == "call_module":
            called: Any = self.module.get_submodule(str(node.target))
            function = self._function_of(called)
        else:
            function = self.name_of("FUNCTION_", node.target)
        return f"{function}({', '.join(args)})"

    def _function_of(self, module: nn.Module) -> str:
        name = self._known.get(id(module))
        if name is None:
            name = self._known[id(module)] = f"MODULE_{len(self._known)}"
            self.names[name] = module.forward
        return name

    def argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self.name_of("CONSTANT_", fetch(self.module, str(value.target)))
            return value.name
        if isinstance(value, (list, tuple)):
            inside = "".join(f"{self.argument(each)}, " for each in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        return self.name_of("VALUE_", value)


def straight_function(module: fx.GraphModule) -> Callable[..., Any]:
    """The module's graph as a function of its placeholders. Tensors and submodules are bound as
    they are now; what replaces them in the module later is not seen."""
    writer = _Writer(module)
    last_use: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        for each in node.all_input_nodes:
            last_use[each] = node
    parameters: list[str] = []
    lines: list[str] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            parameters.append(node.name)
        elif node.op == "output":
            lines.append(f"    return {writer.argument(node.args[0])}")
        elif node.op != "get_attr":
            lines.append(f"    {node.name} = {writer.expression(node)}")
        inputs = [each for each in node.all_input_nodes if each.op != "get_attr"]
        ended = [each.name for each in inputs if last_use[each] is node]
        if ended and node.op != "output":  # large prompts need their memory back
            lines.append(f"    del {', '.join(ended)}")
    source = "\n".join([f"def forward({', '.join(parameters)}):", *lines, ""])
    file_name = f"<fused decoder {id(module)}>"
    linecache.cache[file_name] = (len(source), None, source.splitlines(True), file_name)
    exec(compile(source, file_name, "exec"), writer.names)  # noqa: S102 made of this graph alone
    return writer.names["forward"]
