"""Brings an exported program into the one form that paging reads.

Owns: functional aten operators without wrappers, one placeholder (the token ids), one output
(the logits), `baddbmm` and negative axes spelled out, assertions and other no-ops gone.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from runtime.compiling.paging.copying import copy_graph, is_wrapper
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.shapes import axes_of, tensor_of
from runtime.compiling.paging.signature import (
    DecoderSignature,
    embedding_rows,
    read_decoder_signature,
)

aten = torch.ops.aten

NO_END = 2**62  # a slice's end from here on means "to the end"
_ASSERTIONS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_check",
    }
)
_COPIES = frozenset({"lift_fresh_copy", "lift_fresh", "alias", "detach", "detach_", "lift"})


@dataclass(frozen=True)
class DecoderGraph:
    """A normalised graph. `tokens` is the symbol of the sequence's length."""

    module: GraphModule
    token_ids: Node
    logits: Node
    tokens: sympy.Symbol
    batch: sympy.Symbol | None
    max_tokens: int | None
    dtype: torch.dtype
    vocab_size: int
    num_ids: int  # token ids below this can be looked up
    ids_dtype: torch.dtype


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program as plain functional operators, without in-place ones and wrapped regions."""
    return program if _is_functional(program, may_wrap=False) else _decompose(program)


def _is_functional(program: ExportedProgram, *, may_wrap: bool) -> bool:
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            if not (may_wrap and is_wrapper(node)):
                return False
        elif node.op == "call_function" and op_name(node) not in _COPIES:
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                return False
    return True


def _decompose(program: ExportedProgram) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its tree specs
        return program.run_decompositions({})


def normalise(program: ExportedProgram) -> DecoderGraph:
    """Raises `NotPageable` when the program is no decoder, or none of dynamic length."""
    signature = read_decoder_signature(program)
    tokens, batch = _symbols(signature)
    rows = embedding_rows(program, signature)
    if not _is_functional(program, may_wrap=True):
        program = _decompose(program)
    lifted = program.module(check_guards=False)
    assert isinstance(lifted, GraphModule), "an exported program's module is a graph"
    graph = fx.Graph()
    ids, outputs = copy_graph(lifted.graph, graph, signature.input_at)
    logits = outputs[signature.output_at]
    graph.output(logits)
    module = GraphModule(lifted, graph)
    _simplify(module)
    output = module.graph.output_node().args[0]
    assert isinstance(output, Node), "the output is one node"
    return DecoderGraph(
        module=module,
        token_ids=ids,
        logits=output,
        tokens=tokens,
        batch=batch,
        max_tokens=signature.max_tokens,
        dtype=model_dtype(module),
        vocab_size=signature.vocab_size,
        num_ids=min([*rows, signature.vocab_size]),
        ids_dtype=signature.dtype,
    )


def model_dtype(module: torch.nn.Module) -> torch.dtype:
    """The floating dtype that most of the module's numbers have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _symbols(signature: DecoderSignature) -> tuple[sympy.Symbol, sympy.Symbol | None]:
    if not isinstance(signature.length, sympy.Symbol):
        raise NotPageable(
            f"The sequence length is fixed at {signature.length}; export with a dynamic second "
            "axis to have keys and values cached."
        )
    batch = signature.batch
    if isinstance(batch, sympy.Symbol):
        return signature.length, batch
    if batch != 1:
        raise NotPageable(
            f"The batch is fixed at {batch}; export with a batch of 1 or a dynamic one."
        )
    return signature.length, None


def _simplify(module: GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node)
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # layouts in memory will change
        if name in _ASSERTIONS:
            graph.erase_node(node)
        elif name in _COPIES or is_noop(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.baddbmm.default:
            _expand_baddbmm(graph, node)
    eliminate(graph)
    module.recompile()


def eliminate(graph: fx.Graph) -> None:
    """Remove what nothing uses; attention counts as impure to torch, so this counts itself."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)


def op_name(node: Node) -> str:
    """`matmul` for `aten.matmul.default`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def is_noop(node: Node) -> bool:
    """Whether the node gives its first argument: full slices, dropout outside of training."""
    name = op_name(node)
    if name in ("dropout", "feature_dropout", "alpha_dropout"):
        return not node.args[2]
    if name == "slice":
        _, _, start, end, step = slice_arguments(node)
        return start in (0, None) and (end is None or _is_end(end, node)) and step == 1
    if name in ("to", "_to_copy", "type_as"):
        before, after = tensor_of(node.args[0]), tensor_of(node)
        return (
            before is not None
            and after is not None
            and before.dtype == after.dtype
            and before.device == after.device
        )
    if name == "expand":
        before, after = tensor_of(node.args[0]), tensor_of(node)
        return before is not None and after is not None and axes_of(before) == axes_of(after)
    return False


def slice_arguments(node: Node) -> tuple[Any, Any, Any, Any, Any]:
    defaults: list[Any] = [None, 0, None, None, 1]
    defaults[: len(node.args)] = node.args
    return tuple(defaults)  # type: ignore[return-value]


def _is_end(end: Any, node: Node) -> bool:
    if isinstance(end, int):
        return end >= NO_END
    dim = slice_arguments(node)[1]
    axes = axes_of(node.args[0])
    size = end.meta.get("val") if isinstance(end, Node) else None
    return isinstance(size, torch.SymInt) and size.node.expr == axes[dim]


def _expand_baddbmm(graph: fx.Graph, node: Node) -> None:
    """input * beta + (batch1 @ batch2) * alpha, so that the product is a node of its own."""
    bias, left, right = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    with graph.inserting_before(node):
        result = graph.call_function(aten.bmm.default, (left, right))
        result.meta["val"] = node.meta["val"]
        if alpha != 1:
            result = graph.call_function(aten.mul.Tensor, (result, alpha))
            result.meta["val"] = node.meta["val"]
        if beta != 0:
            if beta != 1:
                scaled = graph.call_function(aten.mul.Tensor, (bias, beta))
                assert isinstance(bias, Node), "a bias is a tensor"
                scaled.meta["val"] = bias.meta.get("val")
                bias = scaled
            result = graph.call_function(aten.add.Tensor, (result, bias))
            result.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    graph.erase_node(node)
