"""Loads a Hugging Face directory as a paged decoder, through transformers' attention registry.

Owns the load and its refusals. Every attention layer is found by one probe forward, in which
masks are classified by evaluating them; what is not understood is refused, never guessed.
Whether the paged form equals the original is `runtime.proving`'s question.
"""

import inspect
import os
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when transformers is imported

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
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
from runtime.importing.huggingface_probe import Probe, attention_not_found
from runtime.importing.program import ImportFailure
from runtime.protocol import DecoderInfo

PAGED = "tapeout_paged"  # serves: no mask function is registered, so transformers builds no mask
PROBE = "tapeout_probe"  # loads: records every layer and classifies its mask
PROBE_TOKENS = 8
DEFAULT_MAX_CONTEXT_TOKENS = 32768  # where the configuration sets no limit


@dataclass(frozen=True)
class _PagedPass:
    """One forward of one model: where its layers send their queries, keys and values."""

    layer_of: dict[nn.Module, int]
    attend: Attend


# Attention functions are registered once per process, but models and threads are many: what a
# call belongs to travels in the context, not in the registry.
_paged_pass: ContextVar[_PagedPass] = ContextVar("paged_pass")
_probe: ContextVar[Probe] = ContextVar("probe")


def _paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature; tensors are `[1, heads, tokens, head_dim]`."""
    current = _paged_pass.get()
    layer = current.layer_of[module]
    attended = current.attend(
        layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    )
    return attended.unsqueeze(0), None


def _probe_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _probe.get().attend(*args, **kwargs)


def _probe_mask(**kwargs: Any) -> Tensor:
    return _probe.get().mask(**kwargs)


ALL_ATTENTION_FUNCTIONS.register(PAGED, _paged_attention)
ALL_ATTENTION_FUNCTIONS.register(PROBE, _probe_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, _probe_mask)


class HuggingFaceDecoder:
    """A `PagedModel` around a transformers model whose attention goes to the caller."""

    def __init__(
        self,
        module: PreTrainedModel,
        layers: list[LayerSpec],
        layer_of: dict[nn.Module, int],
        info: DecoderInfo,
        eos_ids: tuple[int, ...],
        notes: list[str],
    ) -> None:
        self.module = module
        self.layers = layers
        self.info = info
        self.eos_token_ids = eos_ids
        self.notes = notes
        self._layer_of = layer_of
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
        token = _paged_pass.set(_PagedPass(self._layer_of, attend))
        try:
            output = self.module(
                input_ids=token_ids[None], position_ids=positions[None], use_cache=False, **options
            )
        finally:
            _paged_pass.reset(token)
        logits = output.logits[0]
        return logits if self._picks_rows else logits[sample_indices]


def load_decoder(
    directory: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> HuggingFaceDecoder:
    """Load a decoder from safetensors, memory-mapped, in `dtype` or else the dtype it was saved in.

    Raises `ImportFailure` with what to do about it when the directory cannot be served.
    """
    directory = Path(directory)
    config_json = check_directory(directory)
    notes: list[str] = []
    module = _load_module(directory, dtype, notes)
    module.to(torch.device(device)).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    config = module.config.get_text_config(decoder=True)
    max_context_tokens = _max_context_tokens(config, notes)
    probe = _run_probe(module, max_context_tokens)
    probe.check_complete(getattr(config, "num_hidden_layers", None))
    module.set_attn_implementation(PAGED)
    kv_elements = sum(layer.kv_shape.elements_per_token for layer in probe.layers)
    info = DecoderInfo(
        architecture=type(module).__name__,
        vocab_size=_vocab_size(module),
        max_context_tokens=max_context_tokens,
        num_layers=len(probe.layers),
        kv_bytes_per_token=kv_elements * probe.dtype.itemsize,
        dtype=str(probe.dtype).removeprefix("torch."),
        has_tokenizer=(directory / "tokenizer.json").is_file(),
        has_chat_template=has_chat_template(directory),
    )
    eos_ids = eos_token_ids(config_json, read_json(directory / "generation_config.json"))
    return HuggingFaceDecoder(module, probe.layers, probe.layer_of, info, eos_ids, notes)


def load_original(directory: Path | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The untouched transformers model, attention eager, on the CPU: what a proof compares to."""
    check_directory(Path(directory))
    module = _from_pretrained(Path(directory), "eager", dtype)[0]
    if module._can_set_experts_implementation():
        module.set_experts_implementation("eager")
    return module.eval().requires_grad_(False)


