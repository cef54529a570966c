"""Tensor models of a running box, as docs/api-predict.md tells their callers, and as Triton's own
clients call them."""

import asyncio
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from PIL import Image

from tests.app.conftest import ADMIN_KEY
from tests.app.test_box import Box
from tests.runtime.importing.programs import export_digits

DOCUMENT = Path(__file__).parents[2] / "docs" / "api-predict.md"
KEY = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_digits(tmp_path_factory.mktemp("digits") / "digits.pt2")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Iterator[Box]:
    directory = tmp_path_factory.mktemp("box")
    box = Box(directory / "data", f"sqlite:///{directory / 'box.db'}")
    try:
        pushed = box.tapeout("push", digits, "--name", "digits")
        assert pushed.returncode == 0, pushed.stderr
        box.wait(lambda: box.is_serving("digits"))
        yield box
    finally:
        box.close()


def test_the_document_s_examples_run(box: Box, tmp_path: Path) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) > 5
    script = tmp_path / "examples.py"
    script.write_text("\n".join(examples))
    environment = os.environ | {"TAPEOUT_URL": box.url, "TAPEOUT_API_KEY": ADMIN_KEY}
    ran = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    (command,) = re.findall(r"^```sh\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    ran = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert b'"outputs"' in ran.stdout, ran.stderr


def test_an_image_is_the_same_as_its_values(box: Box, digits: Path) -> None:
    """The worker's way from a file to the model's answer, against the model itself."""
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    response = box.http.post(
        "/models/digits/predict", content=file.getvalue(), headers={"content-type": "image/png"}
    )
    assert response.status_code == 200, response.text
    program = torch.export.load(digits).module()
    wanted = program(torch.from_numpy(pixels)[None, None].repeat(2, 1, 1, 1).float() / 255)[0]
    (got,) = response.json()["outputs"]["output"]
    np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)
    torn = box.http.post(
        "/models/digits/predict",
        content=file.getvalue()[:50],
        headers={"content-type": "image/png"},
    )
    assert (torn.status_code, torn.json()["error"]["code"]) == (400, "unreadable_image")


def test_triton_s_clients_run_the_model(box: Box) -> None:
    address = box.url.removeprefix("http://")
    images = np.random.default_rng(2).random((3, 1, 8, 8), dtype="float32")
    wanted = box.http.post("/models/digits/predict", json={"inputs": images.tolist()}).json()
    given = triton.InferInput("image", [3, 1, 8, 8], "FP32").set_data_from_numpy(images)
    with triton.InferenceServerClient(address, concurrency=4) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("digits", "1", headers=dict(KEY))
        (index,) = client.get_model_repository_index(headers=dict(KEY))
        assert (index["name"], index["state"]) == ("digits", "READY")
        waiting = [
            client.async_infer("digits", [given], headers=dict(KEY), model_version="1")
            for _ in range(8)
        ]
        answers = [each.get_result() for each in waiting]

    async def with_aio() -> triton.InferResult:
        async with triton_aio.InferenceServerClient(address) as client:
            return await client.infer("digits", [given], headers=dict(KEY))

    for answer in (*answers, asyncio.run(with_aio())):
        np.testing.assert_allclose(
            answer.as_numpy("output"), wanted["outputs"]["output"], rtol=1e-4, atol=1e-5
        )


def test_the_model_describes_itself(box: Box) -> None:
    document = box.http.get("/models/digits/openapi.json").json()
    operation = document["paths"]["/models/digits/predict"]["post"]
    assert "image/png" in operation["requestBody"]["content"]
    assert document["servers"] == [{"url": box.url}]
    assert "/models/digits/predict" in box.http.get("/models/digits@1/docs").text.replace("@1", "")
    general = box.http.get("/docs").text
    for path in (
        "/v2/models/{name}/infer",
        "/models/{name}/predict",
        "/models/{name}/openapi.json",
    ):
        assert path in general
    missing = box.http.get("/v2/models/absent")
    assert (missing.status_code, type(missing.json()["error"])) == (404, str)
