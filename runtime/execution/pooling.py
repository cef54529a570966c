"""How the vectors of a text's tokens become one vector of the text, for texts padded on the right.

The modes are those of sentence-transformers. Padding never reaches a result, whatever it holds.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pool(states: Tensor, lengths: Tensor, modes: Sequence[str]) -> Tensor:
    """`states` `[texts, tokens, hidden]` and `lengths` `[texts]`, at least 1, give
    `[texts, modes * hidden]`, at least in float32."""
    states = states if states.dtype == torch.float64 else states.float()
    positions = torch.arange(states.shape[1], device=states.device)
    is_token = (positions < lengths[:, None]).unsqueeze(-1)  # [texts, tokens, 1]
    return torch.cat([POOLINGS[mode](states, is_token, lengths) for mode in modes], dim=-1)


def _cls(states: Tensor, is_token: Tensor, lengths: Tensor) -> Tensor:
    return states[:, 0]


def _max(states: Tensor, is_token: Tensor, lengths: Tensor) -> Tensor:
    return states.masked_fill(~is_token, -torch.inf).amax(1)


def _sum(states: Tensor, is_token: Tensor) -> Tensor:
    return states.masked_fill(~is_token, 0.0).sum(1)


def _mean(states: Tensor, is_token: Tensor, lengths: Tensor) -> Tensor:
    return _sum(states, is_token) / lengths[:, None].to(states.dtype)


def _mean_sqrt_len(states: Tensor, is_token: Tensor, lengths: Tensor) -> Tensor:
    return _sum(states, is_token) / lengths[:, None].to(states.dtype).sqrt()


def _weighted_mean(states: Tensor, is_token: Tensor, lengths: Tensor) -> Tensor:
    """The token at position i, counted from 1, weighs i."""
    weights = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)
    total = lengths * (lengths + 1) // 2
    return _sum(states * weights[:, None], is_token) / total[:, None].to(states.dtype)


def _last(states: Tensor, is_token: Tensor, lengths: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), lengths - 1]


# In the order in which sentence-transformers joins several.
POOLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "last": _last,
}
