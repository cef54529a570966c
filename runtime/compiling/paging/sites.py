"""Finds every place where a graph attends, in whatever form it is written.

Owns the search: `scaled_dot_product_attention` in its variants, and every softmax over tokens
between two products. What the scores become on their way to the softmax is `scores.py`'s.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from runtime.compiling.paging.contraction import Contraction, is_product, read_contraction
from runtime.compiling.paging.evaluation import Evaluator
from runtime.compiling.paging.normal import op_name
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.shapes import axes_of, tensor_of

aten = torch.ops.aten

_SOFTMAXES = frozenset({"softmax", "_softmax", "_safe_softmax"})
_FUSED = {
    "scaled_dot_product_attention": "attn_mask",
    "_scaled_dot_product_flash_attention_for_cpu": "attn_mask",
    "_scaled_dot_product_efficient_attention": "attn_bias",
    "_scaled_dot_product_fused_attention_overrideable": "attn_bias",
    "_scaled_dot_product_flash_attention": "",
}
MAX_PATH = 64  # operators between scores and softmax, or softmax and values


@dataclass(frozen=True)
class Operand:
    """A tensor of one attention: `heads` are the letters of its head axes in order."""

    node: Node
    axes: str
    token: str
    feature: str


@dataclass(frozen=True)
class Site:
    """One attention. `heads` are the letters of the head axes of the scores, batch included;
    `value_heads` those of the weights, in the letters of `value` and `output_axes`.

    `scores` to `softmax_input` is what happens to scores; both are None for a fused operator,
    whose arguments are then in `fused`.
    """

    query: Operand
    key: Operand
    value: Operand
    heads: str
    value_heads: str
    output: Node
    output_axes: str
    scores: Contraction | None = None
    softmax_input: Node | None = None
    softmax: Node | None = None
    weights: Node | None = None  # what the softmax has become when it meets the values
    fused: dict[str, Any] | None = None


def find_sites(nodes: list[Node], evaluator: Evaluator) -> list[Site]:
    """Every attention in the order of the graph. Raises `NotPageable` for one that is not
    understood, and when there is none."""
    sites: list[Site] = []
    for node in nodes:
        if node.op != "call_function" or evaluator.is_fixed(node):
            continue
        name = op_name(node)
        if name in _FUSED:
            sites.append(_fused_site(node, name))
        elif name in _SOFTMAXES and _runs_over_tokens(node, evaluator):
            sites.append(_written_site(node, evaluator))
    if not sites:
        raise NotPageable("No attention was found in the graph, so it has nothing to cache.")
    return sites


def _runs_over_tokens(softmax: Node, evaluator: Evaluator) -> bool:
    source, dim = softmax.args[:2]
    axes = axes_of(source)
    assert isinstance(dim, int), "softmax runs over one axis"
    if evaluator.lengths.tokens not in axes[dim].free_symbols:
        return False
    if dim % len(axes) != len(axes) - 1:
        raise NotPageable("A softmax runs over tokens along another axis than the last.")
    return True


# --- fused ------------------------------------------------------------------------------


def _fused_site(node: Node, name: str) -> Site:
    arguments = _named_arguments(node)
    query, key, value = (arguments[part] for part in ("query", "key", "value"))
    if float(arguments.get("dropout_p") or 0.0):
        raise NotPageable("An attention drops weights at random.")
    dims = len(axes_of(query))
    if any(len(axes_of(operand)) != dims for operand in (key, value)) or dims < 2:
        raise NotPageable("The operands of an attention differ in their number of axes.")
    heads = "abcdefgh"[: dims - 2]
    output = node
    if name != "scaled_dot_product_attention":
        output = next(user for user in node.users if user.args[1] == 0)
    mask = arguments.get(_FUSED[name]) if _FUSED[name] else None
    return Site(
        query=Operand(query, heads + "qd", "q", "d"),
        key=Operand(key, heads + "kd", "k", "d"),
        value=Operand(value, heads + "kd", "k", "d"),
        heads=heads,
        value_heads=heads,
        output=output,
        output_axes=heads + "qd",
        fused={
            "mask": mask,
            "is_causal": bool(arguments.get("is_causal") or False),
            "scale": arguments.get("scale"),
        },
    )


def _named_arguments(node: Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload), "a fused attention is an operator"
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


# --- written out ------------------------------------------------------------------------


def _written_site(softmax: Node, evaluator: Evaluator) -> Site:
    source = softmax.args[0]
    assert isinstance(source, Node), "a softmax of a tensor"
    scores = read_contraction(_find_scores(source, evaluator))
    weights, product = _find_values(softmax, evaluator)
    values = read_contraction(product)
    query, key, heads = _read_scores(scores, evaluator)
    weight_axes, value, value_axes = values.side(weights)
    summed = set(weight_axes) & set(value_axes) - set(values.out_axes)
    features = set(value_axes) - set(weight_axes)
    if len(summed) != 1 or len(features) != 1 or evaluator.is_fixed(value):
        raise NotPageable("The attention's weights do not meet its values in a plain product.")
    token, feature = summed.pop(), features.pop()
    rows = [letter for letter in weight_axes if letter not in value_axes]
    output_query = rows[-1] if rows else ""
    if weight_axes[-1] != token or weight_axes[-2:-1] != output_query:
        raise NotPageable("The attention's weights are transposed before they meet the values.")
    return Site(
        query=query,
        key=key,
        value=Operand(value, _rename(value_axes, token, "k", feature), "k", "d"),
        heads=heads,
        value_heads=weight_axes[:-2].upper(),
        output=product,
        output_axes=_rename(values.out_axes, output_query, "q", feature),
        scores=scores,
        softmax_input=source,
        softmax=softmax,
        weights=weights,
    )


def _rename(axes: str, token: str, token_name: str, feature: str) -> str:
    """The letters of a product with its token and feature axes named, its head axes in capitals."""
    names = {token: token_name, feature: "d"}
    return "".join(names.get(axis, axis.upper()) for axis in axes)


def _read_scores(scores: Contraction, evaluator: Evaluator) -> tuple[Operand, Operand, str]:
    """The last axis of the scores counts keys, the one before queries."""
    out = scores.out_axes
    key_letter, query_letter, heads = out[-1], out[-2], out[:-2]
    is_left_key = key_letter in scores.left_axes
    key, key_axes = (
        (scores.left, scores.left_axes) if is_left_key else (scores.right, scores.right_axes)
    )
    query, query_axes = (
        (scores.right, scores.right_axes) if is_left_key else (scores.left, scores.left_axes)
    )
    summed = set(query_axes) & set(key_axes) - set(out)
    token_sizes = [axes_of(scores.node)[axis] for axis in (-1, -2)]
    is_plain = (
        len(summed) == 1
        and query_letter in query_axes
        and query_letter not in key_axes
        and key_letter not in query_axes
        and all(evaluator.lengths.is_tokens(size) for size in token_sizes)
        and not evaluator.is_fixed(key)
        and not evaluator.is_fixed(query)
    )
    if not is_plain:
        raise NotPageable("A softmax over tokens does not come from queries times keys.")
    feature = summed.pop()
    return (
        Operand(query, query_axes, query_letter, feature),
        Operand(key, key_axes, key_letter, feature),
        heads,
    )


def _find_scores(source: Node, evaluator: Evaluator) -> Node:
    """The one product that a softmax's input is computed from."""
    products: set[Node] = set()
    seen: set[Node] = set()
    pending = [source]
    while pending:
        node = pending.pop()
        if node in seen or evaluator.is_fixed(node):
            continue
        seen.add(node)
        if is_product(node):
            products.add(node)
        elif node.op != "call_function" or len(seen) > MAX_PATH:
            raise NotPageable("A mask or bias of the attention depends on the token ids.")
        else:
            pending.extend(evaluator.sources(node))
    if len(products) != 1:
        raise NotPageable(
            "The scores of an attention come from more than queries and keys, so its mask or bias "
            "depends on the tokens."
        )
    return products.pop()


def _find_values(softmax: Node, evaluator: Evaluator) -> tuple[Node, Node]:
    """(the weights as they meet the values, the product)."""
    node = softmax
    for _ in range(MAX_PATH):
        users = [user for user in node.users if node in evaluator.sources(user)]
        if len(users) != 1:
            raise NotPageable("The weights of an attention are used for more than its output.")
        user = users[0]
        if is_product(user):
            return node, user
        if tensor_of(user) is None:
            break
        node = user
    raise NotPageable("The weights of an attention do not reach its values.")
