"""A classifier of texts as a user meets it: its directory pushed from the command line, called
with texts over HTTP, answered with labels, and found again in what was charged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.app.test_box import Box
from tests.runtime.heads import LABELS, TEXT_MODELS, save_head

TEXTS = ["the cat sat on the mat", "a red dog ran fast", "the cat"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classifier") / "rater"
    return save_head(directory, TEXT_MODELS["distilbert"](), has_types=False)


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory, template_database: str, source: Path
) -> Iterator[Box]:
    directory = tmp_path_factory.mktemp("box")
    box = Box(directory / "data", f"sqlite:///{directory / 'box.db'}")
    try:
        pushed = box.tapeout("push", source, "--name", "rater")
        assert pushed.returncode == 0, pushed.stderr
        yield box
    finally:
        box.close()


def expected_logits(source: Path) -> np.ndarray[Any, Any]:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    with torch.inference_mode():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.numpy()


def test_answers_are_those_of_transformers_with_labels(box: Box, source: Path) -> None:
    answer = box.http.post("/models/rater/predict", json={"texts": TEXTS})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    expected = expected_logits(source)
    np.testing.assert_allclose(body["outputs"]["logits"], expected, rtol=0, atol=1e-4)
    shares = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    for row, found in zip(shares, body["labels"], strict=True):
        assert [each["label"] for each in found] == [LABELS[at] for at in np.argsort(-row)]
        np.testing.assert_allclose([each["score"] for each in found], np.sort(row)[::-1], atol=1e-4)
    receipt = box.http.get(f"/v1/receipts/{answer.headers['x-request-id']}").json()
    assert {line["dimension"] for line in receipt["lines"]} >= {"request", "device_ms"}
    assert box.http.get("/api/organization").json()["held_nano"] == 0


def test_token_ids_do_as_well(box: Box) -> None:
    ids = {"input_ids": [[2, 4, 6, 3]], "attention_mask": [[1, 1, 1, 1]]}
    by_ids = box.http.post("/models/rater/predict", json={"inputs": ids}).json()
    by_text = box.http.post("/models/rater/predict", json={"texts": ["the cat"]}).json()
    assert by_ids["labels"] == by_text["labels"]


def test_what_is_too_long_is_refused_by_name(box: Box) -> None:
    answer = box.http.post("/models/rater/predict", json={"texts": ["a", "cat " * 63]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "texts"
    assert "texts[1] has 65 tokens" in error["message"]
    pair = box.http.post("/models/rater/predict", json={"texts": [["a", "b", "c"]]})
    assert pair.status_code == 400


def test_its_build_says_what_was_proved(box: Box) -> None:
    version = box.http.get("/api/models/rater").json()["latest_version"]
    assert version["manifest"]["kind"] == "tensor"
    assert version["manifest"]["labels"] == list(LABELS.values())
    assert version["receipt"]["verdict"] == "equal"
    names = {check["name"] for check in version["receipt"]["checks"]}
    assert names >= {"head, alone", "head, padded", "texts"}
