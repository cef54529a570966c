"""A causal language model class that transformers does not have, written as those of today are.

It attends in two ways at once, with sinks, a soft cap, narrow values and a window whose mask is
made from whatever overlay a test plants.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Overlay = Callable[[Any, Any, Any, Any], Any]
HEADS, KV_HEADS, KEY_WIDTH, VALUE_WIDTH = 4, 2, 12, 6


class NewcomerConfig(PreTrainedConfig):
    model_type = "newcomer"
    window = 20
    hidden_size = 32
    num_hidden_layers = 2
    vocab_size = 64
    max_position_embeddings = 128


# What a windowed layer's mask is and-ed with, or a mask that is or-ed; set by tests.
planted: dict[str, Overlay] = {}


def eager(
    module: "NewcomerAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float,
    s_aux: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap) + attention_mask
    sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous(), None


class NewcomerAttention(nn.Module):
    """Attends twice, in two halves of its output."""

    def __init__(self, config: NewcomerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.query = nn.Linear(width, 2 * HEADS * KEY_WIDTH)
        self.key = nn.Linear(width, 2 * KV_HEADS * KEY_WIDTH)
        self.value = nn.Linear(width, 2 * KV_HEADS * VALUE_WIDTH)
        self.out = nn.Linear(2 * HEADS * VALUE_WIDTH, width)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        halves: list[Tensor] = []
        for half in range(2):
            rows = [
                projected.unflatten(-1, (2, heads, -1))[:, :, half].transpose(1, 2)
                for projected, heads in (
                    (self.query(hidden), HEADS),
                    (self.key(hidden), KV_HEADS),
                    (self.value(hidden), KV_HEADS),
                )
            ]
            attended, _ = attend(
                self, *rows, attention_mask, scaling=0.4, softcap=3.0, s_aux=self.sinks, dropout=0.0
            )
            halves.append(attended.flatten(2))
        return self.out(torch.cat(halves, dim=-1))


class NewcomerForCausalLM(PreTrainedModel):
    config_class = NewcomerConfig
    config: NewcomerConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: NewcomerConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            NewcomerAttention(config) for _ in range(config.num_hidden_layers)
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = self.tokens(input_ids) + self.positions(position_ids)
        common = {"config": self.config, "inputs_embeds": hidden}
        common |= {"attention_mask": None, "past_key_values": None}
        everything = create_causal_mask(**common)
        windowed = create_causal_mask(
            **common,
            and_mask_function=planted.get("and"),
            or_mask_function=planted.get("or"),
        )
        for i, layer in enumerate(self.layers):
            hidden = hidden + layer(hidden, everything if i % 2 else windowed)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
