"""Loads a Hugging Face directory as a paged decoder, through transformers' attention registry.

Every attention layer is found by one probe forward, in which masks are classified by evaluating
them; what is not understood is refused, never guessed. Whether the paged form equals the original
is `runtime.proving`'s question.
"""

import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.execution.attention import LayerSpec
from runtime.execution.runner import Attend
from runtime.importing.huggingface_directory import (
    check_directory,
    eos_token_ids,
    has_chat_template,
    read_json,
)
from runtime.importing.huggingface_loading import (
    check_sizes,
    first_line,
    load_module,
    load_original,
    max_context_tokens_of,
    num_ids_of,
    vocab_size_of,
)
from runtime.importing.huggingface_probe import Probe, attend_padded, attention_not_found
from runtime.importing.locality import affordable_tokens, check_locality, differ
from runtime.importing.program import ImportFailure
from runtime.protocol import DecoderInfo

__all__ = ["PAGE_ANOTHER_WAY", "HuggingFaceDecoder", "load_decoder", "load_original"]

# Codes of failures that speak of this way of paging alone: another may serve the model.
PAGE_ANOTHER_WAY = frozenset(
    {
        "attention_not_found",
        "attention_unsupported",
        "forward_failed",
        "mask_unsupported",
        "mixes_tokens",
        "positions_unsupported",
    }
)
PAGED = "tapeout_paged"  # serves: no mask function is registered, so transformers builds no mask
PROBE = "tapeout_probe"  # loads: records every layer and classifies its mask


@dataclass(frozen=True)
class _PagedPass:
    """One forward of one model: where its layers send their queries, keys and values."""

    decoder: "HuggingFaceDecoder"
    attend: Attend
    num_calls: dict[nn.Module, int] = field(default_factory=dict)

    def next_layer(self, module: nn.Module) -> int:
        layers = self.decoder.layers_of[module]
        if len(layers) == 1:
            return layers[0]
        call = self.num_calls.get(module, 0)
        self.num_calls[module] = call + 1
        return layers[call]


# Attention functions are registered once per process, but models and threads are many: what a
# call belongs to travels in the context, not in the registry.
_paged_pass: ContextVar[_PagedPass] = ContextVar("paged_pass")
_probe: ContextVar[Probe] = ContextVar("probe")


