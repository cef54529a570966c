"""Starts an embedder: its model, tokenizer and prompt, warmed up by one run."""

from pathlib import Path

from runtime.batching.embedding_texts import EmbeddingTexts
from runtime.importing.embedder import load_embedder as load_directory
from runtime.importing.embedder_layout import read_layout
from runtime.protocol import Manifest, Ready, Serve
from runtime.server.embedder import EmbedderServer
from runtime.starting.memory import settled_bytes
from runtime.text.tokenizer import Tokenizer


def load_embedder(config: Serve, manifest: Manifest) -> tuple[EmbedderServer, Ready]:
    """An embedder, after a run on one short text. Without a tokenizer it takes token ids only."""
    directory = Path(config.artifact_dir)
    layout = read_layout(directory)
    embedder = load_directory(directory, config.device)
    # The manifest's: the build has proved which texts may share a run.
    info = embedder.info = manifest.embedder or embedder.info
    tokenizer = Tokenizer.load(layout.transformer) if info.has_tokenizer else None
    embedder.embed([[0]])
    texts = EmbeddingTexts(info, tokenizer, prompt=layout.prompt, lowercases=layout.lowercases)
    ready = Ready(manifest=manifest, memory_bytes=settled_bytes())
    return EmbedderServer(embedder.embed, texts, info, config), ready
