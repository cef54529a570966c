"""Writes the plan of a paged decoder that a build chose, and reads it back to see that it holds."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from runtime.compiling.fusions.evaluated import fetch
from runtime.compiling.fusions.linears import Origin, origins_of
from runtime.compiling.fusions.tied import PackedEmbedding
from runtime.compiling.graph_decoder import GraphDecoder
from runtime.compiling.packaging import PROGRAM_NAME
from runtime.compiling.paging.site import AttentionSite
from runtime.compiling.plans.arguments import name_function, write_argument
from runtime.compiling.plans.plan import (
    PLAN_NAME,
    Lookup,
    Packed,
    Plan,
    PlannedNode,
    PlanUnusable,
    Site,
    StoredTensor,
    conditions_now,
    write_plan,
)
from runtime.compiling.plans.reading import load_planned
from runtime.compiling.plans.stored import StoredTensors, store
from runtime.compiling.plans.witness import witness
from runtime.execution.linear import PackedLinear

logger = logging.getLogger(__name__)

MAX_OWN_BYTES = 1 << 29  # of tensors that are not the program's, such as tables of positions


def add_plan(
    artifact_dir: Path, decoder: GraphDecoder, program: ExportedProgram, form: str
) -> str | None:
    """Write the plan of `decoder`, made of `program`, which the artifact holds. Returns why there
    is none: starts then take longer, and nothing else changes."""
    path = artifact_dir / PLAN_NAME
    try:
        write_plan(path, _make(artifact_dir / PROGRAM_NAME, decoder, program, form))
        _check_equal(decoder.module, load_planned(artifact_dir, decoder.info, form).module)
    except PlanUnusable as error:
        path.unlink(missing_ok=True)
        return str(error)
    return None


def _make(path: Path, decoder: GraphDecoder, program: ExportedProgram, form: str) -> Plan:
    module = decoder.module
    assert isinstance(module, fx.GraphModule), "a paged decoder is a graph"
    with StoredTensors(path) as stored:
        sources = _Sources(program, stored.member_names())
        digest = stored.digest()
    nodes = list(module.graph.nodes)
    plan = Plan(
        conditions=conditions_now(form, decoder.info.max_context_tokens, digest),
        layers=decoder.layers,
        vocab_size=decoder.info.vocab_size,
        dtype=str(decoder.dtype).removeprefix("torch."),
        nodes=[_node(node) for node in nodes],
        tensors={
            str(node.target): sources.of(fetch(module, str(node.target)))
            for node in nodes
            if node.op == "get_attr"
        },
        modules={
            str(node.target): _module(module, str(node.target), sources)
            for node in nodes
            if node.op == "call_module"
        },
        witness=store(witness(module, decoder.info.vocab_size)),
    )
    if sum(len(tensor.data) for tensor in plan.tensors.values()) > MAX_OWN_BYTES:
        raise PlanUnusable("the graph has large tensors that are not the program's")
    return plan


def _node(node: fx.Node) -> PlannedNode:
    target = name_function(node.target) if node.op == "call_function" else str(node.target)
    return PlannedNode(
        node.name, node.op, target, write_argument(node.args), write_argument(node.kwargs)
    )


class _Sources:
    """Finds the members that tensors are views of."""

    def __init__(self, program: ExportedProgram, members: dict[str, str]) -> None:
        tensors = {**program.constants, **program.state_dict}
        self._members: dict[str, tuple[str, torch.dtype]] = {}
        self._by_memory: dict[int, str] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and name in members:
                self._members[name] = members[name], tensor.dtype
                self._by_memory[tensor.untyped_storage().data_ptr()] = members[name]

    def of(self, tensor: Any) -> StoredTensor:
        """As a view of the program's own, or else with its data."""
        if not isinstance(tensor, Tensor):
            raise PlanUnusable(f"the graph holds a {type(tensor).__name__}")
        member = self._by_memory.get(tensor.untyped_storage().data_ptr())
        if member is None:
            return store(tensor)
        return _view(member, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def packed(self, origins: list[Origin]) -> Packed:
        weights: list[StoredTensor] = []
        for origin in origins:
            if origin.path not in self._members:
                raise PlanUnusable("a packed weight is not one of the program's")
            member, dtype = self._members[origin.path]
            weights.append(_view(member, dtype, origin.size, origin.stride, origin.offset))
        biases = [None if each.bias is None else self.of(each.bias) for each in origins]
        return Packed(weights=weights, biases=biases)


def _view(
    member: str, dtype: torch.dtype, size: Any, stride: Any, offset: int | torch.SymInt
) -> StoredTensor:
    name = str(dtype).removeprefix("torch.")
    return StoredTensor(name, list(size), list(stride), int(offset), member=member)


def _module(graph: fx.GraphModule, name: str, sources: _Sources) -> Site | Packed | Lookup:
    module = graph.get_submodule(name)
    if isinstance(module, AttentionSite):
        return Site(module.layer_index)
    if isinstance(module, PackedLinear):
        return sources.packed(origins_of(graph)[name])
    if isinstance(module, PackedEmbedding):
        names = [name for name, each in graph.named_modules() if each is module.linear]
        if names:
            return Lookup(names[0])
    raise PlanUnusable(f"the graph calls a {type(module).__name__}")


def _check_equal(made: nn.Module, loaded: nn.Module) -> None:
    """Every tensor bit for bit, since one batch does not touch every row of an embedding."""
    tensors = dict(_tensors(made))
    for name, tensor in _tensors(loaded):
        if name not in tensors or not _is_equal(tensors[name], tensor):
            raise PlanUnusable(f"{name} came back changed")


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num())


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
