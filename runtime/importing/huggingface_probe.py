"""Finds out how a transformers model attends, by watching one forward pass.

Owns what is understood of an attention layer: shapes, scale, window, cap, sinks. Anything else
that a layer asks for is refused by name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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
# transformers': (batch, head, query position, key position) -> visible, on tensors that broadcast.
MaskFunction = Callable[[Any, Any, Any, Any], Any]
MASK_COLUMNS = 1 << 18  # keys that a mask is evaluated over at once


class Probe:
    """Stands in for attention and mask building during one forward, and keeps what it saw.

    A module that attends several times in a forward (two softmaxes of one layer, a layer that is
    looped over) has several entries in `layers`, in the order of its calls.
    """

    def __init__(self, max_context_tokens: int) -> None:
        self.layers: list[LayerSpec] = []
        self.layers_of: dict[nn.Module, list[int]] = {}
        self.dtype = torch.float32
        self._max_context_tokens = max_context_tokens
        self._masks: list[tuple[Tensor, MaskFunction]] = []  # (mask handed out, what made it)
        self._windows: dict[int, int | None] = {}  # of masks that were used, by their place

    def mask(self, *, mask_function: MaskFunction, **kwargs: Any) -> Tensor:
        """Keep a mask function, to be classified if a layer uses it; the dense mask returned only
        identifies it to `attend`."""
        shape = (kwargs["batch_size"], 1, kwargs["q_length"], kwargs["kv_length"])
        mask = torch.ones(shape, dtype=torch.bool, device=kwargs["device"])
        self._masks.append((mask, mask_function))
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
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Record the layer, then attend as it will be. Tensors are `[1, heads, tokens, width]`."""
        _refuse_arguments(module, kwargs)
        if dropout or is_causal is False:
            raise _unsupported(module, "attends with dropout or to later tokens")
        if self.layers and key.dtype != self.dtype:
            raise _unsupported(module, f"mixes {key.dtype} and {self.dtype}")
        self.dtype = key.dtype
        spec = AttentionSpec(
            scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
            sliding_window=self._window_of(module, attention_mask, is_causal),
            soft_cap=float(softcap) if softcap else None,
            sinks=_sinks(module, s_aux, query.shape[1]),
        )
        layer = _layer_spec(module, query, key, value, spec)
        self.layers_of.setdefault(module, []).append(len(self.layers))
        self.layers.append(layer)

        def attend(rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return attend_one(rows, keys.transpose(0, 1), values.transpose(0, 1), spec)

        attended = attend_padded(attend, layer.head_dim, query, key, value)
        return attended.to(query.dtype), None

    def _window_of(
        self, module: nn.Module, attention_mask: Tensor | None, is_causal: bool | None
    ) -> int | None:
        if attention_mask is None and is_causal:
            return None
        for i, (mask, function) in enumerate(self._masks):
            if (
                isinstance(attention_mask, Tensor)
                and attention_mask.data_ptr() == mask.data_ptr()
                and attention_mask.shape == mask.shape
            ):
                if i not in self._windows:
                    self._windows[i] = classify_mask(
                        function, self._max_context_tokens, mask.device
                    )
                return self._windows[i]
        raise _unsupported(module, "builds an attention mask of its own, or none")


def attend_padded(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    head_dim: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """transformers' `[1, heads, tokens, width]` to `[tokens, heads, head_dim]`, which `attend`
    takes, and back to `[1, tokens, heads, value width]`.

    Where keys and values differ in width, zeros fill the narrower: they add nothing to a score,
    and what they become in the output is cut off.
    """
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if all(row.shape[-1] == head_dim for row in rows):
        return attend(*rows).contiguous().unsqueeze(0)
    padded = [functional.pad(row, (0, head_dim - row.shape[-1])) for row in rows]
    return attend(*padded)[..., : value.shape[-1]].contiguous().unsqueeze(0)


def attention_not_found() -> ImportFailure:
    return ImportFailure(
        "attention_not_found",
        "None of the model's layers uses transformers' attention interface, through which keys "
        "and values would be cached.",
    )


def classify_mask(
    mask_function: MaskFunction, max_context_tokens: int, device: torch.device
) -> int | None:
    """The sliding window of a transformers mask function, or None if it is plainly causal.

    The function is evaluated at a few queries, near and far, over all keys up to the context's
    end. Raises `ImportFailure` if what it shows is neither.
    """
    last = max_context_tokens - 1
    near = (0, min(1, last), min(7, last), min(100, last))
    queries = sorted({*near, last // 7, last // 3, last // 2, last})
    query_at = torch.tensor(queries, device=device).view(1, 1, -1, 1)
    window = sum(
        int(_evaluate(mask_function, query_at, key_at)[0, 0, -1].sum())
        for key_at in _columns(max_context_tokens, device)
    )
    for key_at in _columns(max_context_tokens, device):
        expected = (key_at <= query_at) & (key_at > query_at - window)
        if not torch.equal(_evaluate(mask_function, query_at, key_at), expected):
            raise ImportFailure(
                "mask_unsupported",
                "An attention mask of the model is neither causal nor a sliding window.",
            )
    return None if window == max_context_tokens else window


def _columns(num_keys: int, device: torch.device) -> list[Tensor]:
    starts = range(0, num_keys, MASK_COLUMNS)
    return [
        torch.arange(at, min(at + MASK_COLUMNS, num_keys), device=device).view(1, 1, 1, -1)
        for at in starts
    ]


def _evaluate(mask_function: MaskFunction, query_at: Tensor, key_at: Tensor) -> Tensor:
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=key_at.device)
    try:
        visible = torch.as_tensor(mask_function(zero, zero, query_at, key_at))
        return visible.expand(1, 1, query_at.numel(), key_at.numel()).bool()
    # A mask may index tensors made for the probe's tokens alone, or not broadcast.
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ImportFailure(
            "mask_unsupported",
            f"An attention mask of the model cannot be evaluated ({error}); it depends on more "
            "than positions.",
        ) from error


def _layer_spec(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec
) -> LayerSpec:
    """Raises `ImportFailure` for tensors that are not one sequence attending to itself."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if query.shape[-1] != key.shape[-1] or num_kv_heads != value.shape[1]:
        raise _unsupported(module, "has keys that fit neither its queries nor its values")
    if num_heads % num_kv_heads:
        raise _unsupported(module, f"shares {num_kv_heads} key heads among {num_heads} unevenly")
    if not query.shape[0] == key.shape[0] == value.shape[0] == 1 or not (
        query.shape[2] == key.shape[2] == value.shape[2]
    ):
        raise _unsupported(module, "attends to other tokens than those of its own sequence")
    return LayerSpec(num_heads, num_kv_heads, max(key.shape[-1], value.shape[-1]), spec)


def _sinks(module: nn.Module, sinks: Tensor | None, num_heads: int) -> tuple[float, ...] | None:
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor) or sinks.numel() != num_heads:
        raise _unsupported(module, "has sinks that are not one number per head")
    return tuple(sinks.detach().flatten().tolist())


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
        f"{type(module).__name__} {reason}, which the shared attention does not compute.",
    )
