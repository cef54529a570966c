"""Loads an embedder: any transformers encoder, its pooling, and what sentence-transformers puts
after them. No architecture has code of its own here.

Owns the load and its refusals. Whether texts may be padded is `runtime.proving`'s question.
"""

import inspect
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when transformers is imported

import safetensors
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from runtime.execution.pooling import pool
from runtime.importing.embedder_layout import DenseLayout, EmbedderLayout, read_layout
from runtime.importing.embedder_texts import pad_texts, pad_token_of
from runtime.importing.huggingface_directory import check_files
from runtime.importing.huggingface_loading import by_transformers, check_sizes, first_line
from runtime.importing.program import ImportFailure
from runtime.protocol import EmbedderInfo
from runtime.text.tokenizer import Tokenizer, TokenizerError

DEFAULT_MAX_TOKENS = 512  # where nothing sets a limit


class Embedder:
    """Texts as token ids in, vectors out. `info.batching` is a guess until it was proved."""

    def __init__(
        self, module: PreTrainedModel, head: "Head", info: EmbedderInfo, pad_token_id: int
    ) -> None:
        self.module = module
        self.head = head
        self.info = info
        self.pad_token_id = pad_token_id
        self.notes: list[str] = []
        self._takes_mask = "attention_mask" in inspect.signature(module.forward).parameters

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.info.dtype)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.inference_mode()
    def embed(self, texts: list[list[int]]) -> Tensor:
        """Float32 `[texts, dimensions]`, on the CPU. Texts of different lengths are padded on the
        right and masked; equal ones run without a mask."""
        return self.embed_padded(*pad_texts(texts, self.pad_token_id))

    @torch.inference_mode()
    def embed_padded(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """The same of `token_ids` `[texts, tokens]`, of which `lengths` `[texts]` count."""
        has_padding = int(lengths.min()) < token_ids.shape[1]
        return self(token_ids.to(self.device), lengths.to(self.device), has_padding).cpu()

    def __call__(self, token_ids: Tensor, lengths: Tensor, has_padding: bool = True) -> Tensor:
        """Likewise, on its own device, without a look at the values, so that it can be traced."""
        options = {}
        if self._takes_mask and has_padding:
            positions = torch.arange(token_ids.shape[1], device=token_ids.device)
            options["attention_mask"] = (positions < lengths[:, None]).long()
        states = self.module(input_ids=token_ids, **options).last_hidden_state
        return self.head(states, lengths).float()


class Head(nn.Module):
    """Pooling and what follows it. Computes in float32 whatever the encoder's dtype: the cost is
    nothing beside the encoder's, and a sum over many tokens needs it."""

    def __init__(self, layout: EmbedderLayout) -> None:
        super().__init__()
        self.modes = layout.pooling
        self.steps = nn.ModuleList(
            Normalize() if s is None else _load_dense(s) for s in layout.steps
        )

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        vectors = pool(states, lengths, self.modes)
        for step in self.steps:
            vectors = step(vectors)
        return vectors


class Normalize(nn.Module):
    """To length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=-1)


def load_embedder(
    directory: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Embedder:
    """From safetensors, in `dtype` or else the dtype it was saved in. Raises `ImportFailure` with
    what to do about it when the directory cannot be served."""
    directory = Path(directory)
    layout = read_layout(directory)
    config_json = check_files(layout.transformer)
    module, notes = load_encoder(layout.transformer, dtype=dtype)
    module.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    head = Head(layout).to(torch.device(device)).eval().requires_grad_(False)
    weight = module.get_input_embeddings().get_parameter("weight")
    special_tokens, text_notes = _check_text(layout)
    info = EmbedderInfo(
        architecture=type(module).__name__,
        dimensions=_dimensions(module, head),
        vocab_size=int(weight.shape[0]),
        max_tokens=_max_tokens(module, layout),
        dtype=str(weight.dtype).removeprefix("torch."),
        pooling="+".join(layout.pooling),
        is_normalized=layout.is_normalized,
        special_tokens=special_tokens or 0,
        has_tokenizer=special_tokens is not None,
        matryoshka_dimensions=layout.matryoshka_dimensions,
    )
    embedder = Embedder(module, head, info, pad_token_of(config_json, info))
    embedder.notes = [*layout.notes, *notes, *text_notes]
    return embedder


def load_encoder(
    directory: Path, *, attention: str | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """The bare encoder on the CPU, and notes. Raises `ImportFailure`."""
    transformers.logging.disable_progress_bar()
    config_json = check_files(directory)
    auto = _auto_class(config_json)
    check_sizes(directory, config_json, auto)
    module, loading = by_transformers(
        auto,
        lambda: auto.from_pretrained(
            directory,
            dtype=dtype or "auto",
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        ),
    )
    # The pooler, which classifiers are trained with, gives nothing that is used here.
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing or loading["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in loading["mismatched_keys"])
        raise ImportFailure(
            "incomplete_weights",
            f"{len(wrong)} weights of {type(module).__name__} are missing or have the wrong shape "
            f"({', '.join(wrong[:3])}). Save the model again and upload the whole directory.",
        )
    unused = sorted(loading["unexpected_keys"])
    notes = [f"{len(unused)} weights in the upload are not used ({', '.join(unused[:3])})."]
    module.config.use_cache = False
    return module.eval().requires_grad_(False), notes if unused else []


def _auto_class(config: dict[str, Any]) -> Any:
    """Of a family of encoder-decoders, the class that is the encoder alone."""
    model_type: Any = config.get("model_type")
    encoder = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(model_type)
    if encoder is not None and encoder != MODEL_MAPPING_NAMES.get(model_type):
        return AutoModelForTextEncoding
    if config.get("is_encoder_decoder"):
        raise ImportFailure(
            "not_an_encoder",
            f"transformers has no class for the encoder of {str(model_type)[:80]!r} alone, so this "
            "encoder-decoder gives no embeddings here. Save its encoder as a model of its own.",
        )
    return AutoModel


# --- what is known of a model -----------------------------------------------------------


def _dimensions(module: PreTrainedModel, head: Head) -> int:
    """Found by embedding one token, which also shows that the model runs at all."""
    token_ids = torch.zeros(1, 1, dtype=torch.long, device=module.device)
    try:
        with torch.inference_mode():
            states = module(input_ids=token_ids).last_hidden_state
            return int(head(states, torch.ones_like(token_ids[0])).shape[-1])
    # The model's own code runs here, on a configuration its owner wrote.
    except Exception as error:
        raise ImportFailure(
            "forward_failed",
            f"{type(module).__name__} does not turn token ids into vectors: {first_line(error)}. "
            "This kind of model cannot be served yet.",
        ) from error


def _max_tokens(module: PreTrainedModel, layout: EmbedderLayout) -> int:
    """The longest text that its files allow and whose positions the model has. Families whose
    tables keep entries for padding have fewer than their configuration says."""
    limits = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in module.named_modules()
        if isinstance(table, nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITION_TABLES
    ]
    for limit in (getattr(module.config, "max_position_embeddings", None), layout.max_tokens):
        if isinstance(limit, int) and limit > 0:
            limits.append(limit)
    return min(limits, default=DEFAULT_MAX_TOKENS)


_POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")


def _check_text(layout: EmbedderLayout) -> tuple[int | None, list[str]]:
    """How many tokens are added to one text, None without a tokenizer; and notes."""
    try:
        tokenizer = Tokenizer.load(layout.transformer)
        return len(tokenizer.encode(layout.prompt)), []
    except TokenizerError as error:
        return None, [f"Text is not served, only token ids: {error}."]


def _load_dense(dense: DenseLayout) -> nn.Module:
    """The file's shapes are compared first: nothing is allocated of a size it does not have."""
    with torch.device("meta"):
        linear = nn.Linear(dense.in_features, dense.out_features, bias=dense.has_bias)
    described = {name: list(tensor.shape) for name, tensor in linear.state_dict().items()}
    try:
        with safetensors.safe_open(dense.directory / "model.safetensors", "pt") as file:
            names = {name.removeprefix("linear."): name for name in file.keys()}  # noqa: SIM118
            stored = {short: file.get_slice(name).get_shape() for short, name in names.items()}
            if stored != described:
                raise ImportFailure(
                    "incomplete_weights",
                    f"config.json in {dense.directory.name!r} describes a dense layer of "
                    f"{_shapes(described)}, but model.safetensors holds {_shapes(stored)}. Save "
                    "the model again and upload the whole directory.",
                )
            weights = {short: file.get_tensor(name).float() for short, name in names.items()}
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ImportFailure(
            "invalid_weights",
            f"model.safetensors in {dense.directory.name!r} cannot be read: {first_line(error)}.",
        ) from error
    linear.load_state_dict(weights, assign=True)
    return nn.Sequential(linear, getattr(nn, dense.activation)())


def _shapes(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name[:40]} {shape}" for name, shape in sorted(shapes.items())[:3])
