"""What counts as a decoder's graph, and how one is served that cannot be paged."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from runtime.building.routes import describe_graph
from runtime.compiling.graph_decoder import UncachedGraph, is_causal
from runtime.compiling.paging import NotPageable, is_decoder_graph
from runtime.importing.exported import ExportedProgramModel
from runtime.importing.signature import read_signature
from runtime.protocol import DecoderInfo
from runtime.proving.exported_original import ExportedOriginal
from tests.runtime.compiling.paging.decoders import HIDDEN, VOCAB, HandWritten, export, fused
from tests.runtime.compiling.paging.replaying import logits_of

INFO = DecoderInfo(
    architecture="graph",
    vocab_size=VOCAB,
    max_context_tokens=64,
    num_layers=0,
    kv_bytes_per_token=0,
    dtype="float32",
    has_tokenizer=False,
    has_chat_template=False,
    is_paged=False,
)


class Bidirectional(nn.Module):
    """Every token sees the mean of all."""

    def __init__(self, num_outputs: int = VOCAB) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.head = nn.Linear(HIDDEN, num_outputs)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        return self.head(hidden + hidden.mean(1, keepdim=True))


def uncached(program: ExportedProgram) -> UncachedGraph:
    return UncachedGraph(ExportedProgramModel(program, read_signature(program)), INFO, (), [])


class PaddedHead(Bidirectional):
    """Prefers an id that it cannot look up."""

    def __init__(self) -> None:
        super().__init__(num_outputs=VOCAB + 8)
        with torch.no_grad():
            self.head.bias[VOCAB + 3] = 100.0


class Hashed(Bidirectional):
    """Looks ids up in a smaller table too, and their number among the others in another."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Embedding(VOCAB // 2, HIDDEN)
        self.positions = nn.Embedding(VOCAB - 3, HIDDEN)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = (input_ids != 0).long().cumsum(1).clamp(max=VOCAB - 4)
        hidden = self.embed(input_ids.to(torch.int64).view(-1, input_ids.shape[1]))
        hidden = hidden + self.small(input_ids % (VOCAB // 2)) + self.positions(positions)
        return self.head(hidden + hidden.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("decoder", "num_ids"), [(PaddedHead(), VOCAB), (Hashed(), VOCAB), (Bidirectional(), VOCAB)]
)
def test_ids_are_those_that_have_an_embedding(decoder: nn.Module, num_ids: int) -> None:
    program = export(decoder)
    model = ExportedProgramModel(program, read_signature(program))
    info = describe_graph(model, None)
    assert info.num_ids == num_ids
    original = ExportedOriginal(model)
    assert max(original.load(torch.float32).continue_greedily([1, 2, 3], 3)) < num_ids


@pytest.mark.parametrize("output", ["tensor", "tuple", "dict"])
def test_decoders_are_told_by_their_vocabulary(output: str) -> None:
    assert is_decoder_graph(export(HandWritten(fused, output=output)))
    assert is_decoder_graph(export(HandWritten(fused), length=None))
    assert is_decoder_graph(export(HandWritten(fused), dtype=torch.int32, batch=Dim.DYNAMIC))


def test_other_programs_are_not_decoders() -> None:
    assert not is_decoder_graph(export(HandWritten(fused, num_labels=9)))  # labels per token

    class Pooled(Bidirectional):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids).mean(1)

    class Codes(Bidirectional):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids).argmax(-1)

    class Floats(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids[..., None].expand(-1, -1, VOCAB) * 1.5

    assert not is_decoder_graph(export(Pooled()))
    assert not is_decoder_graph(export(Codes()))
    assert not is_decoder_graph(export(Floats()))
    assert not is_decoder_graph(export(Floats(), dtype=torch.float32))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch": Dim.DYNAMIC},
        {"length": None},
        {"length": None, "dtype": torch.int32},
    ],
)
def test_uncached_graphs_give_the_last_tokens_logits(sizes: dict[str, Any]) -> None:
    model = HandWritten(fused, output="tuple")
    graph = uncached(export(model, **sizes))
    ids = torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = torch.cat([logits_of(model(row[None]))[:, -1] for row in ids])
    assert torch.allclose(graph.logits(ids), expected, atol=1e-5)
    assert torch.allclose(
        graph.logits(ids[:1, :1]), logits_of(model(ids[:1, :1]))[:, -1], atol=1e-5
    )


def test_a_fixed_length_needs_a_causal_graph() -> None:
    model = Bidirectional()
    ids = torch.arange(5)[None]
    assert torch.allclose(uncached(export(model)).logits(ids), model(ids)[:, -1], atol=1e-6)
    with pytest.raises(NotPageable, match="later tokens change"):
        uncached(export(model, length=None))


def test_causality_is_seen_by_trying() -> None:
    for model, expected in ((Bidirectional(), False), (HandWritten(fused), True)):
        program = export(model)
        assert is_causal(ExportedProgramModel(program, read_signature(program))) is expected
