"""Recognises rotary position embeddings by what they compute, and gathers their angles once.

Between an attention's query or key and the layer that made it lies a map that is linear in each
head and depends on the position. Probing it with ones on half of the dimensions gives its cosines
and sines; if rotating by them gives what the map gives, the map is a rotation. The angles of all
positions are tabled once and gathered once per step, for all layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from runtime.compiling.fusions.constants import constant_nodes
from runtime.compiling.fusions.evaluated import EvaluatedGraph, is_attention, op_name
from runtime.compiling.fusions.regions import (
    Region,
    ancestors,
    is_widening,
    order_of,
    regions_above,
    run_node,
    run_region,
)
from runtime.execution import ops

aten = torch.ops.aten
LINEAR = {
    *("mul", "add", "sub", "neg", "cat", "stack", "slice", "select", "narrow", "split", "chunk"),
    *("to", "_to_copy", "type_as", "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze"),
    *("flatten", "unflatten", "transpose", "permute", "contiguous", "clone", "expand", "movedim"),
    *("view_as_complex", "view_as_real", "getitem", "unbind", "alias", "detach", "div"),
}
MIXING = {"mul", "add", "sub", "div"}
MAX_TABLE_BYTES = 256 << 20
CHUNK_POSITIONS = 1024
TOLERANCE = 1e-5


@dataclass
class Angles:
    """Of one kind of rotation, `[positions, rotary_dim]` each: float32, or float64 in a graph of
    that dtype."""

    cosines: Tensor
    sines: Tensor
    is_interleaved: bool
    gathered: tuple[fx.Node, fx.Node] | None = None


@dataclass
class Rotations:
    """What the pass knows of a graph while it goes through its attention sites."""

    graph: EvaluatedGraph
    num_positions: int
    order: dict[fx.Node, int]
    constants: set[fx.Node]
    positional: set[fx.Node]
    known: dict[Any, Angles | None] = field(default_factory=dict)


def fuse_rotary(graph: EvaluatedGraph, num_positions: int) -> int:
    """Returns how many queries and keys are rotated by one operation now. `num_positions` is how
    many positions are tabled: the model's context."""
    constants = constant_nodes(graph)
    positional = positional_nodes(graph, constants)
    rotations = Rotations(graph, num_positions, order_of(graph), constants, positional)
    num_fused = 0
    for site in [node for node in graph.graph.nodes if is_attention(graph.module, node)]:
        for argument in site.args[:2]:
            assert isinstance(argument, fx.Node)
            num_fused += _fuse(rotations, argument)
    graph.drop_dead()
    return num_fused


def positional_nodes(graph: EvaluatedGraph, constants: set[fx.Node]) -> set[fx.Node]:
    """What depends on the positions, or on how many there are, and on nothing else."""
    positional = {graph.positions}
    for node in graph.graph.nodes:
        if op_name(node).startswith("sym_size") and node.args[0] is graph.token_ids:
            positional.add(node)
        if node.op not in ("call_function", "call_method"):
            continue
        inputs = set(node.all_input_nodes)
        if inputs & positional and inputs <= positional | constants:
            positional.add(node)
    return positional


def _fuse(rotations: Rotations, output: fx.Node) -> bool:
    graph = rotations.graph
    shape, value = graph.shape(output), graph.tensor(output)
    if shape is None or value is None or len(shape) != 3 or op_name(output) == "rotate":
        return False
    given = rotations.constants | rotations.positional
    found = regions_above(
        output,
        rotations.order,
        given,
        lambda node: op_name(node) in LINEAR and node not in given and _is_linear(node, given),
    )
    region = _smallest_whole(rotations, found)
    if region is None:
        return False
    for is_heads_first in (False, True):
        angles = _angles(rotations, region, is_heads_first)
        if angles is not None and _emit(rotations, region, angles, is_heads_first):
            return True
    return False


def _is_linear(node: fx.Node, given: set[fx.Node]) -> bool:
    """Linear in what is not given: a product of one such, a sum of nothing else."""
    data = [each for each in node.all_input_nodes if each not in given]
    name = op_name(node)
    if name == "mul":
        return len(data) == 1 and not (node.args[0] is data[0] and node.args[1] is data[0])
    if name == "div":
        return data == [node.args[0]] and not node.kwargs  # which may ask for whole quotients
    if name in ("add", "sub"):
        return all(isinstance(each, fx.Node) and each not in given for each in node.args[:2])
    return True


