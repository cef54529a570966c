"""What a caller is told about wrong inputs, and that right ones arrive bit for bit."""

import math

import msgspec
import numpy as np
import pytest
import torch

from runtime.batching.joining import Rows, check_outputs, encode, join
from runtime.batching.tensors import InputChecker, PredictFailure
from runtime.protocol import Schema, Tensor, TensorSpec

SCHEMA = Schema(
    inputs=[
        TensorSpec(
            name="ids",
            dtype="int64",
            shape=[None, None],
            min_shape=[0, 2],
            max_shape=[16, 6],
        ),
        TensorSpec(name="scale", dtype="float32", shape=[None, 3]),
    ],
    outputs=[TensorSpec(name="output", dtype="float32", shape=[None, 3])],
    is_batched=True,
)


def decode_inputs(tensors: list[Tensor], schema: Schema) -> list[torch.Tensor]:
    """One request's inputs as they reach the program."""
    inputs = InputChecker(schema).check(tensors)
    num_rows = inputs[0].shape[0] if schema.is_batched else 1
    return join([Rows(inputs, 0, num_rows, 0)], schema)


def encode_outputs(outputs: list[torch.Tensor], schema: Schema) -> list[Tensor]:
    return encode([check_outputs(outputs, len(outputs[0]), schema)], schema)


def wire(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name=name, dtype=array.dtype.name, shape=list(array.shape), data=array.tobytes())


def good(rows: int = 2) -> dict[str, Tensor]:
    return {
        "ids": wire("ids", np.arange(rows * 4, dtype=np.int64).reshape(rows, 4)),
        "scale": wire("scale", np.ones((rows, 3), np.float32)),
    }


def refusal(tensors: list[Tensor]) -> PredictFailure:
    with pytest.raises(PredictFailure) as caught:
        decode_inputs(tensors, SCHEMA)
    return caught.value


def test_inputs_come_in_the_order_of_the_schema():
    tensors = good()
    ids, scale = decode_inputs([tensors["scale"], tensors["ids"]], SCHEMA)
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert scale.dtype is torch.float32


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"dtype": "int32"}, "wrong_dtype", "int64"),
        ({"shape": [8]}, "wrong_shape", "2 axes"),
        ({"shape": [1, 8]}, "wrong_shape", "axis 1 must be 2 to 6"),
        ({"shape": [8, 1]}, "wrong_shape", "axis 1 must be 2 to 6"),
        ({"shape": [0, 4]}, "wrong_shape", "axis 0 must be at least 1"),
        ({"shape": [-2, -4]}, "wrong_shape", "at least 1"),
        ({"data": b"123"}, "wrong_length", "need 64"),
        ({"name": "idz"}, "unknown_input", "it takes 'ids', 'scale'"),
        ({"name": "scale"}, "duplicate_input", "twice"),
    ],
)
def test_a_wrong_input_is_named(change, code, words):
    tensors = good()
    wrong = msgspec.structs.replace(tensors["ids"], **change)
    error = refusal([wrong, tensors["scale"]]).error
    assert error.code == code
    assert error.status == 400
    assert words in error.message
    assert error.param == f"inputs.{wrong.name}"


def test_a_missing_input_is_named_with_what_it_should_be():
    error = refusal([good()["ids"]]).error
    assert (error.code, error.param) == ("missing_input", "inputs.scale")
    assert "float32 of shape [n, 3]" in error.message


def test_inputs_must_have_equally_many_rows():
    error = refusal([good(2)["ids"], good(3)["scale"]]).error
    assert error.code == "wrong_shape"
    assert "3 rows" in error.message


def test_a_batch_may_exceed_its_axis_since_it_runs_in_pieces():
    tensors = good(40)
    assert decode_inputs(list(tensors.values()), SCHEMA)[0].shape == (40, 4)


def test_an_empty_input_cannot_announce_more_than_it_could_hold():
    spec = TensorSpec(
        name="x", dtype="float32", shape=[None] * 2, min_shape=[0, 0], max_shape=[None] * 2
    )
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    (empty,) = decode_inputs([Tensor(name="x", dtype="float32", shape=[3, 0], data=b"")], schema)
    assert empty.shape == (3, 0)
    with pytest.raises(PredictFailure, match="axis of 0"):
        decode_inputs([Tensor(name="x", dtype="float32", shape=[10**12, 0], data=b"")], schema)


def test_not_a_number_is_a_value():
    schema = Schema(inputs=[SCHEMA.inputs[1]], outputs=[], is_batched=True)
    array = np.array([[math.nan, math.inf, -0.0]], np.float32)
    (decoded,) = decode_inputs([wire("scale", array)], schema)
    assert decoded.numpy().tobytes() == array.tobytes()


def test_any_byte_but_zero_is_true():
    spec = TensorSpec(name="mask", dtype="bool", shape=[3])
    schema = Schema(inputs=[spec], outputs=[], is_batched=False)
    tensor = Tensor(name="mask", dtype="bool", shape=[3], data=bytes([0, 1, 7]))
    (decoded,) = decode_inputs([tensor], schema)
    assert decoded.view(torch.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "dtype", ["float16", "float64", "int8", "uint16", "uint64", "complex64", "int32"]
)
def test_every_wire_dtype_survives_the_round_trip(dtype):
    array = np.arange(6).astype(dtype).reshape(2, 3)
    spec = TensorSpec(name="x", dtype=dtype, shape=[None, 3])
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    decoded = decode_inputs([wire("x", array)], schema)
    assert encode_outputs(decoded, schema) == [wire("x", array)]


def test_outputs_are_c_ordered():
    spec = TensorSpec(name="x", dtype="int64", shape=[2, 3])
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=False)
    (encoded,) = encode_outputs([torch.arange(6).reshape(3, 2).T], schema)
    assert np.frombuffer(encoded.data, np.int64).tolist() == [0, 2, 4, 1, 3, 5]


def test_outputs_that_do_not_fit_a_frame_are_refused():
    spec = TensorSpec(name="x", dtype="float64", shape=[None])
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    with pytest.raises(PredictFailure, match="fewer rows") as caught:
        encode_outputs([torch.zeros(1).double().expand(9 * 1024**2)], schema)
    assert caught.value.error.status == 413


@pytest.mark.parametrize("axes", [[None, 2], [None, None]])
@pytest.mark.parametrize(("value", "is_right"), [(0, True), (49, True), (50, False), (-1, False)])
def test_integers_beyond_the_known_range_are_refused(
    axes: list[int | None], value: int, is_right: bool
) -> None:
    ids = TensorSpec(name="ids", dtype="int64", shape=axes, minimum=0, maximum=49)
    checker = InputChecker(Schema(inputs=[ids], outputs=[], is_batched=True))
    data = torch.tensor([[1, value]]).numpy().tobytes()
    tensor = Tensor(name="ids", dtype="int64", shape=[1, 2], data=data)
    if is_right:
        assert checker.check([tensor]) == [tensor]
        return
    says = f"the value {value}; the model takes 0 to 49"
    with pytest.raises(PredictFailure, match=says) as caught:
        checker.check([tensor])
    assert (caught.value.error.code, caught.value.error.param) == ("out_of_range", "inputs.ids")
