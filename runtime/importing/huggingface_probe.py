"""Finds out how a transformers model attends, by watching one forward pass.

Owns what is understood of an attention layer: shapes, scale, window, cap. Anything else that a
layer asks for is refused by name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runtime.execution.attention import AttentionSpec, LayerSpec
from runtime.execution.reference import attend_one
from runtime.importing.program import ImportFailure

# What layers pass along that does not change what attention computes.
NEUTRAL_ARGUMENTS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",  # the mask, which is evaluated, says the same
        "use_cache",
    }
)


class Probe:
    """Stands in for attention and mask building during one forward, and keeps what it saw."""

    def __init__(self, max_context_tokens: int) -> None:
        self.layers: list[LayerSpec] = []
        self.layer_of: dict[nn.Module, int] = {}
        self.dtype = torch.float32
        self._max_context_tokens = max_context_tokens
        self._masks: list[tuple[Tensor, int | None]] = []  # (mask handed out, its window)

    def mask(self, *, mask_function: Callable[..., Any], **kwargs: Any) -> Tensor:
        """Classify a mask function; the dense mask returned only identifies it to `attend`."""
        window = classify_mask(mask_function, self._max_context_tokens, kwargs["device"])
        shape = (kwargs["batch_size"], 1, kwargs["q_length"], kwargs["kv_length"])
        mask = torch.ones(shape, dtype=torch.bool, device=kwargs["device"])
        self._masks.append((mask, window))
        return mask

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Record the layer, then attend as it will be. Tensors are `[1, heads, tokens, width]`."""
        _refuse_arguments(module, kwargs)
        if dropout or is_causal is False:
            raise _unsupported(module, "attends with dropout or to later tokens")
        if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
            raise _unsupported(module, "has keys and values of different widths")
        if module in self.layer_of:
            raise _unsupported(module, "attends more than once per layer")
        if self.layers and key.dtype != self.dtype:
            raise _unsupported(module, f"mixes {key.dtype} and {self.dtype}")
        self.dtype = key.dtype
        spec = AttentionSpec(
            scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
            sliding_window=self._window_of(module, attention_mask),
            soft_cap=None if softcap is None else float(softcap),
        )
        self.layer_of[module] = len(self.layers)
        self.layers.append(LayerSpec(query.shape[1], key.shape[1], key.shape[3], spec))
        attended = attend_one(query[0].transpose(0, 1), key[0], value[0], spec)
        return attended.to(query.dtype).unsqueeze(0), None

    def check_complete(self, num_hidden_layers: int | None) -> None:
        """Raise `ImportFailure` if any layer mixes tokens by something else than this attention."""
        if not self.layers:
            raise attention_not_found()
        if num_hidden_layers is not None and num_hidden_layers != len(self.layers):
            raise ImportFailure(
                "attention_not_found",
                f"Only {len(self.layers)} of the model's {num_hidden_layers} layers are attention; "
                "recurrent, linear or shared layers cannot be served yet.",
            )

    def _window_of(self, module: nn.Module, attention_mask: Tensor | None) -> int | None:
        for mask, window in self._masks:
            if (
                isinstance(attention_mask, Tensor)
                and attention_mask.data_ptr() == mask.data_ptr()
                and attention_mask.shape == mask.shape
            ):
                return window
        raise _unsupported(module, "builds an attention mask of its own, or none")


def attention_not_found() -> ImportFailure:
    return ImportFailure(
        "attention_not_found",
        "None of the model's layers uses transformers' attention interface, so its keys and "
        "values cannot be cached. This kind of model cannot be served yet.",
    )


def classify_mask(
    mask_function: Callable[..., Any], max_context_tokens: int, device: torch.device
) -> int | None:
    """The sliding window of a transformers mask function, or None if it is plainly causal.

    The function is evaluated at a few queries, near and far, over all keys up to the context's
    end. Raises `ImportFailure` if what it shows is neither.
    """
    last = max_context_tokens - 1
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    key_at = torch.arange(max_context_tokens, device=device).view(1, 1, 1, -1)
    query_at = torch.tensor(sorted({0, last // 7, last // 3, last // 2, last}), device=device)
    query_at = query_at.view(1, 1, -1, 1)
    try:
        visible = torch.as_tensor(mask_function(zero, zero, query_at, key_at))
        visible = visible.expand(1, 1, query_at.numel(), max_context_tokens).bool()
    # A mask may index tensors made for the probe's tokens alone, or not broadcast.
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ImportFailure(
            "mask_unsupported",
            f"An attention mask of the model cannot be evaluated ({error}); it depends on more "
            "than positions. This kind of model cannot be served yet.",
        ) from error
    window = int(visible[0, 0, -1].sum())
    expected = (key_at <= query_at) & (key_at > query_at - window)
    if not torch.equal(visible, expected):
        raise ImportFailure(
            "mask_unsupported",
            "An attention mask of the model is neither causal nor a sliding window. This kind of "
            "model cannot be served yet.",
        )
    return None if window == max_context_tokens else window


def _refuse_arguments(module: nn.Module, arguments: dict[str, Any]) -> None:
    unknown = sorted(
        name
        for name, value in arguments.items()
        if value is not None and value is not False and name not in NEUTRAL_ARGUMENTS
    )
    if unknown:
        raise _unsupported(module, f"uses {', '.join(unknown)}")


def _unsupported(module: nn.Module, reason: str) -> ImportFailure:
    return ImportFailure(
        "attention_unsupported",
        f"{type(module).__name__} {reason}, which is not supported yet, so this model would not "
        "compute what it was trained to.",
    )