def _smallest_whole(rotations: Rotations, found: list[Region]) -> Region | None:
    """The region nearest the attention that holds all that depends on positions."""
    if not found:
        return None
    graph, positional = rotations.graph, rotations.positional

    def is_mixing(node: fx.Node) -> bool:
        inputs = node.all_input_nodes
        return op_name(node) in MIXING and any(each in positional for each in inputs)

    mixing = {node for node in found[-1].nodes if is_mixing(node)}
    if not mixing:
        return None
    size = graph.tensor(found[0].nodes[-1])
    assert size is not None
    for region in found:
        source = graph.tensor(region.source)
        if source is None or source.numel() != size.numel() or source.dtype != size.dtype:
            continue
        if mixing <= set(region.nodes) and is_widening(graph, region.nodes, size.dtype):
            return region
    return None


def _angles(rotations: Rotations, region: Region, is_heads_first: bool) -> Angles | None:
    """The table of a region's rotation, or None if it is none. Equal regions share a table."""
    key = (_fingerprint(rotations, region), is_heads_first)
    if key not in rotations.known:
        angles = _probe_all(rotations, region, is_heads_first)
        for other in rotations.known.values():
            if angles is not None and other is not None and _is_equal(angles, other):
                angles = other
        rotations.known[key] = angles
    return rotations.known[key]


def _is_equal(one: Angles, other: Angles) -> bool:
    return (
        one.is_interleaved == other.is_interleaved
        and torch.equal(one.cosines, other.cosines)
        and torch.equal(one.sines, other.sines)
    )


def _fingerprint(rotations: Rotations, region: Region) -> str:
    """The same text for regions that do the same with the same angles, whatever their source."""
    names: dict[fx.Node, str] = {region.source: "source"}
    lines = [str(rotations.graph.shape(region.source))]
    for at, node in enumerate(region.nodes):
        names[node] = f"#{at}"
        args = fx.map_arg((node.args, node.kwargs), lambda each: _Name(names.get(each, each.name)))
        lines.append(f"{node.target}{args}")
    return "\n".join(lines)


class _Name(str):
    __slots__ = ()


