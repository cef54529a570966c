"""Answers in JSON: how large they may be, what they cannot hold, and how they are written."""

import json
from typing import Any

import msgspec
import numpy as np
import pytest

from app.api import json_answers, predict_answers
from app.api.json_answers import CHUNK_VALUES, json_of
from runtime.protocol import Predict, Schema, TensorSpec
from tests.app.api.conftest import Box
from tests.app.api.scripted_worker import TENSOR
from tests.app.api.test_inference_v2 import Client, both

NPY = {"accept": "application/x-npy"}
INFER = "/v2/models/{}/infer"


def model(shape: list[int | None], dtype: str = "float32") -> Any:
    spec = TensorSpec(name="x", dtype=dtype, shape=shape)
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    return msgspec.structs.replace(TENSOR, schema=schema)


@pytest.mark.parametrize(
    "shape",
    [(), (3,), (0, 2), (2, 0), (CHUNK_VALUES * 2 + 1,), (7, CHUNK_VALUES // 3), (2, 2, 40_000)],
)
def test_large_arrays_are_written_as_small_ones_are(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype("f4")
    assert msgspec.json.encode(json_of(array)) == msgspec.json.encode(array.tolist())


async def test_an_answer_too_large_for_json_is_refused_before_the_run(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_answers, "MAX_JSON_VALUES", 5)
    await box.connect("echo", model([None, 2]))
    async with box.http() as http:
        small = await http.post("/models/echo/predict", json={"inputs": [[1, 2], [3, 4]]})
        assert small.json()["outputs"] == {"x": [[1.0, 2.0], [3.0, 4.0]]}
        rows = {"inputs": [[1, 2]] * 3}
        refused = await http.post("/models/echo/predict", json=rows)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "answer_too_large")
        assert "application/x-npy" in refused.json()["error"]["message"]
        assert (await http.post("/models/echo/predict", json=rows, headers=NPY)).is_success
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [3, 2], "data": [0] * 6}]}
        refused = await http.post(INFER.format("echo"), json=body)
        assert (refused.status_code, refused.json()["code"]) == (413, "answer_too_large")
        body["outputs"] = [{"name": "x", "parameters": {"classification": 2}}]
        assert (await http.post(INFER.format("echo"), json=body)).status_code == 413
        body["outputs"] = [{"name": "x", "parameters": {"classification": 1}}]
        assert (await http.post(INFER.format("echo"), json=body)).is_success
        body["outputs"] = [{"name": "x", "parameters": {"binary_data": True}}]
        assert (await http.post(INFER.format("echo"), json=body)).is_success
    asked = [each for each in box.workers["echo"].received if isinstance(each, Predict)]
    assert len(asked) == 4, "what was refused was not run"


async def test_where_the_schema_does_not_tell_the_answer_is_looked_at(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_answers, "MAX_JSON_VALUES", 5)
    await box.connect("echo", model([None, None]))
    async with box.http() as http:
        refused = await http.post("/models/echo/predict", json={"inputs": [[1] * 6]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "answer_too_large")
    assert any(isinstance(each, Predict) for each in box.workers["echo"].received)
    receipt = await box.receipt(refused.headers["x-request-id"])  # it was asked for, and it ran
    assert (receipt["outcome"], receipt["finish_reason"]) == ("cancelled", "answer_too_large")
    assert receipt["amount_nano"] == 556 + 100


async def test_large_answers_are_written_in_a_thread(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_answers, "LARGE_BODY_BYTES", 10)
    client = Client(box)
    async with box.http() as http:
        sent = {"x": [[1, 2], [3, 4]], "k": [1, 2]}
        answer = await http.post("/models/doubler/predict", json={"inputs": sent})
        assert answer.json()["outputs"] == sent
    answer = await client.sync("infer", "doubler", both(binary_data=False))
    assert answer.as_numpy("k").tolist() == [7, 8]


async def test_complex_outputs_are_arrays_only(box: Box) -> None:
    schema = Schema(
        inputs=[TensorSpec(name="x", dtype="float32", shape=[None, 2])],
        outputs=[TensorSpec(name="z", dtype="complex64", shape=[None])],
        is_batched=True,
    )
    await box.connect("waves", msgspec.structs.replace(TENSOR, schema=schema))
    async with box.http() as http:
        response = await http.post("/models/waves/predict", json={"inputs": [[1, 2]]})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "unsupported_datatype"
        assert "application/x-npy" in response.json()["error"]["message"]
        document = (await http.get("/models/waves/openapi.json")).json()
    answers = document["paths"]["/models/waves/predict"]["post"]["responses"]["200"]["content"]
    assert set(answers) == {"application/x-npz", "application/x-npy"}
    assert not any(isinstance(each, Predict) for each in box.workers["waves"].received)


async def test_a_fault_of_ours_names_the_request(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(predict_answers, "labels_of", fail)
    async with box.http() as http:
        sent = {"inputs": {"x": [[1, 2]], "k": [1]}}
        response = await http.post("/models/doubler/predict", json=sent)
    assert response.status_code == 500
    assert json.loads(response.content)["error"]["code"] == "internal_error"
    assert (await box.receipt(response.headers["x-request-id"]))["outcome"] == "failed"
