"""Small embedders of the kinds that real models bring, with a tokenizer of one token per word."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

VOCAB_SIZE = 200
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 70,
    "pad_token_id": 1,
}
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "log", "fast", "slow", "red"]


def bert() -> transformers.PreTrainedModel:
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def _of(model: str, config: str, **sizes: Any) -> Callable[[], transformers.PreTrainedModel]:
    def make() -> transformers.PreTrainedModel:
        return getattr(transformers, model)(getattr(transformers, config)(**(SIZES | sizes)))

    return make


DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
MODERNBERT = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
# Each with the longest text it takes: some tables of positions keep entries for padding.
FAMILIES: dict[str, tuple[Callable[[], transformers.PreTrainedModel], int]] = {
    "bert": (bert, 70),
    "roberta": (_of("RobertaForMaskedLM", "RobertaConfig"), 68),
    "xlm-roberta": (_of("XLMRobertaModel", "XLMRobertaConfig"), 68),
    "distilbert": (_of("DistilBertModel", "DistilBertConfig", **DISTILBERT), 70),
    "mpnet": (_of("MPNetModel", "MPNetConfig"), 68),
    "modernbert": (_of("ModernBertModel", "ModernBertConfig", **MODERNBERT, local_attention=8), 70),
    "deberta-v2": (_of("DebertaV2Model", "DebertaV2Config", **DEBERTA), 70),
    "electra": (_of("ElectraModel", "ElectraConfig", embedding_size=16), 70),
    "albert": (_of("AlbertModel", "AlbertConfig", embedding_size=16), 70),
}


def fnet() -> transformers.PreTrainedModel:
    """Mixes tokens by a Fourier transform, without a mask: padding changes everything."""
    return transformers.FNetModel(transformers.FNetConfig(**SIZES))


def qwen3() -> transformers.PreTrainedModel:
    """A decoder, as of the embedders that take the last token's vector."""
    return transformers.Qwen3Model(
        transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)
    )


def save_embedder(
    directory: Path,
    module: transformers.PreTrainedModel | None = None,
    *,
    pooling: str = "mean",
    steps: tuple[str, ...] = ("Normalize",),
    max_seq_length: int | None = 64,
    has_tokenizer: bool = True,
) -> Path:
    """A directory as sentence-transformers 2 to 5 saves it."""
    torch.manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    (module or bert()).save_pretrained(directory)
    kinds = ["Transformer", "Pooling", *steps]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    write_json(directory / "modules.json", modules)
    write_json(
        directory / "sentence_bert_config.json",
        {"max_seq_length": max_seq_length, "do_lower_case": False},
    )
    is_old = pooling.endswith(("tokens", "token"))  # a switch for each mode
    settings: dict[str, Any] = (
        {f"pooling_mode_{pooling}": True} if is_old else {"pooling_mode": pooling}
    )
    settings["word_embedding_dimension" if is_old else "embedding_dimension"] = 32
    write_json(directory / "1_Pooling" / "config.json", settings)
    if has_tokenizer:
        save_tokenizer(directory)
    return directory


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def save_tokenizer(directory: Path) -> None:
    """`[CLS] words [SEP]`; and, as real files do, set to cut and pad, which must not count."""
    pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=16, pad_id=1, pad_token="[PAD]")
    backend.save(str(directory / "tokenizer.json"))
