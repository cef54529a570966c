"""An exported decoder graph as the original of a proof: run as it was saved, without a cache."""

import torch
from torch import Tensor

from runtime.compiling.paging.cast import cast
from runtime.compiling.paging.signature import embedding_rows, read_decoder_signature
from runtime.importing.exported import ExportedProgramModel
from runtime.importing.signature import axis_bounds
from runtime.importing.widening import widen


class ExportedOriginal:
    """An `OriginalModel` around a graph `(input_ids) -> logits`, whose batch may be fixed at 1.

    A graph of one fixed length is given other tokens after those asked about: what they are must
    not matter, or nothing could be generated with it.
    """

    recomputes = True

    def __init__(self, model: ExportedProgramModel) -> None:
        """Raises `NotPageable` for a graph that is no decoder's."""
        signature = read_decoder_signature(model.program)
        self._model = model
        outputs = model.signature.outputs[: signature.output_at]
        self._logits_at = sum(leaf.spec is not None for leaf in outputs)
        length = signature.length
        self._fixed_tokens = int(length) if length.is_Integer else None  # type: ignore[arg-type]
        self.min_tokens = (
            axis_bounds(length, model.program.range_constraints)[0]
            if self._fixed_tokens is None
            else 1
        )
        self.num_parameters = model.num_parameters
        rows = embedding_rows(model.program, signature)
        self.vocab_size = min([*rows, signature.vocab_size])

    def load(self, dtype: torch.dtype) -> "LoadedExported":
        """The graph in `dtype`: in float64 throughout, else where it computes in its own."""
        program = self._model.program
        if dtype == torch.float64:
            graph: torch.nn.Module = widen(program)
        else:
            graph = cast(program, dtype).module(check_guards=False)
        return LoadedExported(
            self._model, graph, self._logits_at, self._fixed_tokens, self.vocab_size
        )


class LoadedExported:
    """A `LoadedOriginal`."""

    def __init__(
        self,
        model: ExportedProgramModel,
        graph: torch.nn.Module,
        logits_at: int,
        fixed_tokens: int | None,
        num_ids: int,
    ) -> None:
        self._model = model
        self._graph = graph
        self._logits_at = logits_at
        self._fixed_tokens = fixed_tokens
        self._num_ids = num_ids  # a padded vocabulary has more, which cannot be looked up

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """`[tokens, vocab]`."""
        num_more = (self._fixed_tokens or len(tokens)) - len(tokens)
        given = tokens + [(7 * at + 1) % 5 for at in range(num_more)]
        outputs = self._model.call(self._graph, [torch.tensor([given])])
        return outputs[self._logits_at][0, : len(tokens)]

    def continue_greedily(self, tokens: list[int], num_new: int) -> list[int]:
        """Its most likely token each time, from the whole sequence."""
        generated: list[int] = []
        while len(generated) < num_new:
            logits = self.logits(tokens + generated)[-1]
            generated.append(int(logits[: self._num_ids].argmax()))
        return generated
