"""A decoder layer's operators against float64, in every compiled variant and plain torch."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.execution import linear, ops
from runtime.execution.native import Variant, library_path, variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest output: half a step of the dtype, and for float32 what summing adds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 * 1.05}
PLAIN = "plain torch"


@pytest.fixture(params=[*variants(), PLAIN], ids=lambda p: getattr(p, "name", p))
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the ops use one variant, or none."""
    chosen = None if request.param == PLAIN else request.param
    if chosen and not chosen.is_supported:
        pytest.skip(f"this CPU does not run {chosen.name}")
    if chosen and not library_path(chosen).is_file():
        pytest.skip(f"{chosen.name} was not compiled (python -m runtime.execution.native)")
    loaded = ops.row_ops(chosen) if chosen else None
    monkeypatch.setattr(ops, "native_ops", lambda: loaded)
    monkeypatch.setattr(linear, "fastest_variant", lambda: chosen)
    return chosen


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = float((found.double() - expected).abs().max()) if expected.numel() else 0.0
    assert error <= TOLERANCE[dtype] * scale


def rows(*shape: int, dtype: torch.dtype) -> Tensor:
    """Strided in all but the last dimension, as slices of a joined product are."""
    return torch.randn(*shape[:-1], shape[-1] + 7).to(dtype)[..., 3 : shape[-1] + 3]