def _probe_all(rotations: Rotations, region: Region, is_heads_first: bool) -> Angles | None:
    """Tables all positions, then checks the table against positions out of order."""
    last = rotations.num_positions - 1
    powers = [at + less for at in (1 << k for k in range(last.bit_length())) for less in (0, -1)]
    mixed = torch.tensor([last, 0, last // 2, min(7, last), last // 3, *powers])
    for is_interleaved in (False, True):
        rotary_dim = _rotary_dim(rotations, region, is_heads_first, mixed)
        if rotary_dim is None or rotations.num_positions * rotary_dim * 8 > MAX_TABLE_BYTES:
            return None
        probe = _Probe(rotations, region, is_heads_first, is_interleaved, rotary_dim)
        if not probe.is_rotation(mixed):
            continue
        parts = list(probe.tabled(rotations.num_positions))
        cosines = torch.cat([part[0] for part in parts])
        sines = torch.cat([part[1] for part in parts])
        checked = probe.angles(mixed)
        if torch.equal(cosines[mixed], checked[0]) and torch.equal(sines[mixed], checked[1]):
            return Angles(cosines, sines, is_interleaved)
    return None


def _probe_dtype(rotations: Rotations, region: Region) -> torch.dtype:
    output = rotations.graph.tensor(region.nodes[-1])
    assert output is not None
    return torch.promote_types(output.dtype, torch.float32)


def _rotary_dim(
    rotations: Rotations, region: Region, is_heads_first: bool, positions: Tensor
) -> int | None:
    """How many leading dimensions of a head change; None where the map gives another shape."""
    size = rotations.graph.shape(region.nodes[-1])
    assert size is not None
    generator = torch.Generator().manual_seed(0)
    dtype = _probe_dtype(rotations, region)
    x = torch.randn((len(positions), *size[1:]), generator=generator, dtype=dtype)
    y = _apply(rotations, region, is_heads_first, positions, x)
    if y.shape != x.shape:
        return None
    changed = (x != y).any(0).any(0).nonzero()
    rotary_dim = int(changed.max()) + 1 if len(changed) else 0
    return rotary_dim if rotary_dim and rotary_dim % 2 == 0 else None


@dataclass(frozen=True)
class _Probe:
    rotations: Rotations
    region: Region
    is_heads_first: bool
    is_interleaved: bool
    rotary_dim: int

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines, sines) `[positions, rotary_dim]`, if the region is a rotation."""
        size = self.rotations.graph.shape(self.region.nodes[-1])
        assert size is not None
        dtype = _probe_dtype(self.rotations, self.region)
        x = torch.zeros((2, len(positions), *size[1:]), dtype=dtype)
        firsts, seconds = self._halves()
        x[0][..., firsts] = 1
        x[1][..., seconds] = 1
        one, other = (
            _apply(self.rotations, self.region, self.is_heads_first, positions, each)[:, 0]
            for each in x
        )
        cosines = torch.empty(len(positions), self.rotary_dim, dtype=dtype)
        sines = torch.empty_like(cosines)
        cosines[:, firsts], sines[:, seconds] = one[:, firsts], one[:, seconds]
        cosines[:, seconds], sines[:, firsts] = other[:, seconds], -other[:, firsts]
        return cosines, sines

    def _halves(self) -> tuple[slice, slice]:
        if self.is_interleaved:
            return slice(0, self.rotary_dim, 2), slice(1, self.rotary_dim, 2)
        half = self.rotary_dim // 2
        return slice(0, half), slice(half, self.rotary_dim)

    def is_rotation(self, positions: Tensor) -> bool:
        size = self.rotations.graph.shape(self.region.nodes[-1])
        assert size is not None
        generator = torch.Generator().manual_seed(1)
        dtype = _probe_dtype(self.rotations, self.region)
        x = torch.randn((len(positions), *size[1:]), generator=generator, dtype=dtype)
        y = _apply(self.rotations, self.region, self.is_heads_first, positions, x).double()
        cosines, sines = self.angles(positions)
        rotated = ops.rotate(x.double(), cosines.double(), sines.double(), self.is_interleaved)
        return bool((rotated - y).abs().max() <= TOLERANCE * y.abs().max())

    def tabled(self, num_positions: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, num_positions, CHUNK_POSITIONS):
            yield self.angles(torch.arange(start, min(num_positions, start + CHUNK_POSITIONS)))


def _apply(
    rotations: Rotations,
    region: Region,
    is_heads_first: bool,
    positions: Tensor,
    x: Tensor,
) -> Tensor:
    """The region on x `[tokens, heads, head_dim]` at other positions, in x's dtype."""
    shape = rotations.graph.shape(region.source)
    assert shape is not None
    device = next(iter(rotations.graph.values[rotations.graph.positions])).device
    source = (x.transpose(0, 1) if is_heads_first else x).reshape(shape).to(device)
    given = _positional_values(rotations, region, positions.to(device))
    with torch.no_grad():
        return run_region(rotations.graph, region, source, given, keeps_dtype=True).cpu()


def _positional_values(
    rotations: Rotations, region: Region, positions: Tensor
) -> Mapping[fx.Node, Any]:
    """What the region takes as given, computed for these positions."""
    graph = rotations.graph
    inside = {region.source, *region.nodes}
    needed = {each for node in region.nodes for each in node.all_input_nodes if each not in inside}
    values: dict[fx.Node, Any] = {}
    for node in ancestors(needed, rotations.order):
        if node is graph.positions:
            values[node] = positions
        elif node is graph.token_ids:
            values[node] = torch.zeros_like(positions)
        else:
            values[node] = run_node(graph, node, values.__getitem__)
    return values


def _emit(rotations: Rotations, region: Region, angles: Angles, is_heads_first: bool) -> bool:
    graph, output = rotations.graph, region.nodes[-1]
    shape = graph.shape(output)
    assert shape is not None
    heads = region.source
    if is_heads_first:
        heads = graph.call(output, "reshape", heads, shape[1], -1, shape[2])
        heads = graph.call(output, "transpose", heads, 0, 1)
    else:
        heads = graph.call(output, "reshape", heads, -1, *shape[1:])
    if not graph.is_dense(heads):
        heads = graph.call(output, "contiguous", heads)
    if angles.gathered is None or angles.gathered[0] not in graph.values:  # dropped with a misfit
        angles.gathered = _gather(graph, angles)
    new = graph.call(output, ops.rotate, heads, *angles.gathered, angles.is_interleaved)
    for node in (*angles.gathered, heads, new):
        rotations.order.setdefault(node, rotations.order[output])
    return graph.replace(output, new)


def _gather(graph: EvaluatedGraph, angles: Angles) -> tuple[fx.Node, fx.Node]:
    """At the start of the graph: the angles of this step's tokens."""
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    device = next(iter(graph.values[graph.positions])).device
    nodes: list[fx.Node] = []
    for table in (angles.cosines, angles.sines):
        constant = graph.constant(first, table.to(device))
        nodes.append(graph.call(first, aten.index_select.default, constant, 0, graph.positions))
    return nodes[0], nodes[1]
