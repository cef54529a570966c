"""Makes a graph compute logits only for the rows that are sampled, and tells whether rows mix.

Owns the pick of rows before the output layer, and the experiment that changes one token and
looks who notices.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from runtime.compiling.paging.evaluation import Evaluator
from runtime.compiling.paging.normal import op_name
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.shapes import tensor_of
from runtime.compiling.paging.site import attending

aten = torch.ops.aten

PROBE_TOKENS = 127  # a prime: an axis of this length is one of tokens
CHANGED = 2  # the row whose token is changed
_RESHAPES = frozenset({"view", "_unsafe_view", "reshape"})
_OUTPUT_LAYERS = {"linear": 0, "matmul": 0, "mm": 0, "addmm": 1}
MAX_TAIL = 24  # operators after the output layer
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "greater"})


def pick_rows(graph: fx.Graph, logits: Node, sample: Node, evaluator: Evaluator) -> Node:
    """Insert the pick before the output layer where one is found, else after everything.
    Returns the node of `[1, sampled, vocab]` logits."""
    tail: list[Node] = []
    node = logits
    for _ in range(MAX_TAIL):
        name = op_name(node)
        at = _OUTPUT_LAYERS.get(name)
        if at is not None:
            return _pick_before(graph, node, at, tail, logits, sample, evaluator)
        inputs = [source for source in evaluator.sources(node) if not evaluator.is_fixed(source)]
        is_free = not _reads_positions(node, evaluator) and _keeps_rows(node, evaluator)
        if len(inputs) != 1 or len(node.users) != 1 or not is_free:
            break
        tail.append(node)
        node = inputs[0]
    return _pick_after(graph, logits, sample, evaluator)


def _reads_positions(node: Node, evaluator: Evaluator) -> bool:
    """Whether an operator takes a row for every token from a table: sampled rows are fewer."""
    return any(
        evaluator.is_fixed(source) and evaluator.lengths.token_axes(source)
        for source in evaluator.sources(node)
    )


def _keeps_rows(node: Node, evaluator: Evaluator) -> bool:
    return tensor_of(node) is not None and len(evaluator.lengths.token_axes(node)) == 1


def _pick_before(
    graph: fx.Graph,
    layer: Node,
    at: int,
    tail: list[Node],
    logits: Node,
    sample: Node,
    evaluator: Evaluator,
) -> Node:
    hidden = layer.args[at]
    lengths = evaluator.lengths
    if not isinstance(hidden, Node) or len(lengths.token_axes(hidden)) != 1:
        return _pick_after(graph, logits, sample, evaluator)
    others = [source for source in evaluator.sources(layer) if source is not hidden]
    if any(lengths.token_axes(source) for source in others):
        return _pick_after(graph, logits, sample, evaluator)
    axis = lengths.token_axes(hidden)[0]
    if any(not _free_shape(node, evaluator) for node in tail):
        return _pick_after(graph, logits, sample, evaluator)
    with graph.inserting_before(layer):
        picked = graph.call_function(aten.index_select.default, (hidden, axis, sample))
    layer.replace_input_with(hidden, picked)
    return logits


def _free_shape(node: Node, evaluator: Evaluator) -> bool:
    """Lets a reshape take any number of rows; False if it or another operator cannot."""
    numbers = [source for source in node.all_input_nodes if tensor_of(source) is None]
    if not numbers:
        return True
    if op_name(node) not in _RESHAPES or len(numbers) != 1:
        return False
    shape = list(node.args[1])  # type: ignore[arg-type]
    size = numbers[0].meta["val"]
    if -1 in shape or not evaluator.lengths.is_tokens(size.node.expr):
        return False
    node.args = (node.args[0], [-1 if part is numbers[0] else part for part in shape])
    return True


def _pick_after(graph: fx.Graph, logits: Node, sample: Node, evaluator: Evaluator) -> Node:
    with graph.inserting_after(logits):
        return graph.call_function(aten.index_select.default, (logits, 1, sample))


# --- do rows mix? -----------------------------------------------------------------------


def check_rows(
    module: GraphModule, num_ids: int, context: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises `NotPageable` if a row of the packed graph depends on another row by anything but
    attention, which is replaced here by something that looks at its own row only."""
    generator = torch.Generator().manual_seed(0)
    ids = _probe_ids(module, num_ids, generator)
    positions = torch.randperm(min(PROBE_TOKENS, context), generator=generator)
    positions = positions.repeat(PROBE_TOKENS)[:PROBE_TOKENS]
    changed = ids.clone()
    changed[CHANGED] = (ids[CHANGED] + 1 + num_ids // 2) % num_ids
    rows = torch.arange(PROBE_TOKENS)
    few = torch.randperm(PROBE_TOKENS, generator=generator)[: PROBE_TOKENS // 3]

    def run(ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        with torch.inference_mode(), attending(_own_row):
            return module(ids.to(device), positions.to(device), rows.to(device)).float().cpu()

    try:
        before, after = run(ids, positions, rows), run(changed, positions, rows)
        alone = run(ids[CHANGED:][:1], positions[CHANGED:][:1], rows[:1])
        sampled = run(ids, positions, few)
    except (RuntimeError, IndexError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotPageable(f"The graph does not run on packed tokens: {first}") from error
    # Products over other numbers of rows round differently.
    tolerance = 1e-4 if dtype.itemsize >= 4 else 0.05
    others = [row for row in range(PROBE_TOKENS) if row != CHANGED]
    if not _is_close(before[others], after[others], tolerance):
        culprit = _find_culprit(module, (ids, positions, rows), changed, device)
        raise NotPageable(
            f"Tokens reach each other by something else than attention ({culprit}), such as a "
            "recurrent state or a convolution over time, which cannot be cached."
        )
    if not _is_close(before[CHANGED : CHANGED + 1], alone, tolerance):
        raise NotPageable("A token's result depends on how many tokens run beside it.")

    if sampled.shape != before[few].shape or not _is_close(before[few], sampled, tolerance):
        raise NotPageable("A token's logits depend on which other tokens' are wanted.")


def _probe_ids(module: GraphModule, num_ids: int, generator: torch.Generator) -> Tensor:
    """Random ids with repeats, among them the ends of the vocabulary and every id that the graph
    compares with; the one that is changed is such a one."""
    literals = {
        argument
        for node in module.graph.nodes
        if node.op == "call_function" and op_name(node) in _COMPARISONS
        for argument in node.args
        if isinstance(argument, int) and 0 <= argument < num_ids
    }
    notable = torch.tensor([*sorted(literals), 0, num_ids - 1])
    ids = torch.randint(0, num_ids, (PROBE_TOKENS,), generator=generator)
    places = torch.arange(CHANGED, PROBE_TOKENS, 3)
    ids[places] = notable.repeat(len(places))[: len(places)]
    ids[PROBE_TOKENS // 2 + 1 :] = ids[: PROBE_TOKENS // 2]
    return ids


def _own_row(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    return query + (keys + values).repeat_interleave(group, 1)


def _is_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = one.nan_to_num(), other.nan_to_num()
    return bool(((one - other).abs() <= tolerance * (float(one.abs().max()) or 1.0)).all())


def _find_culprit(
    module: GraphModule,
    arguments: tuple[Tensor, Tensor, Tensor],
    changed: Tensor,
    device: torch.device,
) -> str:
    """The name of the first operator that lets a changed token reach another row."""

    class Recorder(fx.Interpreter):
        def __init__(self, compare: Callable[[Node, Any], None]) -> None:
            super().__init__(module, garbage_collect_values=False)
            self.compare = compare

        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            self.compare(n, result)
            return result

    seen: dict[str, Tensor] = {}
    found: list[str] = []

    def keep(node: Node, value: Any) -> None:
        if isinstance(value, Tensor):
            seen[node.name] = value

    def compare(node: Node, value: Any) -> None:
        if found or not isinstance(value, Tensor) or node.op != "call_function":
            return
        before = seen.get(node.name)
        if before is None or before.shape != value.shape:
            return
        if torch.equal(before, value):
            return
        axes = [axis for axis, size in enumerate(value.shape) if size == PROBE_TOKENS]
        if len(axes) == 1:
            rows = (before != value).movedim(axes[0], 0).reshape(PROBE_TOKENS, -1).any(1)
            if rows.sum() > 1:
                found.append(op_name(node))
        elif value.numel() % PROBE_TOKENS:
            found.append(op_name(node))  # not a value per token any more

    ids, positions, rows = (argument.to(device) for argument in arguments)
    with torch.inference_mode(), attending(_own_row):
        Recorder(keep).run(ids, positions, rows)
        Recorder(compare).run(changed.to(device), positions, rows)
    return found[0] if found else "an unknown operator"