SHAPES = [(1, 1), (16, 2), (40, 33), (100, 64), (65, 576), (200, 31), (48, 1030)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_linear_is_the_product(
    variant: Variant | None,
    dtype: torch.dtype,
    num_outputs: int,
    num_inputs: int,
    has_bias: bool,
) -> None:
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    bias = torch.randn(num_outputs).to(dtype) if has_bias else None
    layer = linear.PackedLinear(weight, bias)
    assert layer.is_packed == (variant is not None)
    for num_rows in (0, 1, 2, 5, 7, 70):
        x = rows(num_rows, num_inputs, dtype=dtype)
        wide_bias = None if bias is None else bias.double()
        assert_close(layer(x), F.linear(x.double(), weight.double(), wide_bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    variant: Variant | None, dtype: torch.dtype
) -> None:
    if variant is None:
        pytest.skip("not promised of plain torch")
    layer = linear.PackedLinear(torch.randn(1000, 576).to(dtype), torch.randn(1000).to(dtype))
    x = torch.randn(400, 576).to(dtype)
    whole = layer(x)
    for num_rows in (1, 3, 6, 8, 16, 64):
        assert torch.equal(layer(x[:num_rows]), whole[:num_rows])
        assert torch.equal(layer(x[-num_rows:]), whole[-num_rows:])
    torch.set_num_threads(1)
    assert torch.equal(layer(x), whole)
    x[1:] = torch.nan
    assert torch.equal(layer(x)[0], whole[0])


def test_threads_that_compute_at_once_do_not_disturb_each_other(variant: Variant | None) -> None:
    if variant is None:
        pytest.skip("torch's own threads")
    layer = linear.PackedLinear(torch.randn(1024, 256).bfloat16())
    inputs = [torch.randn(9, 256).bfloat16() for _ in range(4)]
    expected = [layer(x) for x in inputs]

    def repeat(index: int) -> bool:
        torch.set_num_threads(2)
        return all(torch.equal(layer(inputs[index]), expected[index]) for _ in range(200))

    with ThreadPoolExecutor(len(inputs)) as threads:
        assert all(threads.map(repeat, range(len(inputs))))


def test_packed_linear_keeps_leading_dimensions_and_joins_siblings(
    variant: Variant | None,
) -> None:
    weights = [torch.randn(n, 40) for n in (48, 16, 30)]
    biases = [torch.randn(48), None, torch.randn(30)]
    x = torch.randn(2, 3, 40)
    expected = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    found = linear.PackedLinear.joined(weights, biases)(x)
    torch.testing.assert_close(found, torch.cat(expected, dim=-1))
    found = linear.PackedLinear.joined(weights, [None] * 3)(x)
    torch.testing.assert_close(found, F.linear(x, torch.cat(weights)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tied_embedding_reads_packed_weights(variant: Variant | None, dtype: torch.dtype) -> None:
    weight = torch.randn(70, 33).to(dtype)
    ids = torch.tensor([[0, 69, 16], [15, 3, 3]])
    assert torch.equal(linear.PackedLinear(weight).weight_rows(ids), weight[ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_inputs", [7, 8])
def test_packed_linear_refuses_a_width_that_is_off_by_one(
    variant: Variant | None, dtype: torch.dtype, num_inputs: int
) -> None:
    layer = linear.PackedLinear(torch.randn(32, num_inputs).to(dtype))
    for width in (num_inputs - 2, num_inputs - 1, num_inputs + 1, num_inputs + 2):
        with pytest.raises(RuntimeError):
            layer(torch.randn(3, width).to(dtype))
    if variant:  # nor does the operator itself write beyond what it holds
        wide = torch.randn(3, num_inputs + 2).to(dtype)
        with pytest.raises(RuntimeError, match="do not fit"):
            ops.load_variant(variant).linear(wide, layer._weight, layer._bias, 32)


def test_packed_linear_refuses_other_dtypes_and_widths(variant: Variant | None) -> None:
    layer = linear.PackedLinear(torch.randn(32, 33).bfloat16())
    for bad in (torch.randn(2, 33), torch.randn(2, 40).bfloat16(), torch.randn(2, 30).bfloat16()):
        with pytest.raises(RuntimeError):
            layer(bad)


def test_float64_is_plain_torch(variant: Variant | None) -> None:
    weight, x = torch.randn(30, 20).double(), torch.randn(5, 20).double()
    layer = linear.PackedLinear(weight)
    assert not layer.is_packed
    assert torch.equal(layer(x), F.linear(x, weight))
    normed, same = ops.rms_norm(x, torch.ones(20).double(), 1e-6)
    assert same is x
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(normed, expected, rtol=1e-14, atol=1e-14)
    assert ops.gated(x, "silu").dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 47, 576])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("weight_dtype", [None, "own", "float32"])
def test_norms(
    variant: Variant | None,
    dtype: torch.dtype,
    width: int,
    has_residual: bool,
    weight_dtype: str | None,
) -> None:
    def vector() -> Tensor | None:
        if weight_dtype is None:
            return None
        return torch.randn(width).to(dtype if weight_dtype == "own" else torch.float32)

    weight, bias = vector(), vector()
    for shape in ((0, width), (1, width), (300, width), (70, 3, width)):
        x = rows(*shape, dtype=dtype) * 3 + 1
        residual = rows(*shape, dtype=dtype) if has_residual else None
        summed = x if residual is None else x + residual
        h = summed.double()
        expected = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        if weight is not None:
            expected = expected * (weight.double() + 1)
        found, kept = ops.rms_norm(x, weight, 1e-5, 1.0, residual)
        assert_close(found, expected, dtype)
        assert torch.equal(kept, summed)
        expected = F.layer_norm(
            h,
            (width,),
            None if weight is None else weight.double(),
            None if bias is None else bias.double(),
            1e-5,
        )
        found, kept = ops.layer_norm(x, weight, bias, 1e-5, residual)
        assert_close(found, expected, dtype)
        assert torch.equal(kept, summed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gated(variant: Variant | None, dtype: torch.dtype, activation: str) -> None:
    for num_rows, width in ((0, 8), (1, 1), (3, 47), (50, 1536)):
        x = rows(num_rows, 2 * width, dtype=dtype) * 4
        wide = x.double()
        expected = ops.ACTIVATIONS[activation](wide[:, :width]) * wide[:, width:]
        assert_close(ops.gated(x, activation), expected, dtype)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_at_their_ends(variant: Variant | None, activation: str) -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4, torch.nan])
    x = torch.cat((gate, torch.ones(9)))[None]
    expected = ops.ACTIVATIONS[activation](gate.double())
    torch.testing.assert_close(
        ops.gated(x, activation)[0].double(), expected, atol=1e-6, rtol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (20, 10), (6, 0)])
def test_rotate(
    variant: Variant | None,
    dtype: torch.dtype,
    is_interleaved: bool,
    head_dim: int,
    rotary_dim: int,
) -> None:
    for angle_dtype in (dtype, torch.float32):
        for num_tokens in (0, 1, 37, 300):
            x = rows(num_tokens, 3, head_dim, dtype=dtype)
            cosines = torch.randn(num_tokens, rotary_dim).to(angle_dtype)
            sines = torch.randn(num_tokens, rotary_dim).to(angle_dtype)
            turned, rest = x[..., :rotary_dim].double(), x[..., rotary_dim:].double()
            if is_interleaved:
                partner = turned.unflatten(-1, (rotary_dim // 2, 2)).flip(-1).clone()
                partner[..., 0] *= -1
                partner = partner.flatten(-2)
            else:
                partner = turned.roll(rotary_dim // 2, -1).clone()
                partner[..., : rotary_dim // 2] *= -1
            turned = turned * cosines.double()[:, None] + partner * sines.double()[:, None]
            expected = torch.cat((turned, rest), dim=-1)
            assert_close(ops.rotate(x, cosines, sines, is_interleaved), expected, dtype)


def test_ill_fitting_arguments_are_refused(variant: Variant | None) -> None:
    if variant is None:
        pytest.skip("torch's own errors")
    x = torch.randn(4, 3, 16)
    bad = [
        lambda: ops.rms_norm(x, torch.ones(8), 1e-5),
        lambda: ops.rms_norm(x, torch.ones(16), 1e-5, 0.0, torch.randn(4, 16)),
        lambda: ops.rms_norm(x, torch.ones(16).double(), 1e-5),
        lambda: ops.layer_norm(x.transpose(0, 2), None, None, 1e-5),
        lambda: ops.gated(torch.randn(3, 5), "silu"),
        lambda: ops.gated(torch.randn(3, 4), "swish"),
        lambda: ops.rotate(x, torch.randn(4, 18), torch.randn(4, 18)),
        lambda: ops.rotate(x, torch.randn(3, 16), torch.randn(3, 16)),
    ]
    for call in bad:
        with pytest.raises(RuntimeError):
            call()
