"""transformers' models whose attention is their own, and some others, paged as graphs."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from runtime.compiling.huggingface_export import export_huggingface
from runtime.compiling.paging import NotPageable, is_decoder_graph, page
from tests.runtime.compiling.paging.replaying import largest_difference

VOCAB = 61
TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
GPT: dict[str, Any] = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FALCON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(model_type: str, config: dict[str, Any], attention: str = "eager") -> Any:
    torch.manual_seed(0)
    settings = AutoConfig.for_model(model_type, **TOKENS, **config)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("model_type", "config", "attention", "num_kv_heads"),
    [
        ("llama", LLAMA, "sdpa", 2),
        ("llama", LLAMA, "eager", 2),
        ("qwen2", {**LLAMA, "use_sliding_window": False}, "sdpa", 2),
        ("gpt2", GPT, "eager", 4),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "eager", 4),
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, "eager", 4),
        ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, "sdpa", 2),
        ("falcon", {**FALCON, "multi_query": True}, "eager", 1),
        ("gptj", {**GPT, "rotary_dim": 4}, "eager", 4),
    ],
)
def test_exports_are_paged(
    model_type: str, config: dict[str, Any], attention: str, num_kv_heads: int
) -> None:
    model = tiny(model_type, config, attention)
    program = export_huggingface(model)
    assert is_decoder_graph(program)
    paged = page(program)
    assert [layer.num_kv_heads for layer in paged.layers] == [num_kv_heads] * 2
    difference = largest_difference(paged, lambda ids: model(ids, use_cache=False).logits, VOCAB)
    assert difference < 2e-5


def test_a_bias_rounded_on_purpose_is_refused() -> None:
    """Falcon rounds its slopes times positions to bfloat16, whatever the model's dtype."""
    model = tiny("falcon", {**FALCON, "alibi": True, "multi_query": False})
    with pytest.raises(NotPageable, match="mask or bias"):
        page(export_huggingface(model))


def test_scores_in_float32_inside_a_half_precision_model() -> None:
    """GPT-J widens queries and keys; what is cached has the model's dtype all the same."""
    model = tiny("gptj", {**GPT, "rotary_dim": 4}).bfloat16()
    paged = page(export_huggingface(model))
    assert paged.dtype == torch.bfloat16
    difference = largest_difference(paged, lambda ids: model(ids, use_cache=False).logits, VOCAB)
    assert difference < 0.05
