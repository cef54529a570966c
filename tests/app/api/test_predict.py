"""Predictions from JSON and npy, errors that name the input, and what they cost."""

import asyncio
import io
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest

from app.api.npy import read_npy
from app.api.tensors import array_of, cast_to, tensors_of
from app.billing.service import set_spending_limit
from app.core.errors import InvalidRequest
from runtime.protocol import Schema, TensorSpec
from tests.app.api.conftest import ORGANIZATION, Box

ROWS = {"x": [[1.5, 2], [3, -4]], "k": [7, 8]}


async def test_a_prediction_and_its_receipt(box: Box) -> None:
    async with box.http() as http:
        response = await http.post("/models/doubler/predict", json={"inputs": ROWS})
    assert response.status_code == 200, response.text
    assert response.json() == {
        "outputs": {"x": [[1.5, 2.0], [3.0, -4.0]], "k": [7, 8]},
        "usage": {"device_ms": 2, "batch_rows": 2, "queue_ns": 10},
    }
    receipt = await box.receipt(response.headers["x-request-id"])
    # 2 ms at $1 per hour are 555.6 nano-dollars, and 100 for the request.
    assert receipt["amount_nano"] == 556 + 100
    assert receipt["outcome"] == "completed"
    assert receipt["route"] == "/models/predict"


WRONG: list[tuple[Any, str, str]] = [
    ({"x": [[1, 2]]}, "inputs.k", "is required"),
    ({**ROWS, "y": 1}, "inputs.y", "x (float32), k (int64)"),
    ([[1, 2]], "inputs", "an object with: x (float32), k (int64)"),
    ({**ROWS, "x": [[1, 2], [3]]}, "inputs.x", "ragged"),
    ({**ROWS, "x": [["NaN", "1"], ["2", "3"]]}, "inputs.x", "numbers only"),
    ({**ROWS, "x": [[None, 1], [2, 3]]}, "inputs.x", "numbers only"),
    ({**ROWS, "x": [1, 2]}, "inputs.x", "for a batch of one"),
    ({**ROWS, "x": 5}, "inputs.x", "shape []"),
    ({**ROWS, "x": [[1, 2, 3], [4, 5, 6]]}, "inputs.x", "the model takes [any, 2]"),
    ({**ROWS, "x": [[1, 2]] * 5}, "inputs.x", "at most 4"),
    ({**ROWS, "x": []}, "inputs.x", "shape [0]"),
    ({**ROWS, "x": [[1, 1e300], [2, 3]]}, "inputs.x", "too large for float32"),
    ({**ROWS, "k": [1.5, 2]}, "inputs.k", "whole numbers"),
    ({**ROWS, "k": [2**64, 2]}, "inputs.k", "numbers"),
    ({**ROWS, "k": [2**63, 2]}, "inputs.k", "numbers from"),
    ({**ROWS, "k": [1]}, "inputs", "different lengths (x: 2, k: 1)"),
    ({**ROWS, "k": {"a": 1}}, "inputs.k", "numbers only"),
]


async def test_bad_inputs_are_named(box: Box) -> None:
    async with box.http() as http:
        for inputs, param, words in WRONG:
            response = await http.post("/models/doubler/predict", json={"inputs": inputs})
            assert response.status_code == 400, (inputs, response.text)
            error = response.json()["error"]
            assert (error["param"], words in error["message"]) == (param, True), error
        response = await http.post("/models/doubler/predict", json={})
        assert response.json()["error"]["param"] == "inputs"
        response = await http.post("/models/tiny/predict", json={"inputs": ROWS})
        assert response.json()["error"]["code"] == "wrong_kind_of_model"
        response = await http.post("/models/absent/predict", json={"inputs": ROWS})
        assert response.status_code == 404
        usage = (await http.get("/api/usage")).json()
    assert usage["rows"] == []


