"""Checks that a paged decoder lets tokens meet in attention alone.

A convolution, a recurrent state, or a position counted from the start of the batch would mix what
packing lays side by side. Knows nothing of formats: any `PagedModel` can be checked.
"""

import torch
from torch import Tensor, nn

from runtime.execution.runner import PagedModel
from runtime.importing.program import ImportFailure
from runtime.protocol import DecoderInfo

LEAST_TOKENS, MOST_TOKENS = 8, 300  # 300 show what is mixed in strides of 128
MOST_WORK = 1e11  # multiplications of one forward
NUM_SAMPLED = 8


def affordable_tokens(module: nn.Module, max_context_tokens: int) -> int:
    """How many tokens a forward may have that is made only to look at a model."""
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    most = min(MOST_TOKENS, int(MOST_WORK / max(1, num_parameters)))
    return min(max(LEAST_TOKENS, most), max_context_tokens)


def check_locality(
    model: PagedModel, info: DecoderInfo, num_tokens: int, device: torch.device
) -> None:
    """Raise `ImportFailure` (`mixes_tokens`) if rows of a batch influence each other or know their
    place in it, while attention lets every token see only itself."""
    if num_tokens < 2 or info.num_ids < 2:
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(info.num_ids, (num_tokens,), generator=generator)
    # Neighbours in the first half, then up to the context's end.
    last, half = info.max_context_tokens - 1, num_tokens // 2
    far = torch.linspace(half, last, num_tokens - half).long()
    positions = torch.cat([torch.arange(half), far]).clamp(max=last)
    sampled = torch.linspace(1, num_tokens - 1, min(NUM_SAMPLED, num_tokens - 1)).long()
    changed = torch.cat([(tokens[:1] + 1) % info.num_ids, tokens[1:]])

    def run(tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        return _run(model, tokens.to(device), positions.to(device), rows.to(device))

    rows = run(tokens, positions, sampled)
    turned = run(tokens.flip(0), positions.flip(0), num_tokens - 1 - sampled)
    beside_another = run(changed, positions, sampled)
    if differ(rows, turned) or differ(rows, beside_another):
        raise ImportFailure(
            "mixes_tokens",
            "The model's layers pass something between tokens beside attention (a convolution, a "
            "recurrent state, or positions counted from the start of the batch), which cached "
            "keys and values do not hold.",
        )


def _run(model: PagedModel, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Logits `[rows, vocab]` of what each token is alone."""

    def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        group = query.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(group, dim=1)
        values = values.repeat_interleave(group, dim=1)
        score = (query * keys).sum(-1, keepdim=True) * model.layers[layer].attention.scale
        return values * (1 + score.sigmoid())

    return model.forward(tokens, positions, rows, attend)


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether half the rows differ by more than rounding. Single rows may: a router's near tie
    falls either way when a matrix product is cut differently."""
    noise = torch.finfo(one.dtype).eps ** 0.5
    one, other = one.float(), other.float()
    errors = (one - other).abs().amax(-1)
    scale = one.abs().max()
    if not errors.isfinite().all() or not scale > 0:
        return False  # nothing can be told; what is served is proved all the same
    return bool(errors.median() > noise * scale)