def _load_module(directory: Path, dtype: torch.dtype | None, notes: list[str]) -> PreTrainedModel:
    module, loading = _from_pretrained(directory, PROBE, dtype)
    missing = sorted(loading["missing_keys"])
    if missing or loading["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in loading["mismatched_keys"])
        raise ImportFailure(
            "incomplete_weights",
            f"{len(wrong)} weights of {type(module).__name__} are missing or have the wrong shape "
            f"({', '.join(wrong[:3])}). Save the model again with "
            "model.save_pretrained(directory) and upload the whole directory.",
        )
    unused = sorted(loading["unexpected_keys"])
    if unused:
        notes.append(f"{len(unused)} weights in the upload are not used ({', '.join(unused[:3])}).")
    return module


def _from_pretrained(
    directory: Path, attention: str, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    transformers.logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype or "auto",
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except KeyError as error:
        if error.args != (attention,):
            raise _load_failure(error) from error
        raise attention_not_found() from error  # an old-style class with its own attention table
    # transformers raises whatever a malformed configuration makes it stumble over.
    except Exception as error:
        raise _load_failure(error) from error
    return loaded


def _load_failure(error: Exception) -> ImportFailure:
    return ImportFailure(
        "load_failed",
        f"transformers {transformers.__version__} cannot load this model: {_first_line(error)}. "
        "Check that AutoModelForCausalLM.from_pretrained(directory) works with that version.",
    )


def _run_probe(module: PreTrainedModel, max_context_tokens: int) -> Probe:
    probe = Probe(max_context_tokens)
    device = next(module.parameters()).device
    positions = torch.arange(min(PROBE_TOKENS, max_context_tokens), device=device)[None]
    token = _probe.set(probe)
    try:
        with torch.inference_mode():
            module(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
    except ImportFailure:
        raise
    # The model's own code runs here, on a configuration its owner wrote.
    except Exception as error:
        raise ImportFailure(
            "forward_failed",
            f"{type(module).__name__} does not run on packed tokens without a cache: "
            f"{_first_line(error)}. This kind of model cannot be served yet.",
        ) from error
    finally:
        _probe.reset(token)
    return probe


def _vocab_size(module: PreTrainedModel) -> int:
    head = module.get_output_embeddings()
    if head is None:
        raise ImportFailure(
            "not_a_decoder", f"{type(module).__name__} has no output layer over its vocabulary."
        )
    return int(head.weight.shape[0])


def _max_context_tokens(config: PreTrainedConfig, notes: list[str]) -> int:
    """The longest context whose positions are exact.

    Rotary embeddings of types `dynamic` and `longrope` change every position's angle once a
    sequence outgrows the trained length. Cached keys would then be wrong, and so would the shorter
    neighbours in a batch, so the context ends where that starts.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        limit = DEFAULT_MAX_CONTEXT_TOKENS
        notes.append(f"The configuration sets no context limit; {limit} tokens are served.")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = parameters.get("rope_type")
        trained = parameters.get("original_max_position_embeddings")
        trained = trained or getattr(config, "original_max_position_embeddings", None) or limit
        if kind in ("dynamic", "longrope"):
            limit = min(limit, int(trained))
            notes.append(
                f"Rotary scaling of type {kind} is length-dependent beyond {trained} tokens; the "
                f"context is limited to {limit} tokens, where cached keys are exact."
            )
    return limit


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")