async def test_a_failed_prediction_is_recorded_and_free(box: Box) -> None:
    async with box.http() as http:
        response = await http.post(
            "/models/doubler/predict", json={"inputs": {"x": [[1, 2]], "k": [13]}}
        )
    assert (response.status_code, response.json()["error"]["code"]) == (500, "unlucky")
    receipt = await box.receipt(response.headers["x-request-id"])
    assert (receipt["outcome"], receipt["amount_nano"]) == ("failed", 0)


def of_k(k: int) -> dict[str, Any]:
    return {"inputs": {"x": [[1, 2]], "k": [k]}}


async def test_a_run_that_fails_by_its_input_is_paid_for(box: Box) -> None:
    async with box.http() as http:
        response = await http.post("/models/doubler/predict", json=of_k(14))
        assert (response.status_code, response.json()["error"]["code"]) == (422, "model_failed")
        receipt = await box.receipt(response.headers["x-request-id"])
        assert (receipt["outcome"], receipt["finish_reason"]) == ("cancelled", "model_failed")
        assert receipt["amount_nano"] == 556 + 100
        box.workers["doubler"].device_ns = 0  # refused before it ran
        response = await http.post("/models/doubler/predict", json=of_k(14))
        receipt = await box.receipt(response.headers["x-request-id"])
        assert (receipt["outcome"], receipt["amount_nano"]) == ("failed", 0)
        box.workers["doubler"].device_ns = 3_600_000_000_000
        response = await http.post("/models/doubler/predict", json=of_k(14))
    assert response.json()["error"]["code"] == "worker_untrusted"
    receipt = await box.receipt(response.headers["x-request-id"])
    assert (receipt["outcome"], receipt["amount_nano"]) == ("failed", 0)


async def test_out_of_time_what_ran_is_paid_for_and_what_waited_is_not(box: Box) -> None:
    await box.stop()
    box.timeout_seconds = 0.2
    await box.start()
    receipts = []
    async with box.http() as http:
        for k in (98, 99):  # runs until it is cancelled; waits
            response = await http.post("/models/doubler/predict", json=of_k(k))
            assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
            while box.relay._running:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            receipts.append(await box.receipt(response.headers["x-request-id"]))
    assert [(each["outcome"], each["finish_reason"]) for each in receipts] == [
        ("cancelled", "timeout"),
        ("failed", "timeout"),
    ]
    assert [each["amount_nano"] for each in receipts] == [656, 0]
    assert box.fleet.targets["doubler"].link.num_outstanding == 0


async def test_a_prediction_needs_its_money_first(box: Box) -> None:
    """11 ms are held: four times the slowest batch of the build, and one."""
    async with box.database.write() as session:
        await set_spending_limit(session, ORGANIZATION, 3_155, "usd")
    async with box.http() as http:
        response = await http.post("/models/doubler/predict", json={"inputs": ROWS})
        assert response.status_code == 402
        assert "$0.000000001 is missing" in response.json()["error"]["message"]
        async with box.database.write() as session:
            await set_spending_limit(session, ORGANIZATION, 3_156, "usd")
        response = await http.post("/models/doubler/predict", json={"inputs": ROWS})
        assert response.status_code == 200


async def test_a_worker_that_dies_fails_the_prediction_at_once(box: Box) -> None:
    async with box.http() as http:
        answer = asyncio.create_task(
            http.post("/models/doubler/predict", json={"inputs": {"x": [[1, 2]], "k": [99]}})
        )
        while box.fleet.targets["doubler"].link.num_outstanding == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        box.fleet.targets["doubler"].link.close("was stopped")
        response = await answer
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "worker_lost"
    assert response.headers["retry-after"] == "1"


SINGLE = Schema(
    inputs=[TensorSpec(name="image", dtype="float32", shape=[None, 2])],
    outputs=[TensorSpec(name="y", dtype="float32", shape=[None, 2])],
    is_batched=True,
)


