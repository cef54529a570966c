"""What agrees on small numbers, few tokens or low ids, and differs beyond, is left as it is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.compiling.fusions import cleaning
from runtime.compiling.fusions.activations import name_activations
from runtime.compiling.fusions.cleaning import clean
from runtime.compiling.fusions.evaluated import BATCHES, EvaluatedGraph, op_name
from runtime.compiling.fusions.norms import fuse_norms
from runtime.execution import ops


class Step(nn.Module):
    """A paged graph without attention: an embedding, a function of it, and some of its rows."""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 16).to(dtype)
        self.function = function

    def forward(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        x = self.function(self.embedding(token_ids)) + positions[:, None].to(torch.bfloat16)
        return x.index_select(0, rows)


def graph_of(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32
) -> EvaluatedGraph:
    example = (torch.arange(6), torch.arange(6), torch.arange(3))
    tokens, sampled = torch.export.Dim("tokens", min=2), torch.export.Dim("sampled", min=2)
    shapes = ({0: tokens}, {0: tokens}, {0: sampled})
    module = Step(function, dtype).eval().requires_grad_(False)
    return EvaluatedGraph(torch.export.export(module, example, dynamic_shapes=shapes).module(), 64)


def sigmoid_linear(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def gelu_by_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.797885 * (x + 0.044715 * torch.pow(x, 3))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "activation",
    [
        sigmoid_linear,
        gelu_by_tanh,
        lambda x: x / (1 + torch.exp(-x)),
        lambda x: x * 0.5 * (1 + torch.erf(x / 1.41421)),
        lambda x: F.silu(x.float()).type_as(x),
    ],
)
def test_spelled_activations_are_named(
    activation: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    assert name_activations(graph_of(activation, dtype)) >= 1


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: sigmoid_linear(x.clamp(-16, 16)),
        lambda x: sigmoid_linear(x.clamp(-1e30, 1e30)),
        lambda x: F.relu(x).clamp(max=20.0),
        lambda x: torch.minimum(F.relu(x), torch.tensor(20.0)),
        lambda x: F.hardtanh(F.relu(x), 0.0, 20.0),
        lambda x: torch.where(x > 13, 13.0, sigmoid_linear(x)),
        lambda x: F.relu(x) - F.relu(x - 1e20),
        lambda x: sigmoid_linear(x) + 1e-8 * x * x,  # a hair on small numbers
        lambda x: sigmoid_linear(x) * torch.sigmoid((x + 20) * 4),
        lambda x: (
            0.5 * x * (2 - 2 / (torch.exp(1.5957691 * x * (1 + 0.044715 * x * x)) + 1))
            + 0 * torch.exp(x)
        ),  # no number where the exponential is none
    ],
)
def test_what_is_an_activation_on_small_numbers_only_is_left(
    activation: Callable[[Tensor], Tensor],
) -> None:
    before = graph_of(activation)
    graph = graph_of(activation)
    name_activations(graph)
    large = torch.tensor([-1e30, -50, -21, -1e-8, 0, 1e-8, 13.5, 21, 50, 1e5, 1e30])
    found = []
    for each in (before, graph):
        embedding = dict(each.module.named_parameters())["embedding.weight"]
        embedding.data[:11] = large[:, None]
        found.append(each.module(torch.arange(11), torch.zeros(11).long(), torch.arange(11)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9, equal_nan=True)


def test_a_cast_that_loses_large_numbers_is_no_part_of_an_activation() -> None:
    graph = graph_of(lambda x: F.silu(x.half()).to(x.dtype), torch.bfloat16)
    assert name_activations(graph) == 0  # 65520 and more are infinite between


def root_mean_square(x: Tensor, limit: Callable[[Tensor], Tensor]) -> Tensor:
    return x * torch.rsqrt(limit(x.pow(2).mean(-1, keepdim=True)))


@pytest.mark.parametrize(
    ("function", "num_fused"),
    [
        (lambda x: root_mean_square(x, lambda v: v + 1e-12), 1),
        (lambda x: root_mean_square(x, lambda v: v.clamp(min=1e-12)), 0),
        (lambda x: root_mean_square(x, lambda v: (v + 1e-12).clamp(max=1e4)), 0),
        (lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-12), 0),  # outside the root
        (lambda x: root_mean_square(x, lambda v: torch.add(v, 1e-9, alpha=2)), 0),
    ],
)
def test_only_what_is_a_norm_for_all_numbers_becomes_one(
    function: Callable[[Tensor], Tensor], num_fused: int
) -> None:
    assert fuse_norms(graph_of(function)) == num_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_default_epsilon_of_an_rms_norm_is_torchs(dtype: torch.dtype) -> None:
    """It matters for small rows alone."""
    graph = graph_of(lambda x: F.rms_norm(x, (16,)), dtype)
    assert fuse_norms(graph) == 1
    norm = next(node for node in graph.graph.nodes if node.target is ops.rms_norm)
    x = torch.full((1, 16), 1e-3, dtype=dtype)
    found, _ = ops.rms_norm(x, None, *norm.args[2:])
    torch.testing.assert_close(found, F.rms_norm(x, (16,)))


def test_the_batches_lie_on_no_line() -> None:
    (a, b), (c, d), (e, f) = BATCHES
    assert (c - a) * (f - b) != (e - a) * (d - b)


def test_computed_sizes_are_not_taken_for_others() -> None:
    """Twice the rows less two was the number of tokens in two batches out of two."""

    def function(x: Tensor) -> Tensor:
        return x * min(x.shape[0], 2)  # the same for every batch that is compared

    graph = graph_of(function)
    clean(graph)
    graph.graph.lint()
    for node in graph.graph.nodes:
        if op_name(node) == "mul" and graph.tensor(node) is not None:
            assert not isinstance(node.args[1], int)
            break
    else:
        pytest.fail("the product is gone")


def test_ids_that_a_narrow_float_rounds_stay_rounded() -> None:
    graph = graph_of(lambda x: x)
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    wide = graph.call(first, torch.ops.aten.to.dtype, graph.token_ids, torch.bfloat16)
    back = graph.call(first, torch.ops.aten.to.dtype, wide, torch.int64)
    assert not cleaning._is_widened_and_back(graph, graph.token_ids, wide, back)
