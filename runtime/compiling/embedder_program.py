"""An embedder as a tensor program `(token_ids, lengths) -> vectors`.

As such it has the forms that tensor programs have. Made from a loaded embedder, so that what is
compiled is what was proved; pooling and what follows it are part of the graph.
"""

import warnings
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from runtime.importing.embedder import Embedder, load_embedder
from runtime.importing.exported import ExportedProgramModel, first_line
from runtime.importing.knowledge import set_schema
from runtime.importing.program import ImportFailure
from runtime.importing.signature import read_signature
from runtime.protocol import Manifest

TEXT_TOKENS = 64  # of a text where forms are compared and timed
RUN_TOKENS = 1024  # as `Serve.max_batch_tokens`: of a run of short texts


class EmbedderProgram(ExportedProgramModel):
    """The graph of an embedder; its uploaded form is the embedder itself. Raises `ImportFailure`
    when the model cannot be traced."""

    def __init__(self, embedder: Embedder) -> None:
        program = _export(embedder)
        super().__init__(program, read_signature(program))
        self._embedder = embedder
        info = embedder.info
        ids, lengths = self.schema.inputs
        most_texts = 1 if info.batching == "alone" else RUN_TOKENS // TEXT_TOKENS
        is_padded = info.batching == "padded"
        schema = msgspec.structs.replace(
            self.schema,
            is_batched=info.batching != "alone",
            inputs=[
                msgspec.structs.replace(
                    ids,
                    minimum=0,
                    maximum=info.vocab_size - 1,
                    max_shape=[most_texts, info.max_tokens],
                    padded_axis=1 if is_padded else None,
                    pad_value=embedder.pad_token_id,
                ),
                msgspec.structs.replace(lengths, max_shape=[most_texts]),
            ],
        )
        set_schema(self, schema)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        token_ids, lengths = inputs
        return [self._embedder.embed_padded(token_ids, lengths)]


class _Whole(nn.Module):
    """What is traced."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.module, self.head = embedder.module, embedder.head
        self._embedder = embedder

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        return self._embedder(token_ids, lengths)


def load_embedder_program(artifact_dir: Path, manifest: Manifest, device: str) -> EmbedderProgram:
    """Raises `ImportFailure`."""
    embedder = load_embedder(artifact_dir, device)
    embedder.info = manifest.embedder or embedder.info  # the manifest's was proved
    return EmbedderProgram(embedder)


def _export(embedder: Embedder) -> ExportedProgram:
    info = embedder.info
    # Lengths stay below the shorter texts that forms are compared on, too.
    tokens = max(2, min(TEXT_TOKENS, info.max_tokens))
    lengths = torch.tensor([max(1, tokens // 2), max(1, tokens - 2)], device=embedder.device)
    token_ids = torch.arange(2 * tokens, device=embedder.device).reshape(2, tokens)
    texts = Dim("texts", min=1)
    axes = ({0: texts, 1: Dim("tokens", min=1, max=max(2, info.max_tokens))}, {0: texts})
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                _Whole(embedder).eval(),
                (token_ids % info.vocab_size, lengths),
                dynamic_shapes=axes,
                strict=False,
            )
    # The model's own code runs here, on symbols instead of numbers.
    except Exception as error:
        raise ImportFailure(
            "export_failed",
            f"{info.architecture} cannot be written as a graph, so it has no other forms: "
            f"{first_line(error)}.",
        ) from error
