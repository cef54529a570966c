"""The routes of a directory of transformers: its own attention, an export of it, or uncached."""

from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import nn

from runtime.building.deadline import within
from runtime.building.routes import (
    UNCACHED,
    NotThisWay,
    Route,
    Served,
    Source,
    paged_graph,
    within_memory,
)
from runtime.compiling.huggingface_export import export_huggingface
from runtime.compiling.packaging import PROGRAM_NAME
from runtime.execution.whole import WholeModel
from runtime.importing.archive import UnpackedUpload
from runtime.importing.exported import load_exported
from runtime.importing.huggingface import PAGE_ANOTHER_WAY, HuggingFaceDecoder, load_decoder
from runtime.importing.huggingface_uncached import UncachedHuggingFace, load_uncached
from runtime.importing.program import ImportFailure
from runtime.protocol import DecoderInfo
from runtime.proving.decoder import DecoderProver
from runtime.proving.forms import WholeForm, paged_form
from runtime.proving.huggingface_original import HuggingFaceOriginal

EXPORT_SECONDS = 240.0


def directory_source(upload: UnpackedUpload, scratch: Path) -> Source:
    """An export, where one is needed, goes to `scratch`."""
    directory = upload.path
    routes = [
        Route("paging through transformers' attention", lambda _: _registry(directory)),
        Route("rewriting an exported graph", lambda _: exported(directory, scratch)),
        Route("serving it uncached", lambda reason: _uncached(directory, reason)),
    ]
    return Source(
        upload=upload,
        text_directory=directory,
        routes=routes,
        prover=DecoderProver(HuggingFaceOriginal(directory)),
        fuse=lambda _: exported(directory, scratch, "fused"),
    )


def _registry(directory: Path) -> Served:
    try:
        decoder = load_decoder(directory)
    except ImportFailure as failure:
        if failure.error.code not in PAGE_ANOTHER_WAY:
            raise
        raise NotThisWay(failure.error.message) from failure

    def load(dtype: torch.dtype) -> HuggingFaceDecoder:
        return load_decoder(directory, dtype=dtype, is_checked=True)

    num_parameters, weight_bytes = _weights(decoder.module)
    return Served(
        route="Paged through transformers' own attention interface.",
        format="huggingface",
        info=_with_eos(decoder.info, decoder.eos_token_ids),
        form=paged_form(decoder, load),
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        notes=decoder.notes,
        decoder=decoder,
    )


def exported(directory: Path, scratch: Path, form: str = "eager") -> Served:
    """The directory's model as a graph, saved in `scratch` and paged from what was saved. Raises
    `NotThisWay`."""
    model = load_uncached(directory, is_checked=True)
    info = _with_eos(model.info, model.eos_token_ids)
    path = scratch / PROGRAM_NAME
    if not path.is_file():
        _export(model, path)
    served = paged_graph(load_exported(path), path, info, form)
    num_parameters, weight_bytes = _weights(model.module)
    return replace(
        served,
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        route="Paged by rewriting an exported graph of it.",
        notes=[*model.notes, *served.notes],
    )


def _export(model: UncachedHuggingFace, path: Path) -> None:
    try:
        with within(EXPORT_SECONDS, "exporting the model as a graph"):
            torch.export.save(export_huggingface(model.module), path)
    except (ImportFailure, TimeoutError) as error:
        raise NotThisWay(str(error)) from error


def _uncached(directory: Path, reason: str) -> Served:
    model = load_uncached(directory, unpaged_reason=reason, is_checked=True)

    def load(dtype: torch.dtype) -> WholeModel:
        return (
            model
            if dtype == model.dtype
            else load_uncached(directory, dtype=dtype, is_checked=True)
        )

    model.info, notes = within_memory(model, model.info)
    num_parameters, weight_bytes = _weights(model.module)
    return Served(
        route=UNCACHED,
        format="huggingface",
        info=_with_eos(model.info, model.eos_token_ids),
        form=WholeForm("eager", model.dtype, model.info.max_context_tokens, load),
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        notes=[*model.notes, *notes],
        whole=model,
    )


def _with_eos(info: DecoderInfo, eos_ids: tuple[int, ...]) -> DecoderInfo:
    return msgspec.structs.replace(info, eos_token_ids=list(eos_ids))


def _weights(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