async def test_npy_in_and_out(box: Box) -> None:
    target = box.fleet.targets["doubler"]
    target.manifest = type(target.manifest)(
        kind="tensor", format="pt2", num_parameters=1, weight_bytes=4, schema=SINGLE
    )
    file = io.BytesIO()
    np.save(file, np.asfortranarray([[1, 2], [3, 4]], dtype="f8"))
    headers = {"content-type": "application/x-npy"}
    async with box.http() as http:
        for body in (b"", b"not npy", file.getvalue()[:-1]):
            response = await http.post("/models/doubler/predict", content=body, headers=headers)
            assert response.status_code == 400
            assert "npy" in response.json()["error"]["message"]
        objects = io.BytesIO()
        np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
        response = await http.post(
            "/models/doubler/predict", content=objects.getvalue(), headers=headers
        )
        assert "Python objects" in response.json()["error"]["message"]


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize(
    "header",
    [
        HEADER % f"(0, {10**30})",
        HEADER % "(-1, -4)",
        HEADER % "(True, 4)",
        HEADER % f"({'1, ' * 70})",
        HEADER % "((((",
        '"""{',
        "[" * 9000,
        "-" * 9000 + "1",
    ],
)
def test_an_npy_header_that_makes_no_sense_is_refused(header: str) -> None:
    body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(16)
    if header == HEADER % f"(0, {10**30})":
        body = body[:-16]
    with pytest.raises(InvalidRequest, match="not an npy file"):
        read_npy(body)


def test_text_among_the_numbers_costs_no_memory() -> None:
    value: list[Any] = [[1, 2]] * 4000 + [["a" * 16_000, None]]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="numbers only"):
            tensors_of(value, SINGLE)
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024**2
    finally:
        tracemalloc.stop()


def test_a_single_input_needs_no_name() -> None:
    (named,) = tensors_of({"image": [[1, 2]]}, SINGLE)
    (bare,) = tensors_of([[1, 2]], SINGLE)
    assert named == bare
    assert np.frombuffer(named.data, "<f4").tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 3.140625, 1e30, float("inf"), float("nan")])
def test_bfloat16_goes_there_and_back(value: float) -> None:
    spec = TensorSpec(name="b", dtype="bfloat16", shape=[None])
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    (tensor,) = tensors_of([[value]][0], schema)
    assert len(tensor.data) == 2
    back = array_of(tensor)[0]
    assert np.isnan(back) if np.isnan(value) else back == pytest.approx(value, rel=2**-8)


def test_bfloat16_rounds_to_even() -> None:
    spec = TensorSpec(name="b", dtype="bfloat16", shape=[None])
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8], dtype="f4")
    bits = cast_to(halves, spec)
    assert bits.tolist() == [0x3F80, 0x3F82]


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("bool", [2], "true and false"),
        ("uint8", [256], "from 0 to 255"),
        ("uint8", [-1], "from 0 to 255"),
        ("int32", [float("nan")], "whole numbers"),
        ("complex64", [1], "JSON cannot carry"),
        ("float8", [1], "JSON cannot carry"),
    ],
)
def test_values_that_would_change_are_refused(dtype: str, value: list[Any], words: str) -> None:
    spec = TensorSpec(name="v", dtype=dtype, shape=[None])
    with pytest.raises(InvalidRequest, match=words):
        tensors_of({"v": value}, Schema(inputs=[spec], outputs=[], is_batched=False))


FLOATS = {
    "float16": (65504.0, 65520.0),
    "bfloat16": (3.3895e38, 3.4e38),
    "float32": (3.4028e38, 1e39),
    "float64": (1.7e308, None),
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_finite_number_never_becomes_infinite(dtype: str) -> None:
    spec = TensorSpec(name="v", dtype=dtype, shape=[None])
    schema = Schema(inputs=[spec], outputs=[], is_batched=False)
    greatest, too_large = FLOATS[dtype]
    kept = [greatest, -greatest, float("inf"), float("-inf"), float("nan")]
    (tensor,) = tensors_of({"v": kept}, schema)
    assert np.isfinite(array_of(tensor)).tolist() == [True, True, False, False, False]
    for value in (too_large, too_large and -too_large, 10**18 if dtype == "float16" else None):
        if value is not None:
            with pytest.raises(InvalidRequest, match=r"inputs\.v .* too large for " + dtype):
                tensors_of({"v": [0, value]}, schema)
