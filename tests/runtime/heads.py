"""Small models with heads of the kinds that real ones bring, saved as transformers saves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.runtime.embedders import DEBERTA, DISTILBERT, MODERNBERT, SIZES, WORDS

LABELS = {0: "bad", 1: "middling", 2: "good"}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
CONVOLUTIONS = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
WAVEFORM: dict[str, Any] = {
    **{name: VISION[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "vocab_size": 40,
}
SPECTROGRAM = {**VISION, "patch_size": 16, "max_length": 64, "num_mel_bins": 32}


def labelled(sizes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        **sizes,
        "id2label": LABELS,
        "label2id": {name: at for at, name in LABELS.items()},
        **more,
    }


def make(model: str, config: str, sizes: dict[str, Any]) -> transformers.PreTrainedModel:
    """With weights of a trained model's size, which tell rows apart."""
    torch.manual_seed(0)
    module = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return module


def _of(model: str, config: str, sizes: dict[str, Any]) -> Callable[[], Any]:
    return lambda: make(model, config, sizes)


TEXT_MODELS: dict[str, Callable[[], Any]] = {
    "bert": _of("BertForSequenceClassification", "BertConfig", labelled(SIZES)),
    "roberta": _of("RobertaForSequenceClassification", "RobertaConfig", labelled(SIZES)),
    "distilbert": _of(
        "DistilBertForSequenceClassification", "DistilBertConfig", labelled(SIZES, **DISTILBERT)
    ),
    "modernbert": _of(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        labelled(SIZES, **MODERNBERT, local_attention=8),
    ),
    "deberta-v2": _of(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", labelled(SIZES, **DEBERTA)
    ),
    "llama": _of(
        "LlamaForSequenceClassification", "LlamaConfig", labelled(SIZES, num_key_value_heads=2)
    ),
    "tokens": _of("BertForTokenClassification", "BertConfig", labelled(SIZES)),
    "answers": _of("BertForQuestionAnswering", "BertConfig", SIZES),
    "fnet": _of("FNetForSequenceClassification", "FNetConfig", labelled(SIZES)),
}
IMAGE_MODELS: dict[str, Callable[[], Any]] = {
    "vit": _of("ViTForImageClassification", "ViTConfig", labelled(VISION)),
    "resnet": _of(
        "ResNetForImageClassification", "ResNetConfig", labelled(CONVOLUTIONS, embedding_size=8)
    ),
    "convnext": _of("ConvNextForImageClassification", "ConvNextConfig", labelled(CONVOLUTIONS)),
}
AUDIO_MODELS: dict[str, Callable[[], Any]] = {
    "wav2vec2": _of("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", labelled(WAVEFORM)),
    "wavlm": _of("WavLMForSequenceClassification", "WavLMConfig", labelled(WAVEFORM)),
    "ast": _of("ASTForAudioClassification", "ASTConfig", labelled(SPECTROGRAM)),
}


def cross_encoder() -> transformers.PreTrainedModel:
    """One score for a pair of texts."""
    return make("BertForSequenceClassification", "BertConfig", SIZES | {"num_labels": 1})


def save_tokenizer(directory: Path, *, has_types: bool = True) -> None:
    """`[CLS] words [SEP]`, and `[CLS] words [SEP] words [SEP]` of a pair; one token per word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.add_special_tokens(pieces[:4])
    backend.enable_truncation(4)  # as real files do; nothing may be cut
    backend.enable_padding(length=16, pad_id=1, pad_token="[PAD]")
    backend.save(str(directory / "tokenizer.json"))
    names = ["input_ids", "attention_mask"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "model_input_names": [*names[:1], "token_type_ids", *names[1:]] if has_types else names,
        **dict(zip(("unk_token", "pad_token", "cls_token", "sep_token"), pieces, strict=False)),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def save_processor(directory: Path, **settings: Any) -> None:
    """ViT's, of 32 x 32 pixels."""
    content = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        **settings,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(content))


def save_head(
    directory: Path,
    module: transformers.PreTrainedModel,
    *,
    has_tokenizer: bool = True,
    has_types: bool = True,
) -> Path:
    """The model, with a tokenizer if it takes texts."""
    directory.mkdir(parents=True, exist_ok=True)
    module.save_pretrained(directory)
    if has_tokenizer and module.main_input_name == "input_ids":
        save_tokenizer(directory, has_types=has_types)
    return directory
