"""Rows of several requests become one run's tensors, and its outputs everyone's own."""

import asyncio

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given

from runtime.batching.batcher import Batcher, Prediction
from runtime.batching.fair_queue import is_similar
from runtime.batching.joining import Rows, check_outputs, encode, join, part_outputs, run_group
from runtime.batching.tensors import InputChecker, PredictFailure
from runtime.protocol import Schema, Tensor, TensorSpec
from tests.runtime.batching.test_batcher import predict

DTYPES = ["float32", "int64", "bool", "float16", "uint8"]


def padded_schema(dtype: str = "float32", *, pad_value: float = 0.0) -> Schema:
    """Rows of any length with 3 values at each place, and what is as long beside a number."""
    axes = TensorSpec(
        name="x", dtype=dtype, shape=[None, None, 3], padded_axis=1, pad_value=pad_value
    )
    scale = TensorSpec(name="scale", dtype="float32", shape=[None])
    turned = TensorSpec(name="turned", dtype=dtype, shape=[None, 3, None], padded_axis=2)
    same = TensorSpec(name="same", dtype="float32", shape=[None])
    return Schema(inputs=[axes, scale], outputs=[turned, same], is_batched=True)


def wire(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name=name, dtype=array.dtype.name, shape=list(array.shape), data=array.tobytes())


def array(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)


@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=5),
    data=st.data(),
)
def test_everyone_gets_their_own_rows_back(dtype, sizes, data):
    schema = padded_schema(dtype)
    random = np.random.default_rng(0)
    requests = [
        [
            wire("x", random.integers(0, 2, (rows, length, 3)).astype(dtype)),
            wire("scale", random.random(rows, np.float32)),
        ]
        for rows, length in sizes
    ]
    parts = []
    for request, (rows, length) in zip(requests, sizes, strict=True):
        start = data.draw(st.integers(0, rows - 1))
        stop = data.draw(st.integers(start + 1, rows))
        parts.append(Rows(request, start, stop, length))
    x, scale = join(parts, schema)
    num_rows = sum(part.num_rows for part in parts)
    assert x.shape == (num_rows, max(part.length for part in parts), 3)
    arrays = check_outputs([x.transpose(1, 2), scale], num_rows, schema)
    at = 0
    for part, request in zip(parts, requests, strict=True):
        turned, same = encode([part_outputs(arrays, at, part, schema)], schema)
        expected = array(request[0])[part.start : part.stop].transpose(0, 2, 1)
        assert np.array_equal(array(turned), expected)
        assert turned.shape == list(expected.shape)
        assert np.array_equal(array(same), array(request[1])[part.start : part.stop])
        at += part.num_rows


def test_the_padded_part_has_its_value():
    schema = padded_schema("int64", pad_value=7.0)
    short = [wire("x", np.zeros((1, 1, 3), np.int64)), wire("scale", np.zeros(1, np.float32))]
    long = [wire("x", np.ones((1, 2, 3), np.int64)), wire("scale", np.zeros(1, np.float32))]
    x, _ = join([Rows(short, 0, 1, 1), Rows(long, 0, 1, 2)], schema)
    assert x.tolist() == [[[0] * 3, [7] * 3], [[1] * 3] * 2]


def test_requests_are_told_apart_by_what_padding_cannot_even_out():
    schema = padded_schema()

    def group(length: int, values: int = 3) -> tuple[object, int]:
        x = wire("x", np.ones((1, length, values), np.float32))
        return run_group([x, wire("scale", np.zeros(1, np.float32))], schema)

    assert group(4)[0] == group(9)[0]
    assert (group(4)[1], group(9)[1]) == (4, 9)
    assert group(4)[0] != group(4, values=5)[0]


def test_a_row_that_its_mask_hides_shares_a_run_with_equal_lengths_only():
    schema = padded_schema("int64")

    def group(rows: np.ndarray):
        inputs = [wire("x", rows), wire("scale", np.zeros(len(rows), np.float32))]
        return run_group(inputs, schema)[0]

    seen, hidden = np.ones((2, 4, 3), np.int64), np.ones((2, 4, 3), np.int64)
    hidden[1] = 0
    assert group(seen) == group(seen[:, :2])
    assert group(hidden) != group(seen)
    assert group(hidden) != group(np.zeros((1, 2, 3), np.int64))
    assert group(hidden) == group(hidden[1:])


