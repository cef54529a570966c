"""Exports transformers' causal language models as graphs `(input_ids) -> logits`.

For models whose attention is their own, which cannot be replaced through transformers'
registry, and as the input of graph optimisations. Does not load models.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from runtime.compiling.paging.normal import functional
from runtime.importing.program import ImportFailure

EXAMPLE_TOKENS = 7  # any length that is no size of the model's own


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def export_huggingface(module: PreTrainedModel) -> ExportedProgram:
    """A functional program with a batch of 1 and any length. `module` must attend eagerly or by
    `sdpa`. Raises `ImportFailure` when torch cannot trace it."""
    device = next(module.parameters()).device
    num_ids = len(module.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
    example = torch.arange(EXAMPLE_TOKENS, device=device)[None] % num_ids
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                _Logits(module).eval(),
                (example,),
                dynamic_shapes={"input_ids": {1: Dim.DYNAMIC}},
                strict=False,
            )
            return functional(program)
    # The model's own code runs here, on symbols instead of numbers.
    except Exception as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ImportFailure(
            "export_failed",
            f"{type(module).__name__} cannot be exported as a graph: {first[0][:300].rstrip('.')}.",
        ) from error
