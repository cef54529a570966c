"""Decoders that are graphs: paged ones for a `Runner`, and whole ones that cache nothing.

Owns how a graph is called. How a graph is made paged is `paging/`'s; where keys and values go,
`runtime.execution`'s.
"""

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from runtime.compiling.paging import NotPageable, PagedGraph, attending
from runtime.compiling.paging.signature import embedding_rows, read_decoder_signature
from runtime.execution.attention import LayerSpec
from runtime.execution.runner import Attend
from runtime.importing.exported import ExportedProgramModel
from runtime.protocol import DecoderInfo

CHECK_TOKENS = 16  # length at which a graph of dynamic length is checked for looking ahead


class GraphDecoder:
    """A `PagedModel` around a paged graph; implements `importing.program.Decoder`."""

    def __init__(
        self, paged: PagedGraph, info: DecoderInfo, eos_ids: tuple[int, ...], notes: list[str]
    ) -> None:
        self.module: nn.Module = paged.module
        self.layers: list[LayerSpec] = paged.layers
        self.info = info
        self.eos_token_ids = eos_ids
        self.notes = [*notes, *paged.notes]
        self.dtype = paged.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie, and so the pool must."""
        return device_of(self.module)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, sample_indices: Tensor, attend: Attend
    ) -> Tensor:
        """Logits `[sampled, vocab]` in the model's dtype; see `PagedModel.forward`."""
        with attending(attend):
            return self.module(token_ids, positions, sample_indices)


def paged_info(
    paged: PagedGraph, architecture: str, *, has_tokenizer: bool, has_chat_template: bool
) -> DecoderInfo:
    """What the gateway must know of a paged graph."""
    elements = sum(layer.kv_shape.elements_per_token for layer in paged.layers)
    return DecoderInfo(
        architecture=architecture,
        vocab_size=paged.vocab_size,
        max_context_tokens=paged.max_context_tokens,
        num_layers=len(paged.layers),
        kv_bytes_per_token=elements * paged.dtype.itemsize,
        dtype=str(paged.dtype).removeprefix("torch."),
        has_tokenizer=has_tokenizer,
        has_chat_template=has_chat_template,
    )


class UncachedGraph:
    """A decoder graph that runs whole sequences and keeps nothing; a `WholeModel`.

    A graph of fixed length runs sequences padded at their end, which is only right, and only
    allowed, when later tokens cannot change earlier logits.
    """

    def __init__(
        self,
        model: ExportedProgramModel,
        info: DecoderInfo,
        eos_ids: tuple[int, ...],
        notes: list[str],
    ) -> None:
        self.info = info
        self.eos_token_ids = eos_ids
        self.notes = notes
        self._model = model
        signature = read_decoder_signature(model.program)
        self._signature = signature
        self._output_at = sum(
            1 for leaf in model.signature.outputs[: signature.output_at] if leaf.spec
        )
        self.module: nn.Module = model.program.module(check_guards=False)
        self._batch = int(signature.batch) if signature.batch.is_Integer else None  # type: ignore[arg-type]
        self._length = int(signature.length) if signature.length.is_Integer else None  # type: ignore[arg-type]
        if self._length is not None and not is_causal(model):
            raise NotPageable(
                f"The sequence length is fixed at {self._length} and later tokens change earlier "
                "logits, so shorter sequences cannot be run; export with a dynamic second axis."
            )

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return device_of(self.module)

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """Logits `[sequences, vocab]` of the last token of each row of `token_ids`, which are
        int64 `[sequences, tokens]` without padding."""
        last = token_ids.shape[1] - 1
        if self._length is not None:
            assert last < self._length, "the context is the graph's own length"
            token_ids = nn.functional.pad(token_ids, (0, self._length - token_ids.shape[1]))
        if self._batch is None:
            return self._run(token_ids)[:, last]
        num_sequences = len(token_ids)
        missing = -num_sequences % self._batch
        filled = torch.cat([token_ids, token_ids[-1:].expand(missing, -1)])
        parts = [self._run(part)[:, last] for part in filled.split(self._batch)]
        return torch.cat(parts)[:num_sequences]

    def _run(self, token_ids: Tensor) -> Tensor:
        return self._model.call(self.module, [token_ids])[self._output_at]


def whole_limit(program: ExportedProgram, default: int) -> int:
    """The longest sequence a graph takes, or `default` where nothing limits it."""
    signature = read_decoder_signature(program)
    return signature.max_tokens or default


@torch.inference_mode()
def is_causal(model: ExportedProgramModel) -> bool:
    """Whether later tokens leave earlier logits as they are, seen by changing them at several
    places of a random sequence."""
    signature = read_decoder_signature(model.program)
    length = int(signature.length) if signature.length.is_Integer else CHECK_TOKENS  # type: ignore[arg-type]
    length = min(length, signature.max_tokens or length)
    batch = int(signature.batch) if signature.batch.is_Integer else 1  # type: ignore[arg-type]
    output_at = sum(1 for leaf in model.signature.outputs[: signature.output_at] if leaf.spec)
    module = model.program.module(check_guards=False)
    generator = torch.Generator().manual_seed(0)
    num_ids = min([signature.vocab_size, *embedding_rows(model.program, signature)])
    ids = torch.randint(0, num_ids, (batch, length), generator=generator)
    other = torch.randint(0, num_ids, (batch, length), generator=generator)
    before = model.call(module, [ids])[output_at].double()
    scale = float(before.abs().max())
    tolerance = 1e-4 if before.dtype.itemsize >= 4 else 0.02
    for cut in sorted({1, length // 2, length - 1}):
        changed = torch.cat([ids[:, :cut], other[:, cut:]], 1)
        after = model.call(module, [changed])[output_at].double()
        if ((after - before)[:, :cut].abs() > tolerance * scale).any():
            return False
    return True


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