def test_rows_longer_than_padding_was_proved_at_share_runs_of_their_length_only():
    schema = padded_schema()
    spec = msgspec.structs.replace(schema.inputs[0], longest_padded=16)
    schema = msgspec.structs.replace(schema, inputs=[spec, schema.inputs[1]])

    def group(length: int) -> object:
        rows = [np.ones((1, length, 3), np.float32), np.ones(1, np.float32)]
        pairs = zip(("x", "scale"), rows, strict=True)
        return run_group([wire(name, values) for name, values in pairs], schema)[0]

    assert group(3) == group(16)
    assert group(16) != group(17)
    assert group(17) != group(18)
    assert group(17) == group(17)


def test_inputs_that_are_padded_together_must_be_as_long():
    ids = TensorSpec(name="ids", dtype="int64", shape=[None, None], padded_axis=1)
    mask = TensorSpec(name="mask", dtype="int64", shape=[None, None], padded_axis=1)
    checker = InputChecker(Schema(inputs=[ids, mask], outputs=[], is_batched=True))
    tensors = [wire("ids", np.zeros((1, 4), int)), wire("mask", np.zeros((1, 3), int))]
    with pytest.raises(PredictFailure, match="axis 1 must be 4, as it is of 'ids'") as caught:
        checker.check(tensors)
    assert caught.value.error.param == "inputs.mask"


def test_outputs_whose_shape_depends_on_more_than_the_row_are_a_failure():
    spec = TensorSpec(name="y", dtype="float32", shape=[None, None])
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    parts = [[np.zeros((2, 3), np.float32)], [np.zeros((2, 4), np.float32)]]
    with pytest.raises(RuntimeError, match="shape of an output"):
        encode(parts, schema)


# --- a model ----------------------------------------------------------------------------


class Masked(torch.nn.Module):
    """Attention over tokens that a mask shows; each token's state, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 16)
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.embedding(ids)
        states, _ = self.attention(hidden, hidden, hidden, key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).float()
        return states, (states * weights).sum(1) / weights.sum(1)


async def test_requests_of_other_lengths_share_a_run_and_get_what_they_would_alone():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Masked().eval()
    shapes: list[tuple[int, ...]] = []

    @torch.inference_mode()
    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        shapes.append(tuple(inputs[0].shape))
        return list(model(*inputs))

    inputs = [
        TensorSpec(name=name, dtype="int64", shape=[None, None], padded_axis=1)
        for name in ("ids", "mask")
    ]
    outputs = [
        TensorSpec(name="states", dtype="float32", shape=[None, None, 16], padded_axis=1),
        TensorSpec(name="mean", dtype="float32", shape=[None, 16]),
    ]
    batcher = Batcher(run, Schema(inputs=inputs, outputs=outputs, is_batched=True))

    def request(length: int, rows: int) -> list[Tensor]:
        ids = torch.randint(0, 50, (rows, length))
        return [wire("ids", ids.numpy()), wire("mask", np.ones((rows, length), np.int64))]

    requests = [request(length, rows) for length, rows in [(5, 1), (9, 2), (1, 3), (40, 1)]]
    alone = [await predict(batcher, each) for each in requests]
    shapes.clear()
    batcher.pause()
    together: list[asyncio.Future[Prediction]] = [predict(batcher, each) for each in requests]
    batcher.resume()
    answers = await asyncio.gather(*together)
    assert sorted(shapes) == [(1, 40), (6, 9)]
    assert is_similar(1, 5, 9)
    for expected, answer in zip(alone, answers, strict=True):
        for left, right in zip(expected.outputs, answer.outputs, strict=True):
            assert left.shape == right.shape
            np.testing.assert_allclose(array(left), array(right), atol=1e-6)
    shares = [answer.device_ns for answer in answers[:3]]
    assert shares[1] / shares[0] == pytest.approx(18 / 5, rel=0.01), "by what is not padding"
    batcher.close()
