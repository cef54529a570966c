"""Starts an embedder: its model or a form of it, tokenizer and prompt, warmed up by one run."""

from pathlib import Path

import msgspec

from runtime.batching.embedding_texts import EmbeddingTexts
from runtime.compiling.form_embedder import embed_by
from runtime.importing.embedder_layout import read_layout
from runtime.protocol import Manifest, Ready, Serve
from runtime.server.embedder import EmbedderServer
from runtime.starting.chosen_form import load_chosen
from runtime.starting.memory import settled_bytes
from runtime.text.tokenizer import Tokenizer


def load_embedder(config: Serve, manifest: Manifest) -> tuple[EmbedderServer, Ready]:
    """An embedder, after a run on one short text. Without a tokenizer it takes token ids only."""
    directory = Path(config.artifact_dir)
    layout = read_layout(directory)
    info = manifest.embedder
    if info is not None and (run := load_chosen(config, manifest)) is not None:
        embed = embed_by(run, directory, info)
    else:
        from runtime.importing.embedder import load_embedder as load_directory

        embedder = load_directory(directory, config.device)
        # The manifest's: the build has proved which texts may share a run.
        info = embedder.info = info or embedder.info
        embed = embedder.embed
        manifest = msgspec.structs.replace(manifest, form="eager")
    tokenizer = Tokenizer.load(layout.transformer) if info.has_tokenizer else None
    embed([[0]])
    texts = EmbeddingTexts(info, tokenizer, prompt=layout.prompt, lowercases=layout.lowercases)
    ready = Ready(manifest=manifest, memory_bytes=settled_bytes())
    return EmbedderServer(embed, texts, info, config), ready
