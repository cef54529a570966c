"""The ways in which a decoder can be served, from the most to the least wanted.

A route turns an upload into a decoder that claims to compute the same. Owns what a route is and
the routes of exported graphs; those of directories are in `directory_routes.py`. Whether the
claim holds is `runtime.proving`'s question.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from runtime.compiling.graph_decoder import UncachedGraph, paged_info, whole_limit
from runtime.compiling.loading import graph_decoder, page_in_form
from runtime.compiling.paging import NotPageable
from runtime.compiling.paging.cast import cast
from runtime.compiling.paging.page import DEFAULT_MAX_CONTEXT_TOKENS
from runtime.compiling.paging.signature import num_embedded_ids, read_decoder_signature
from runtime.execution.whole import WholeModel
from runtime.importing.archive import UnpackedUpload
from runtime.importing.exported import ExportedProgramModel
from runtime.importing.huggingface_directory import eos_token_ids, read_json
from runtime.importing.program import Decoder
from runtime.protocol import DecoderInfo
from runtime.proving.activations import ACTIVATION_BYTES, affordable_context
from runtime.proving.decoder import DecoderProver
from runtime.proving.exported_original import ExportedOriginal
from runtime.proving.forms import Form, WholeForm, paged_form

UNCACHED = "Uncached: every token computes its whole sequence again."


class NotThisWay(Exception):
    """A route does not serve this model; another may. The message is one plain sentence."""


@dataclass(frozen=True)
class Served:
    """A decoder as one route would serve it: paged, or a `whole` model. `program` is the graph
    that it is, and `program_path` where that lies."""

    route: str  # for people, one sentence
    format: Literal["huggingface", "pt2"]
    info: DecoderInfo
    form: Form
    num_parameters: int
    weight_bytes: int
    notes: list[str]
    decoder: Decoder | None = None
    whole: WholeModel | None = None
    program: ExportedProgramModel | None = None
    program_path: Path | None = None


@dataclass(frozen=True)
class Route:
    """`load` takes why no route before it serves the model, and raises `NotThisWay`, or
    `ImportFailure` for what no route would serve."""

    label: str
    load: Callable[[str], Served]


@dataclass(frozen=True)
class Source:
    """An upload that is a decoder, and what can be done with it. `fuse` makes the fused form of
    what is served, and raises `NotThisWay` where there is none."""

    upload: UnpackedUpload
    text_directory: Path | None  # with the tokenizer
    routes: list[Route]
    prover: DecoderProver
    fuse: Callable[[Served], Served]


def graph_source(upload: UnpackedUpload, model: ExportedProgramModel) -> Source:
    """Of an uploaded graph `(input_ids) -> logits`, perhaps with a tokenizer beside it."""
    info = describe_graph(model, upload.text_directory)
    return Source(
        upload=upload,
        text_directory=upload.text_directory,
        routes=graph_routes(model, upload.path, info),
        prover=DecoderProver(ExportedOriginal(model)),
        fuse=lambda served: paged_graph(model, upload.path, served.info, "fused"),
    )


def graph_routes(model: ExportedProgramModel, path: Path, info: DecoderInfo) -> list[Route]:
    """Of a graph `(input_ids) -> logits` at `path`, of which `info` says what its files do."""
    return [
        Route("rewriting the graph", lambda _: paged_graph(model, path, info)),
        Route("serving it uncached", lambda reason: _uncached_graph(model, path, info, reason)),
    ]


def describe_graph(model: ExportedProgramModel, text_directory: Path | None) -> DecoderInfo:
    """What a graph and the files beside it say of themselves, before anything is paged."""
    config: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    if text_directory is not None:
        config = read_json(text_directory / "config.json")
        generation = read_json(text_directory / "generation_config.json")
    limit = config.get("max_position_embeddings")
    default = limit if isinstance(limit, int) and limit > 0 else DEFAULT_MAX_CONTEXT_TOKENS
    signature = read_decoder_signature(model.program)
    return DecoderInfo(
        architecture=_architecture(model),
        vocab_size=signature.vocab_size,
        max_context_tokens=min(default, whole_limit(model.program, default)),
        num_layers=0,
        kv_bytes_per_token=0,
        dtype=str(_dtype(model)).removeprefix("torch."),
        has_tokenizer=False,
        has_chat_template=False,
        eos_token_ids=list(eos_token_ids(config, generation)),
        num_embedded_ids=num_embedded_ids(model.program, signature),
    )


def paged_graph(
    model: ExportedProgramModel, path: Path, info: DecoderInfo, form: str = "eager"
) -> Served:
    """A graph in a paged form. Raises `NotThisWay`."""
    limit = info.max_context_tokens
    try:
        paged = page_in_form(model.program, limit, form)
    except NotPageable as error:
        raise NotThisWay(error.reason) from error
    found = paged_info(paged, info.architecture, has_tokenizer=False, has_chat_template=False)
    info = msgspec.structs.replace(
        found, eos_token_ids=info.eos_token_ids, num_embedded_ids=info.num_embedded_ids
    )
    decoder = graph_decoder(paged, info)

    def load(dtype: torch.dtype) -> Decoder:
        return graph_decoder(page_in_form(model.program, limit, form, dtype), info)

    return Served(
        route="Paged by rewriting its graph.",
        format="pt2",
        info=info,
        form=paged_form(decoder, load, name=form),
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        notes=decoder.notes,
        decoder=decoder,
        program=model,
        program_path=path,
    )


def _uncached_graph(
    model: ExportedProgramModel, path: Path, info: DecoderInfo, reason: str
) -> Served:
    info = msgspec.structs.replace(info, is_paged=False, unpaged_reason=reason)
    eos_ids = tuple(info.eos_token_ids)
    try:
        whole = UncachedGraph(model, info, eos_ids, [])
    except NotPageable as error:
        raise NotThisWay(error.reason) from error

    def load(dtype: torch.dtype) -> WholeModel:
        if dtype == own:
            return whole
        program = cast(model.program, dtype)
        return UncachedGraph(ExportedProgramModel(program, model.signature), info, eos_ids, [])

    own: torch.dtype = getattr(torch, info.dtype)
    info, notes = within_memory(whole, info)
    whole.info = info
    return Served(
        route=UNCACHED,
        format="pt2",
        info=info,
        form=WholeForm("eager", own, info.max_context_tokens, load),
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        notes=notes,
        whole=whole,
        program=model,
        program_path=path,
    )


def within_memory(whole: WholeModel, info: DecoderInfo) -> tuple[DecoderInfo, list[str]]:
    """An uncached model's description, with no longer a context than its memory allows."""
    limit = affordable_context(whole, info.max_context_tokens)
    if limit == info.max_context_tokens:
        return info, []
    note = (
        f"Of {info.max_context_tokens:,} tokens of context, {limit:,} are served: without a cache, "
        f"a longer sequence would take more than {ACTIVATION_BYTES >> 20:,} MiB beside the weights."
    )
    return msgspec.structs.replace(info, max_context_tokens=limit), [note]


def alone(served: Served) -> Served:
    """An uncached decoder whose sequences are run one by one."""
    assert isinstance(served.form, WholeForm), "a paged decoder's sequences never meet"
    return replace(served, form=replace(served.form, name="alone", is_batched=False))


def _architecture(model: ExportedProgramModel) -> str:
    """The class that was exported, as far as the graph remembers it."""
    for node in model.program.graph.nodes:
        for _, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = str(kind).rpartition(".")[2]
            if name.isidentifier() and not name.startswith("_"):  # torch's own placeholders do
                return name
    return "Exported graph"


def _dtype(model: ExportedProgramModel) -> torch.dtype:
    """What most of the weights are in."""
    counts = Counter[torch.dtype]()
    for tensor in model.state.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32
