"""Turns a decoder's exported graph into a packed one whose attention is left to the caller.

Owns the order of the steps and what comes out. Every step looks at what the graph computes and
raises `NotPageable` for what is not understood; whether the result equals the original is
`runtime.proving`'s question.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from runtime.compiling.paging.classify import classify
from runtime.compiling.paging.evaluation import Evaluator
from runtime.compiling.paging.groups import bypass, find_group, trace_sources
from runtime.compiling.paging.layout import Heads, Packer, read_heads
from runtime.compiling.paging.mixing import check_mixing
from runtime.compiling.paging.normal import DecoderGraph, eliminate, normalise
from runtime.compiling.paging.paths import check_paths
from runtime.compiling.paging.positions import TableWriter, find_context, find_frontier
from runtime.compiling.paging.refusal import NotPageable
from runtime.compiling.paging.rows import check_rows, pick_rows
from runtime.compiling.paging.scores import PositionTables, ScoreFunction
from runtime.compiling.paging.site import AttentionSite
from runtime.compiling.paging.sites import Site, find_sites
from runtime.execution.attention import AttentionSpec, LayerSpec

logger = logging.getLogger(__name__)
aten = torch.ops.aten

DEFAULT_MAX_CONTEXT_TOKENS = 32768  # where neither the graph nor its owner sets a limit
PROBE_TOKENS = 11


@dataclass(frozen=True)
class PagedGraph:
    """A decoder over packed tokens.

    `module(token_ids [tokens], positions [tokens], sample_indices [sampled])` gives logits
    `[sampled, vocab]`. Each attention is a `call_module` node to an `AttentionSite`, which must
    be called inside `site.attending`.
    """

    module: GraphModule
    layers: list[LayerSpec]
    vocab_size: int
    max_context_tokens: int
    dtype: torch.dtype
    notes: list[str]


@dataclass
class _Layer:
    """A site on its way into the packed graph; nodes are packed `[tokens, heads, width]`."""

    site: Site
    heads: Heads
    query: Node
    key: Node
    value: Node
    num_kv_heads: int


def page(program: ExportedProgram, *, max_context_tokens: int | None = None) -> PagedGraph:
    """Rewrite a program `(input_ids) -> logits`. Raises `NotPageable` with the reason why not."""
    try:
        return _page(program, max_context_tokens)
    except (NotPageable, MemoryError):
        raise
    # A graph may be written in ways that nobody foresaw; it is then refused like any other.
    except Exception as error:
        logger.exception("a graph could not be analysed")
        raise NotPageable(f"The graph could not be analysed: {_first_line(error)}.") from error


def _page(program: ExportedProgram, max_context_tokens: int | None) -> PagedGraph:
    decoder = normalise(program)
    evaluator = Evaluator(decoder)
    graph = decoder.module.graph
    originals = set(graph.nodes)
    sites = find_sites(list(graph.nodes), evaluator)
    for site in sites:
        check_paths(site, evaluator)
    all_heads = [read_heads(site, evaluator.lengths) for site in sites]
    tables = PositionTables(evaluator)
    functions = [
        ScoreFunction(site, heads, evaluator, tables)
        for site, heads in zip(sites, all_heads, strict=True)
    ]
    layers = _pack_operands(decoder, evaluator, sites, all_heads)
    for layer_index, layer in enumerate(layers):
        _cut(decoder, layer, layer_index, evaluator)
    notes: list[str] = []
    limits = [limit for limit in (decoder.max_tokens, max_context_tokens) if limit is not None]
    limit = min(limits, default=DEFAULT_MAX_CONTEXT_TOKENS)
    live = _live(decoder.module)
    frontier = find_frontier(live, evaluator)
    check_mixing(live, evaluator, originals)

    def check_length(length: int) -> None:
        for function in functions:
            function.check_length(length)

    context = find_context(frontier, evaluator, limit, check_length)
    specs: list[AttentionSpec] = []
    known: dict[tuple[Any, ...], AttentionSpec] = {}
    for function in functions:
        structure = function.structure()
        if structure not in known:
            known[structure], context = _classify(function, context)
        specs.append(known[structure])
    if context < limit:
        notes.append(f"The graph's own constants reach {context} tokens, which is its context.")
    elif not limits:
        notes.append(f"Nothing limits the graph's context; {context} tokens are served.")
    module = _pack_graph(decoder, evaluator, context)
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    check_rows(module, decoder.num_ids, context, decoder.dtype, device)
    return PagedGraph(
        module=module,
        layers=[
            LayerSpec(
                layer.heads.num_heads,
                layer.num_kv_heads,
                max(layer.heads.key_width, layer.heads.value_width),
                spec,
            )
            for layer, spec in zip(layers, specs, strict=True)
        ],
        vocab_size=decoder.vocab_size,
        max_context_tokens=context,
        dtype=decoder.dtype,
        notes=notes,
    )


def _classify(function: ScoreFunction, context: int) -> tuple[AttentionSpec, int]:
    try:
        return classify(function, context)
    except (RuntimeError, IndexError, ValueError) as error:
        raise NotPageable(
            f"An attention's mask cannot be evaluated: {_first_line(error)}."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")


def _pack_operands(
    decoder: DecoderGraph, evaluator: Evaluator, sites: list[Site], all_heads: list[Heads]
) -> list[_Layer]:
    """Insert the packed operands of every site, and find key and value heads that are copies by
    running the graph on random tokens."""
    graph = decoder.module.graph
    layers: list[_Layer] = []
    for site, heads in zip(sites, all_heads, strict=True):
        with graph.inserting_before(site.output):
            packer = Packer(graph, evaluator.lengths)
            count = heads.num_kv_heads
            layers.append(
                _Layer(
                    site=site,
                    heads=heads,
                    query=packer.pack(site.query, site.heads, heads.full, heads.num_heads),
                    key=packer.pack_copies(site.key, site.heads, heads, count),
                    value=packer.pack_copies(site.value, site.value_heads, heads, count),
                    num_kv_heads=count,
                )
            )
    operands = [node for layer in layers for node in (layer.key, layer.value)]
    sources = {node: trace_sources(node) for node in operands}
    wanted = list(
        dict.fromkeys([*operands, *(node for chain in sources.values() for node in chain)])
    )
    values = _probe(decoder, evaluator, wanted)
    for layer in layers:
        group = find_group(values[layer.key], values[layer.value])
        layer.num_kv_heads //= group
        layer.key = bypass(graph, evaluator, layer.key, group, sources[layer.key], values)
        layer.value = bypass(graph, evaluator, layer.value, group, sources[layer.value], values)
    return layers


def _probe(decoder: DecoderGraph, evaluator: Evaluator, wanted: list[Node]) -> dict[Node, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.num_ids, (1, PROBE_TOKENS), generator=generator)
    parameters = [*decoder.module.parameters(), *decoder.module.buffers()]
    device = parameters[0].device if parameters else torch.device("cpu")
    given = {decoder.token_ids: ids.to(device, decoder.ids_dtype)}
    try:
        values = evaluator.run(wanted, PROBE_TOKENS, given)
    except (RuntimeError, IndexError, ValueError) as error:
        raise NotPageable(
            f"The graph does not run on {PROBE_TOKENS} tokens: {_first_line(error)}."
        ) from error
    return dict(zip(wanted, values, strict=True))


def _cut(decoder: DecoderGraph, layer: _Layer, layer_index: int, evaluator: Evaluator) -> None:
    """Put an `AttentionSite` where the graph attends."""
    module, heads = decoder.module, layer.heads
    graph = module.graph
    name = f"attention_{layer_index}"
    module.add_submodule(name, AttentionSite(layer_index))
    with graph.inserting_before(layer.site.output):
        packer = Packer(graph, evaluator.lengths)
        size = max(heads.key_width, heads.value_width)
        operands = tuple(
            packer.convert(packer.pad(node, size - width), operand.node, decoder.dtype)
            for node, operand, width in (
                (layer.query, layer.site.query, heads.key_width),
                (layer.key, layer.site.key, heads.key_width),
                (layer.value, layer.site.value, heads.value_width),
            )
        )
        attended = graph.call_module(name, operands)
        attended = packer.restore(attended, layer.site.output, decoder.dtype)
        if heads.value_width < size:
            attended = packer.call(aten.slice.Tensor, attended, 2, 0, heads.value_width)
        output = packer.unpack(attended, layer.site, heads)
    layer.site.output.replace_all_uses_with(output)
    output.meta = dict(layer.site.output.meta)


def _live(module: GraphModule) -> list[Node]:
    """What the logits are computed from, in order."""
    seen: set[Node] = set()
    pending = [module.graph.output_node()]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return [node for node in module.graph.nodes if node in seen]


def _pack_graph(decoder: DecoderGraph, evaluator: Evaluator, context: int) -> GraphModule:
    """New inputs, tables for positions, one row of logits per sampled token."""
    module = decoder.module
    graph = module.graph
    frontier = find_frontier(_live(module), evaluator)
    logits = graph.output_node().args[0]
    assert isinstance(logits, Node), "the output is one node"
    with graph.inserting_before(decoder.token_ids):
        token_ids = graph.placeholder("token_ids")
        positions = graph.placeholder("positions")
        sample = graph.placeholder("sample_indices")
    with graph.inserting_after(sample):
        ids: Node = graph.call_function(aten.unsqueeze.default, (token_ids, 0))
    if decoder.ids_dtype != torch.int64:
        with graph.inserting_after(ids):
            ids = graph.call_function(aten.to.dtype, (ids, decoder.ids_dtype))
    picked = pick_rows(graph, logits, sample, evaluator)
    TableWriter(module, evaluator, positions, context).replace(frontier)
    decoder.token_ids.replace_all_uses_with(ids)
    with graph.inserting_before(graph.output_node()):
        result = graph.call_function(aten.reshape.default, (picked, [-1, decoder.vocab_size]))
    graph.output_node().args = (result,)
    graph.erase_node(decoder.token_ids)
    graph.set_codegen(CodeGen())
    eliminate(graph)
    module.delete_all_unused_submodules()
    graph.lint()
    module.recompile()
    return module.eval().requires_grad_(False)
