"""Serves a Hugging Face decoder whole, by transformers' own forward, where it cannot be paged.

Every token costs a forward over its whole sequence. For recurrent states, convolutions, masks that
look ahead and whatever else keys and values in blocks do not hold.
"""

import inspect
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
    max_context_tokens_of,
    num_ids_of,
    vocab_size_of,
)
from runtime.importing.program import ImportFailure
from runtime.protocol import DecoderInfo

TRIAL_TOKENS = (5, 5)  # sequences, tokens


class UncachedHuggingFace:
    """A `WholeModel`: sequences in, the logits after their last tokens out; nothing is kept."""

    def __init__(
        self, module: PreTrainedModel, info: DecoderInfo, eos_ids: tuple[int, ...], notes: list[str]
    ) -> None:
        self.module = module
        self.info = info
        self.eos_token_ids = eos_ids
        self.notes = notes
        parameters = inspect.signature(module.forward).parameters
        self._options: dict[str, object] = {}
        if "use_cache" in parameters:
            self._options["use_cache"] = False
        if "logits_to_keep" in parameters:
            self._options["logits_to_keep"] = 1

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.info.dtype)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """float32 `[sequences, vocab]` after the last of `token_ids` `[sequences, tokens]`, which
        are all real: nothing is padded."""
        output = self.module(input_ids=token_ids, **self._options)
        return output.logits[:, -1].float()


def load_uncached(
    directory: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    unpaged_reason: str = "",
    is_checked: bool = False,
) -> UncachedHuggingFace:
    """Load a decoder in `dtype`, or else the dtype it was saved in, with attention of its own.

    `unpaged_reason` is why it was not paged, for its owner to read. Raises `ImportFailure`, also
    for a model whose forward does not run in plain torch on this machine.
    """
    directory = Path(directory)
    config_json = check_directory(directory)
    if not is_checked:
        check_sizes(directory, config_json)
    notes: list[str] = []
    module = load_module(directory, "eager", dtype, notes)
    if module._can_set_experts_implementation():
        module.set_experts_implementation("eager")
    module.to(torch.device(device)).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    config = module.config.get_text_config(decoder=True)
    num_layers = getattr(config, "num_hidden_layers", None)
    info = DecoderInfo(
        architecture=type(module).__name__,
        vocab_size=vocab_size_of(module),
        max_context_tokens=max_context_tokens_of(config, notes),
        num_layers=num_layers if isinstance(num_layers, int) else 0,
        kv_bytes_per_token=0,
        dtype=str(module.dtype).removeprefix("torch."),
        has_tokenizer=(directory / "tokenizer.json").is_file(),
        has_chat_template=has_chat_template(directory),
        is_paged=False,
        unpaged_reason=unpaged_reason,
        num_embedded_ids=num_ids_of(module),
    )
    eos_ids = eos_token_ids(config_json, read_json(directory / "generation_config.json"))
    model = UncachedHuggingFace(module, info, eos_ids, notes)
    _try_forward(model)
    return model


def _try_forward(model: UncachedHuggingFace) -> None:
    """Raises `ImportFailure` if the model's own code does not run here."""
    num_sequences, num_tokens = TRIAL_TOKENS
    num_tokens = min(num_tokens, model.info.max_context_tokens)
    tokens = torch.arange(num_sequences * num_tokens).view(num_sequences, num_tokens)
    tokens = (tokens % model.info.num_ids).to(model.device)
    try:
        logits = model.logits(tokens)
    except Exception as error:  # the model's own code, on a configuration its owner wrote
        raise ImportFailure(
            "original_fails",
            f"{model.info.architecture} does not run here: {first_line(error)}. It may need a "
            "package or a device that this machine does not have.",
        ) from error
    if logits.shape != (num_sequences, model.info.vocab_size):
        raise ImportFailure(
            "not_a_decoder",
            f"{model.info.architecture} gives outputs of shape {tuple(logits.shape)} for "
            f"{num_sequences} sequences, not one row over its vocabulary for each.",
        )
