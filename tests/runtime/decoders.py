"""Tiny random decoders of several families, saved as Hugging Face directories."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 20
OVERRIDES = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW},
    "qwen3": {"head_dim": 32},
}


def save_decoder(
    family: str,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    **overrides: object,
) -> PreTrainedModel:
    """A random model with logits spread widely enough that greedy choices are clear.

    An override of `...` leaves out what is common, for configurations without such a field.
    """
    torch.manual_seed(1000 * seed + sum(family.encode()))
    values = {**COMMON, **OVERRIDES.get(family, {}), **overrides}
    config = AutoConfig.for_model(
        family, **{name: value for name, value in values.items() if value is not ...}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.to(dtype).save_pretrained(directory)
    return model
