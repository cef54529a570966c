"""Models whose files do not say what they take, from push to answer, on a real box."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.app.test_box import Box
from tests.runtime.importing.programs import BATCH, Digits, export
from tests.runtime.importing.torchscript.modules import Looped, save_scripted, save_traced


@pytest.fixture(scope="module")
def box(template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    directory = tmp_path_factory.mktemp("box")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAPEOUT_OPTIMISE", "0")
        box = Box(directory / "data", f"sqlite:///{directory / 'box.db'}")
    try:
        yield box
    finally:
        box.close()


def follow(box: Box, name: str, number: int) -> dict[str, Any]:
    def is_over() -> bool:
        state = box.http.get(f"/api/models/{name}/versions/{number}").json()
        return state["status"] == "failed" or state["is_serving"]

    box.wait(is_over)
    return box.http.get(f"/api/models/{name}/versions/{number}").json()


def predict(box: Box, name: str, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    body = {"inputs": {key: tensor.tolist() for key, tensor in inputs.items()}}
    answer = box.http.post(f"/models/{name}/predict", json=body)
    assert answer.status_code == 200, answer.text
    return {key: torch.tensor(value) for key, value in answer.json()["outputs"].items()}


def test_a_build_asks_for_inputs_and_remembers_them(box: Box, tmp_path: Path) -> None:
    module, images = Digits().eval(), torch.rand(3, 1, 8, 8)
    path = save_traced(tmp_path / "traced.pt", module, torch.rand(2, 1, 8, 8))
    pushed = box.tapeout("push", path, "--name", "traced")
    assert pushed.returncode == 1
    assert "image: float32[batch, 1, 224, 224]" in pushed.stderr
    assert "--inputs" in pushed.stderr
    first = follow(box, "traced", 1)
    assert first["error"]["code"] == "needs_inputs"

    url = "/api/models/traced/versions"
    wrong = {"upload_id": first["upload_id"], "inputs": "image: float[batch, 1, 8, 8]"}
    refused = box.http.post(url, json=wrong)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "inputs"
    right = {"upload_id": first["upload_id"], "inputs": "image: float32[batch, 1, 8, 8] in 0..1"}
    assert box.http.post(url, json=right).status_code == 202
    second = follow(box, "traced", 2)
    assert second["status"] == "ready", second["error"]
    assert second["manifest"]["format"] == "pt2"
    assert second["inputs"] == right["inputs"]
    expected = module(images)
    torch.testing.assert_close(predict(box, "traced", image=images)["output"], expected)

    # The next version is told nothing, and sent as a form.
    with path.open("rb") as file:
        form = {"accepts_loss": "true"}
        sent = box.http.post(url, files={"file": ("traced.pt", file)}, data=form)
    assert sent.status_code == 202, sent.text
    third = follow(box, "traced", 3)
    assert third["status"] == "ready", third["error"]
    assert third["inputs"] == right["inputs"]
    assert third["accepts_loss"]
    assert third["manifest"]["accepts_loss"]


def test_a_module_that_cannot_be_converted_answers_as_it_is(box: Box, tmp_path: Path) -> None:
    module, x = Looped().eval(), torch.rand(3, 4)
    path = save_scripted(tmp_path / "looped.pt", module)
    inputs = ("--inputs", "x: float32[batch, 4]")
    pushed = box.tapeout("push", path, "--name", "looped", *inputs)
    assert pushed.returncode == 0, pushed.stderr
    assert follow(box, "looped", 1)["manifest"]["format"] == "torchscript"
    torch.testing.assert_close(predict(box, "looped", x=x)["output"], module(x))


class Nested(nn.Module):
    """A dict and a tuple in, a dict with a tuple out."""

    def forward(
        self, named: dict[str, torch.Tensor], pair: tuple[torch.Tensor, torch.Tensor]
    ) -> dict[str, Any]:
        total = named["left"] + named["right"] * pair[0]
        return {"total": total, "parts": (total - pair[1], total.sum(1))}


def test_nested_arguments_are_predicted_by_name(box: Box, tmp_path: Path) -> None:
    module, x = Nested().eval(), torch.rand(4, 2, 4)
    dynamic = {"named": {"left": BATCH, "right": BATCH}, "pair": (BATCH, BATCH)}
    path = tmp_path / "nested.pt2"
    export(path, module, {"left": x[0], "right": x[1]}, (x[2], x[3]), dynamic=dynamic)
    pushed = box.tapeout("push", path, "--name", "nested")
    assert pushed.returncode == 0, pushed.stderr
    left, right, first, second = torch.rand(4, 3, 4)
    answer = predict(box, "nested", named_left=left, named_right=right, pair_0=first, pair_1=second)
    expected = module({"left": left, "right": right}, (first, second))
    assert list(answer) == ["total", "parts_0", "parts_1"]
    torch.testing.assert_close(answer["total"], expected["total"])
    torch.testing.assert_close(answer["parts_0"], expected["parts"][0])
    torch.testing.assert_close(answer["parts_1"], expected["parts"][1])
