"""A Hugging Face directory as the original of a proof: transformers' own model, attention eager."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.importing.huggingface import load_original
from runtime.importing.huggingface_loading import num_ids_of


class HuggingFaceOriginal:
    """An `OriginalModel`. Generates with transformers' own cache where the model has one."""

    min_tokens = 1
    recomputes = False

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)

    @property
    def num_parameters(self) -> int:
        return self._sizes[0]

    @property
    def vocab_size(self) -> int:
        return self._sizes[1]

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Of a module that is memory-mapped, and given up again."""
        module = load_original(self._directory)
        num_parameters = sum(parameter.numel() for parameter in module.parameters())
        return num_parameters, module.get_input_embeddings().get_parameter("weight").shape[0]

    def load(self, dtype: torch.dtype) -> "LoadedHuggingFace":
        """float64 is widened from float32, so that tables made in float32 stay what they are."""
        if dtype == torch.float64:
            return LoadedHuggingFace(load_original(self._directory, torch.float32).double())
        return LoadedHuggingFace(load_original(self._directory, dtype))


class LoadedHuggingFace:
    """A `LoadedOriginal`."""

    def __init__(self, module: PreTrainedModel) -> None:
        self._module = module
        self._num_ids = num_ids_of(module)  # a padded vocabulary has more

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """`[tokens, vocab]`, computed without a cache."""
        return self._module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    @torch.inference_mode()
    def continue_greedily(self, tokens: list[int], num_new: int) -> list[int]:
        """Its most likely token each time, as transformers generates it."""
        generated: list[int] = []
        past, new = None, tokens
        while len(generated) < num_new:
            output = self._module(
                input_ids=torch.tensor([new]), past_key_values=past, use_cache=True
            )
            past = getattr(output, "past_key_values", None)
            generated.append(int(output.logits[0, -1, : self._num_ids].argmax()))
            new = tokens + generated if past is None else generated[-1:]
        return generated
