"""Makes a decoder of a plan and the weights of its program, without torch's graph loader."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from runtime.compiling.fusions.straight import straight_function
from runtime.compiling.fusions.tied import PackedEmbedding
from runtime.compiling.graph_decoder import GraphDecoder
from runtime.compiling.packaging import PROGRAM_NAME
from runtime.compiling.paging.page import PagedGraph
from runtime.compiling.paging.site import AttentionSite
from runtime.compiling.plans.arguments import find_function, read_argument
from runtime.compiling.plans.plan import (
    PLAN_NAME,
    Packed,
    Plan,
    PlanUnusable,
    Site,
    check_conditions,
    conditions_now,
    read_plan,
)
from runtime.compiling.plans.stored import StoredTensors
from runtime.compiling.plans.witness import is_same, witness
from runtime.execution.linear import PackedLinear
from runtime.protocol import DecoderInfo


def load_planned(artifact_dir: Path, info: DecoderInfo, form: str) -> GraphDecoder:
    """The decoder that the artifact's plan describes, on the CPU. Raises `PlanUnusable` if there
    is no plan, or it is not of this program and software, or does not compute what it did."""
    plan = read_plan(artifact_dir / PLAN_NAME)
    with StoredTensors(artifact_dir / PROGRAM_NAME) as stored:
        now = conditions_now(form, info.max_context_tokens, stored.digest())
        check_conditions(plan, now)
        module = _module(plan, stored)
        expected = stored.read(plan.witness)
    if form == "fused":
        module.forward = straight_function(module)
    _check(module, expected, plan.vocab_size)
    paged = PagedGraph(
        module=module,
        layers=plan.layers,
        vocab_size=plan.vocab_size,
        max_context_tokens=info.max_context_tokens,
        dtype=getattr(torch, plan.dtype),
        notes=[],
    )
    return GraphDecoder(paged, info, tuple(info.eos_token_ids), [])


def _check(module: fx.GraphModule, expected: Tensor, vocab_size: int) -> None:
    try:
        found = witness(module, vocab_size)
    except RuntimeError as error:
        raise PlanUnusable("its graph does not run here") from error
    if not is_same(expected, found):
        raise PlanUnusable("its graph computes something else here")


def _module(plan: Plan, stored: StoredTensors) -> fx.GraphModule:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for planned in plan.nodes:
        target: Any = planned.target
        if planned.op == "call_function":
            target = find_function(target)
        args = read_argument(planned.args, nodes)
        kwargs = read_argument(planned.kwargs, nodes)
        nodes[planned.name] = graph.create_node(planned.op, target, args, kwargs, planned.name)
    module = fx.GraphModule(_parts(plan, stored), graph)
    return module.eval().requires_grad_(False)


def _parts(plan: Plan, stored: StoredTensors) -> dict[str, Any]:
    """By their paths, the tensors and submodules that the graph reads and calls."""
    parts: dict[str, Any] = {path: stored.keep(each) for path, each in plan.tensors.items()}
    lookups: dict[str, str] = {}
    for path, planned in plan.modules.items():
        if isinstance(planned, Site):
            parts[path] = AttentionSite(planned.layer_index)
        elif isinstance(planned, Packed):
            weights = [stored.read(each) for each in planned.weights]
            biases = [None if each is None else stored.read(each) for each in planned.biases]
            parts[path] = PackedLinear.joined(weights, biases)
        else:
            lookups[path] = planned.packed
    for path, packed in lookups.items():
        parts[path] = PackedEmbedding(parts[packed])
    return parts
