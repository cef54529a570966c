"""Drops the batch axis of size 1 that an exported model carries through every operation.

Each operation on `[1, tokens, ...]` is done on `[tokens, ...]`, between two views that cancel
with those of its neighbours (`views.py`).
"""

from typing import Any

from torch import fx

from runtime.compiling.fusions.evaluated import EvaluatedGraph, op_name

POINTWISE = {
    *("add", "sub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "exp", "log", "abs", "square"),
    *("silu", "gelu", "relu", "tanh", "sigmoid", "erf", "softplus", "mish", "hardswish", "elu"),
    *("to", "_to_copy", "clamp", "clamp_min", "clamp_max", "rsub", "reciprocal", "sin", "cos"),
    *("where", "minimum", "maximum", "leaky_relu", "hardtanh", "sign", "lerp"),
}
ALONG_LAST = {"linear": None, "layer_norm": None, "rms_norm": None, "softmax": 1, "_softmax": 1}
ALONG_DIMS = {"mean": 1, "sum": 1, "amax": 1, "amin": 1}  # where the list of dims stands
PARTS = {"slice": 1, "select": 1, "narrow": 1}


def flatten(graph: EvaluatedGraph) -> int:
    """Returns how many operations lost the axis."""
    num_flattened = 0
    for node in list(graph.graph.nodes):
        shape = graph.shape(node)
        if node.op != "call_function" or shape is None or len(shape) < 2:
            continue
        if shape[0] == 1 and shape[1] == -1:
            num_flattened += _flatten(graph, node, shape)
    return num_flattened


def _flatten(graph: EvaluatedGraph, node: fx.Node, shape: tuple[int, ...]) -> bool:
    name, args = op_name(node), list(node.args)
    if name in POINTWISE:
        args = [_squeezed(graph, node, each, len(shape)) for each in args]
    elif name == "cat":
        dim = _inner_dim(args[1] if len(args) > 1 else node.kwargs.get("dim", 0), len(shape))
        sources: Any = args[0]
        if dim is None:
            return False
        args = [[_squeezed(graph, node, each, len(shape)) for each in sources], dim]
    elif name in ("index_select", "index"):
        args = _picking(graph, node, name)
    elif name == "embedding":
        args[1] = _squeezed(graph, node, args[1], len(shape) - 1)
    elif not _flatten_first(graph, node, name, args):
        return False
    if args == list(node.args):
        return False
    kwargs = {key: value for key, value in node.kwargs.items() if key != "dim" or name != "cat"}
    assert callable(node.target)
    flat = graph.call(node, node.target, *args, **kwargs)
    if graph.shape(flat) != shape[1:]:
        graph.discard(flat)
        return False
    return graph.replace(node, graph.call(node, "unsqueeze", flat, 0))


def _picking(graph: EvaluatedGraph, node: fx.Node, name: str) -> list[Any]:
    """The arguments of the rows picked by `x[:, rows]`, as those of `x[rows]`."""
    source, *rest = node.args
    before = graph.shape(source) if isinstance(source, fx.Node) else None
    if before is None or len(before) < 3 or before[:2] != (1, -1):
        return list(node.args)
    squeezed = graph.call(node, "squeeze", source, 0)
    if name == "index_select" and rest[0] == 1:
        return [squeezed, 0, *rest[1:]]
    indices: Any = rest[0]
    is_rows = name == "index" and len(indices) == 2 and indices[0] is None
    return [squeezed, [indices[1]]] if is_rows else list(node.args)


def _flatten_first(graph: EvaluatedGraph, node: fx.Node, name: str, args: list[Any]) -> bool:
    """For operations along certain axes of their first argument alone; changes `args`."""
    source = args[0] if args else None
    before = graph.shape(source) if isinstance(source, fx.Node) else None
    if before is None or len(before) < 3 or before[0] != 1 or before[1] != -1:
        return False
    at = {**ALONG_LAST, **ALONG_DIMS, **PARTS}.get(name, -1)
    if at == -1:
        return False
    if at is not None:
        if len(args) <= at:
            return False
        dims = args[at] if isinstance(args[at], (list, tuple)) else [args[at]]
        inner = [_inner_dim(dim, len(before)) for dim in dims]
        if not inner or None in inner:
            return False
        args[at] = inner if isinstance(args[at], (list, tuple)) else inner[0]
    args[0] = _squeezed(graph, node, source, len(before))
    return True


def _inner_dim(dim: Any, num_dims: int) -> int | None:
    """The axis counted from the end, where neither batch nor tokens are meant."""
    if not isinstance(dim, int):
        return None
    dim = dim if dim < 0 else dim - num_dims
    return dim if dim > 1 - num_dims else None


def _squeezed(graph: EvaluatedGraph, before: fx.Node, value: Any, num_dims: int) -> Any:
    """An operand without the batch axis, if it has it."""
    shape = graph.shape(value) if isinstance(value, fx.Node) else None
    if shape is None or len(shape) != num_dims or shape[0] != 1:
        return value
    return graph.call(before, "squeeze", value, 0)
