"""The fused form of whole decoders: equal to the graph it came from, and really fused."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from runtime.compiling.fused import FusionFailure, fuse_decoder
from runtime.compiling.fusions import linears, norms, optimise, rotary
from runtime.compiling.fusions.evaluated import EvaluatedGraph
from runtime.compiling.paging import page
from runtime.execution import ops
from tests.runtime.compiling.fusions.graphs import exported, logits_of, paged_graph

# What two layers and the output hold: (linear layers, norms, residuals, rotary, gates).
SITES = {
    "llama": (15, 5, 4, 4, 2),
    "qwen2": (15, 5, 4, 4, 2),
    "qwen3": (15, 9, 4, 4, 2),
    "gemma2": (15, 9, 4, 4, 2),
    "gemma3_text": (15, 13, 4, 4, 2),
    "gpt2": (9, 5, 5, 0, 0),
    "phi": (13, 3, 2, 4, 0),
    "phi3": (9, 5, 4, 4, 2),
    "gpt_neox": (9, 5, 2, 4, 0),
    "cohere": (15, 3, 2, 4, 2),
    "gptj": (13, 3, 2, 4, 0),
}
NAMES = ("linear layers", "norms", "residuals", "rotary embeddings", "gates")


@pytest.mark.parametrize("family", SITES)
def test_every_family_is_fused_and_gives_what_its_graph_gives(family: str) -> None:
    expected = logits_of(paged_graph(family))
    paged = paged_graph(family)
    _, counts = optimise(paged.module, paged.vocab_size, paged.max_context_tokens)
    assert tuple(counts[name] for name in NAMES) == SITES[family]
    assert counts["nodes after"] < 0.6 * counts["nodes before"]
    error = (logits_of(paged) - expected).abs().max()
    assert error <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_in_bfloat16_it_is_no_further_from_the_truth(family: str) -> None:
    truth = logits_of(paged_graph(family))
    original = (logits_of(paged_graph(family, torch.bfloat16)) - truth).abs()
    fused = (logits_of(fuse_decoder(paged_graph(family, torch.bfloat16))) - truth).abs()
    assert fused.mean() <= 1.5 * original.mean()
    assert fused.max() <= 4 * original.max()


def test_float64_is_served_by_plain_torch() -> None:
    expected = logits_of(paged_graph("llama", torch.float64))
    found = logits_of(fuse_decoder(paged_graph("llama", torch.float64)))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_packed_weights_are_let_go_and_a_tied_one_is_kept_once() -> None:
    program = exported.__wrapped__("gemma3_text")  # its embedding is tied, and nobody else has it
    paged = page(program, max_context_tokens=200)
    del program
    tensors = {name: weakref.ref(each) for name, each in paged.module.named_parameters()}
    matrices = {name: each().numel() for name, each in tensors.items() if each().dim() == 2}
    fused = fuse_decoder(paged)
    gc.collect()
    kept = [name for name in matrices if tensors[name]() is not None]
    assert kept == []
    num_elements = sum(each.numel() for each in fused.module.buffers())
    assert num_elements < 1.5 * sum(matrices.values())


def test_notes_say_what_was_fused() -> None:
    assert fuse_decoder(paged_graph("llama")).notes[-1] == (
        "Fused: 15 linear layers, 5 norms, 4 residuals, 4 rotary embeddings, 2 gates."
    )


class Attention(nn.Module):
    """Scores, mask and softmax spelled out; one product for query, key and value."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.inputs = nn.Linear(size, 3 * size)
        self.outputs = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, num_tokens, size = x.shape
        heads = self.inputs(x).view(batch, num_tokens, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        scores = query @ key.transpose(-1, -2) / (size // self.num_heads) ** 0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.outputs((weights @ value).transpose(1, 2).reshape(batch, num_tokens, size))


class Block(nn.Module):
    """RMSNorm spelled out with a square root, a gate by sigmoid, both halves of one product."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention = Attention(size, 4)
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(size))
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * self.weight
        gate, up = self.up(normed).chunk(2, dim=-1)
        return x + self.down(gate * torch.sigmoid(gate) * up)


class HandWritten(nn.Module):
    """A decoder as someone writes it without a library."""

    def __init__(self, num_ids: int = 96, size: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_ids, size)
        self.places = nn.Embedding(64, size)
        self.blocks = nn.ModuleList([Block(size), Block(size)])
        self.head = nn.Linear(size, num_ids, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_hand_written_decoder() -> None:
    torch.manual_seed(0)
    model = HandWritten().eval().requires_grad_(False)
    example = torch.randint(0, 96, (1, 9))
    shapes = {"input_ids": {1: torch.export.Dim("tokens", max=64)}}
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    expected = logits_of(page(program))
    paged = page(program)
    _, counts = optimise(paged.module, paged.vocab_size, paged.max_context_tokens)
    assert tuple(counts[name] for name in NAMES) == (9, 4, 4, 0, 2)
    assert (logits_of(paged) - expected).abs().max() <= 1e-5 * expected.abs().max()


def interleaved(x: Tensor, cosines: Tensor, sines: Tensor, is_interleaved: bool) -> Tensor:
    return ops.rotate(x, cosines, sines, not is_interleaved)


def uncentered(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    normed, summed = ops.rms_norm(x, *args)
    return normed * 1.01, summed


@pytest.mark.parametrize(
    ("module", "wrong", "name"),
    [
        (rotary, {"rotate": interleaved}, "rotary embeddings"),
        (norms, {"rms_norm": uncentered}, "norms"),
    ],
)
def test_a_wrong_operation_is_not_put_in(
    module: object, wrong: dict[str, object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WrongOps:
        rotate, rms_norm, layer_norm = ops.rotate, ops.rms_norm, ops.layer_norm

    for operation, function in wrong.items():
        setattr(WrongOps, operation, staticmethod(function))
    monkeypatch.setattr(module, "ops", WrongOps)
    paged = paged_graph("llama")
    _, counts = optimise(paged.module, paged.vocab_size, paged.max_context_tokens)
    assert counts[name] == 0
    assert counts["linear layers"] == 15


def test_a_wrong_fusion_that_no_site_noticed_fails_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EvaluatedGraph, "is_same", lambda *_: True)
    monkeypatch.setattr(linears, "_ordered", lambda group: group[::-1])
    monkeypatch.setattr(
        ops.PackedLinear,
        "joined",
        classmethod(lambda cls, weights, biases: cls(torch.cat(weights[::-1]))),
    )
    with pytest.raises(FusionFailure, match="logits are off"):
        fuse_decoder(paged_graph("llama"))


def test_a_fault_after_fusing_shows_in_the_replay() -> None:
    expected = logits_of(paged_graph("llama"))
    fused = fuse_decoder(paged_graph("llama"))
    tables = [each for name, each in fused.module.named_buffers() if name.startswith("constant_")]
    tables[0][25:] = tables[0][24:-1].clone()  # every angle from position 25 on is one too small
    found = logits_of(fused)
    assert (found - expected).abs().max() > 1e-3 * (expected.max() - expected.min())


def test_a_program_stays_usable_after_its_graph_was_fused() -> None:
    fuse_decoder(paged_graph("llama"))
    assert all(each.numel() for each in exported("llama").state_dict.values())
    logits_of(paged_graph("llama"))
