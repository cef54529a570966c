"""An embedder whose vectors come from a form of its program: no transformers, no second weights."""

from pathlib import Path

from torch import Tensor

from runtime.batching.embedding_batcher import Run as Embed
from runtime.compiling.forms import Run
from runtime.importing.embedder_layout import read_layout
from runtime.importing.embedder_texts import pad_texts, pad_token_of
from runtime.importing.huggingface_directory import check_files
from runtime.protocol import EmbedderInfo


def embed_by(run: Run, artifact_dir: Path, info: EmbedderInfo) -> Embed:
    """`run` is a form of `embedder_program.EmbedderProgram`."""
    pad_token_id = pad_token_of(check_files(read_layout(artifact_dir).transformer), info)

    def embed(texts: list[list[int]]) -> Tensor:
        return run(list(pad_texts(texts, pad_token_id)))[0]

    return embed
