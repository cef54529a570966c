"""Requests whose replica is replaced before it gets them: while a slow body comes in, or while
money is held."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from runtime.protocol import Manifest, Predict, Schema, TensorSpec
from tests.app.api.conftest import Box
from tests.app.api.scripted_worker import DECODER, EMBEDDER, TENSOR
from tests.app.api.test_predict_bodies import npz

ROWS = {"x": [[1.5, 2.0]], "k": [7]}
V2 = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2]},
        {"name": "k", "datatype": "INT64", "shape": [1], "data": [7]},
    ]
}
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n[[1.5, 2]]\r\n'
    b'--b\r\nContent-Disposition: form-data; name="k"\r\n\r\n[7]\r\n--b--\r\n'
)
SLOW: list[tuple[str, Manifest, str, str, bytes]] = [
    ("doubler", TENSOR, "/models/doubler/predict", "application/json", b""),
    ("doubler", TENSOR, "/models/doubler/predict", "multipart/form-data; boundary=b", FORM),
    ("doubler", TENSOR, "/models/doubler/predict", "application/x-npz", b"npz"),
    ("doubler", TENSOR, "/v2/models/doubler/infer", "application/json", json.dumps(V2).encode()),
    ("tiny", DECODER, "/v1/completions", "", b'{"model": "tiny", "prompt": "a b"}'),
    ("vectors", EMBEDDER, "/v1/embeddings", "", b'{"model": "vectors", "input": "a b"}'),
]


async def replace(box: Box, name: str, manifest: Manifest, **more: Any) -> None:
    """Another worker answers to `name`; the first is gone."""
    worker, link = box.workers[name], box.fleet.targets[name].link
    await box.connect(name, manifest)
    box.fleet.targets[name] = msgspec.structs.replace(box.fleet.targets[name], **more)
    link.close("was stopped")
    await worker.close()


@pytest.mark.parametrize(("name", "manifest", "url", "kind", "body"), SLOW)
async def test_a_slow_body_goes_to_the_replica_that_answers_when_it_is_here(
    box: Box,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    manifest: Manifest,
    url: str,
    kind: str,
    body: bytes,
) -> None:
    if name not in box.workers:
        await box.connect(name, manifest)
    if body == b"npz":
        body = npz(x=np.array(ROWS["x"], "f4"), k=np.array(ROWS["k"]))
    body = body or json.dumps({"inputs": ROWS}).encode()
    resolved = asyncio.Event()
    resolve = box.fleet.resolve

    def watched(*args: Any) -> Any:
        resolved.set()
        return resolve(*args)

    monkeypatch.setattr(box.fleet, "resolve", watched)

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:20]
        with contextlib.suppress(TimeoutError):  # some routes look at the body first
            async with asyncio.timeout(0.5):
                await resolved.wait()
        await replace(box, name, manifest)
        yield body[20:]

    async with box.http() as http:
        headers = {"content-type": kind} if kind else {}
        response = await http.post(url, content=slowly(), headers=headers)
    assert response.status_code == 200, response.text
    assert (await box.receipt(response.headers["x-request-id"]))["outcome"] == "completed"


async def test_a_request_whose_replica_drains_while_money_is_held(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, hold = box.fleet.targets["doubler"], box.accounts.hold
    old = box.workers["doubler"]
    draining: list[asyncio.Task[None]] = []

    async def held(*args: Any, **more: Any) -> None:
        await hold(*args, **more)
        await box.connect("doubler", TENSOR)
        draining.append(asyncio.create_task(first.link.drain()))
        await asyncio.sleep(0)
        assert first.link.is_draining

    monkeypatch.setattr(box.accounts, "hold", held)
    async with box.http() as http:
        response = await http.post("/models/doubler/predict", json={"inputs": ROWS})
    assert response.status_code == 200, response.text
    assert not [message for message in old.received if isinstance(message, Predict)]
    receipt = await box.receipt(response.headers["x-request-id"])
    assert receipt["outcome"] == "completed"
    first.link.close("was stopped")
    await asyncio.gather(*draining)
    await old.close()


async def test_what_was_read_for_one_program_never_goes_to_another(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs nothing, and nothing stays held."""
    hold, void = box.accounts.hold, box.accounts.void
    voided: list[str] = []
    spec = TensorSpec(name="y", dtype="float32", shape=[None, 3])
    other = msgspec.structs.replace(
        TENSOR, schema=Schema(inputs=[spec], outputs=[spec], is_batched=True)
    )

    async def held(*args: Any, **more: Any) -> None:
        await hold(*args, **more)
        await replace(box, "doubler", other, version_number=4)

    def noted(request_id: str) -> None:
        voided.append(request_id)
        void(request_id)

    monkeypatch.setattr(box.accounts, "hold", held)
    monkeypatch.setattr(box.accounts, "void", noted)
    async with box.http() as http:
        response = await http.post("/models/doubler/predict", json={"inputs": ROWS})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["code"] == "version_replaced"
        assert voided == [response.headers["x-request-id"]]
        assert (await http.get("/api/usage")).json()["rows"] == []