def _paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature; tensors are `[1, heads, tokens, head_dim]`."""
    current = _paged_pass.get()
    layer = current.next_layer(module)
    head_dim = current.decoder.layers[layer].head_dim

    def attend(rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return current.attend(layer, rows, keys, values)

    return attend_padded(attend, head_dim, query, key, value), None


def _probe_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _probe.get().attend(*args, **kwargs)


def _probe_mask(**kwargs: Any) -> Tensor:
    return _probe.get().mask(**kwargs)


ALL_ATTENTION_FUNCTIONS.register(PAGED, _paged_attention)
ALL_ATTENTION_FUNCTIONS.register(PROBE, _probe_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, _probe_mask)


class HuggingFaceDecoder:
    """A `PagedModel` around a transformers model whose attention goes to the caller.

    `layers_of` a module are the layers that its attention calls are, in their order.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        layers: list[LayerSpec],
        layers_of: dict[nn.Module, list[int]],
        info: DecoderInfo,
        eos_ids: tuple[int, ...],
        notes: list[str],
    ) -> None:
        self.module = module
        self.layers = layers
        self.layers_of = layers_of
        self.info = info
        self.eos_token_ids = eos_ids
        self.notes = notes
        # Without it the output layer runs over every token; rows are then picked afterwards.
        self._picks_rows = "logits_to_keep" in inspect.signature(module.forward).parameters

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        return getattr(torch, self.info.dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights lie, and so the pool must."""
        return next(self.module.parameters()).device

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, sample_indices: Tensor, attend: Attend
    ) -> Tensor:
        """Logits `[sampled, vocab]` in the model's dtype; see `PagedModel.forward`."""
        options = {"logits_to_keep": sample_indices} if self._picks_rows else {}
        token = _paged_pass.set(_PagedPass(self, attend))
        try:
            output = self.module(
                input_ids=token_ids[None], position_ids=positions[None], use_cache=False, **options
            )
        finally:
            _paged_pass.reset(token)
        logits = output.logits[0]
        return logits if self._picks_rows else logits[sample_indices]


def load_decoder(
    directory: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    is_checked: bool = False,
) -> HuggingFaceDecoder:
    """Load a decoder from safetensors, memory-mapped, in `dtype` or else the dtype it was saved in.

    Raises `ImportFailure` with what to do about it when the directory cannot be served; those
    with a code in `PAGE_ANOTHER_WAY` only say that it cannot be so. `is_checked` leaves out what
    an earlier load of the same files found out about sizes and about mixing tokens.
    """
    directory = Path(directory)
    config_json = check_directory(directory)
    if not is_checked:
        check_sizes(directory, config_json)
    notes: list[str] = []
    module = load_module(directory, PROBE, dtype, notes)
    module.to(torch.device(device)).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    max_context_tokens = max_context_tokens_of(module.config.get_text_config(decoder=True), notes)
    num_tokens = affordable_tokens(module, max_context_tokens)
    probe = _run_probe(module, max_context_tokens, num_tokens)
    module.set_attn_implementation(PAGED)
    _never_warn_of_padding(module)
    kv_elements = sum(layer.kv_shape.elements_per_token for layer in probe.layers)
    info = DecoderInfo(
        architecture=type(module).__name__,
        vocab_size=vocab_size_of(module),
        max_context_tokens=max_context_tokens,
        num_layers=len(probe.layers),
        kv_bytes_per_token=kv_elements * probe.dtype.itemsize,
        dtype=str(probe.dtype).removeprefix("torch."),
        has_tokenizer=(directory / "tokenizer.json").is_file(),
        has_chat_template=has_chat_template(directory),
        num_embedded_ids=num_ids_of(module),
    )
    eos_ids = eos_token_ids(config_json, read_json(directory / "generation_config.json"))
    decoder = HuggingFaceDecoder(module, probe.layers, probe.layers_of, info, eos_ids, notes)
    if not is_checked:
        check_locality(decoder, info, num_tokens, decoder.device)
    return decoder


def _never_warn_of_padding(module: PreTrainedModel) -> None:
    """Packed tokens are none, and to look for padding waits for the device in every step."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            part.warn_if_padding_and_no_attention_mask = _warn_of_nothing  # type: ignore[method-assign]


def _warn_of_nothing(*_: Any) -> None:
    return None


def _run_probe(module: PreTrainedModel, max_context_tokens: int, num_tokens: int) -> Probe:
    device = next(module.parameters()).device
    positions = torch.arange(num_tokens, device=device)[None]
    probes = Probe(max_context_tokens), Probe(max_context_tokens)
    given = _probe_forward(module, probes[0], positions, position_ids=positions)
    if not probes[0].layers:
        raise attention_not_found()
    own = _probe_forward(module, probes[1], positions)
    if differ(given[0], own[0]):
        raise ImportFailure(
            "positions_unsupported",
            f"{type(module).__name__} numbers its tokens otherwise than from 0, so that those of "
            "several sequences cannot be told apart.",
        )
    return probes[0]


@torch.inference_mode()
def _probe_forward(
    module: PreTrainedModel, probe: Probe, like: Tensor, **positions: Tensor
) -> Tensor:
    # Not 0 alone: it often is the padding token, which some models leave out.
    tokens = (like + 3) % num_ids_of(module)
    token = _probe.set(probe)
    try:
        return module(input_ids=tokens, use_cache=False, **positions).logits
    except ImportFailure:
        raise
    # The model's own code runs here, on a configuration its owner wrote.
    except Exception as error:
        raise ImportFailure(
            "forward_failed",
            f"{type(module).__name__} does not run on packed tokens without a cache: "
            f"{first_line(error)}.",
        ) from error
    finally:
        _probe.reset(token)
