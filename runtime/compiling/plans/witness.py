"""A small batch whose logits tell whether a graph still computes what it did."""

import torch
from torch import Tensor, nn

from runtime.compiling.fusions.evaluated import TOLERANCES, plain_attention
from runtime.compiling.paging.site import attending

NUM_TOKENS = 5
SLACK = 4  # how many times one operation's tolerance the logits may be off


@torch.inference_mode()
def witness(module: nn.Module, vocab_size: int) -> Tensor:
    """Logits `[1, vocab]` of the last of a few tokens, with plain attention among all of them."""
    generator = torch.Generator().manual_seed(NUM_TOKENS)
    # Small ids: an output layer may have rows that no token has.
    token_ids = torch.randint(0, min(vocab_size, 32), (NUM_TOKENS,), generator=generator)
    with attending(lambda _, query, keys, values: plain_attention(query, keys, values)):
        return module(token_ids, torch.arange(NUM_TOKENS), torch.tensor([NUM_TOKENS - 1]))


def is_same(before: Tensor, after: Tensor) -> bool:
    """Whether two witnesses are equal but for rounding."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    limit = SLACK * TOLERANCES[before.dtype] * float(before.abs().max())
    return bool(((before.double() - after.double()).abs() <= limit).all())
