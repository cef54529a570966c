"""How the token ids of texts become what an encoder takes. Loads no model."""

from typing import Any

import torch
from torch import Tensor

from runtime.protocol import EmbedderInfo


def pad_texts(texts: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids `[texts, tokens]`, padded on the right, and lengths `[texts]`."""
    longest = max(map(len, texts))
    padded = [text + [pad_token_id] * (longest - len(text)) for text in texts]
    return torch.tensor(padded), torch.tensor([len(text) for text in texts])


def pad_token_of(config_json: dict[str, Any], info: EmbedderInfo) -> int:
    """The token that a model's configuration names for padding, else the first: it is masked."""
    pad = config_json.get("pad_token_id")
    return pad if isinstance(pad, int) and 0 <= pad < info.vocab_size else 0
