"""An embedder as a user meets it: pushed from the command line, called with the openai SDK, and
found again in the usage and on its page."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import sentence_transformers

from tests.app.test_box import REST_SECONDS, Box
from tests.app.traffic import compare, differences
from tests.runtime.embedders import save_embedder, write_json

TEXTS = ["the cat sat on the mat", "a red dog ran fast", "the cat"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_embedder(tmp_path_factory.mktemp("embedder") / "tiny-bert")
    write_json(directory / "tokenizer_config.json", {"pad_token": "[PAD]", "model_max_length": 64})
    return directory


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory, template_database: str, source: Path
) -> Iterator[Box]:
    directory = tmp_path_factory.mktemp("box")
    box = Box(directory / "data", f"sqlite:///{directory / 'box.db'}")
    try:
        pushed = box.tapeout("push", source, "--name", "tiny-bert")
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout == f"{box.url}/models/tiny-bert\n"
        yield box
    finally:
        box.close()


def test_vectors_are_those_of_sentence_transformers(box: Box, source: Path) -> None:
    expected = sentence_transformers.SentenceTransformer(str(source), device="cpu").encode(TEXTS)
    answer = box.openai.embeddings.create(model="tiny-bert", input=TEXTS)
    found = np.array([item.embedding for item in answer.data])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 8 + 7 + 4
    one = box.openai.embeddings.create(
        model="tiny-bert", input=[2, 4, 6, 3], encoding_format="float"
    )
    np.testing.assert_allclose(one.data[0].embedding, expected[2], rtol=0, atol=1e-5)
    assert "tiny-bert" in {model.id for model in box.openai.models.list()}


def test_its_build_says_what_was_proved(box: Box) -> None:
    version = box.http.get("/api/models/tiny-bert").json()["latest_version"]
    assert version["manifest"]["kind"] == "embedder"
    assert version["manifest"]["embedder"]["batching"] == "padded"
    assert version["receipt"]["verdict"] == "equal"
    assert len(version["receipt"]["checks"]) == 3


def test_what_is_too_long_is_refused_by_name(box: Box) -> None:
    with pytest.raises(openai.BadRequestError, match=r"input\[1\] has 65 tokens") as caught:
        box.openai.embeddings.create(model="tiny-bert", input=["a", "cat " * 63])
    assert caught.value.param == "input"
    assert caught.value.code == "context_length_exceeded"


def test_usage_is_billed_by_the_token(box: Box) -> None:
    raw = box.openai.embeddings.with_raw_response.create(model="tiny-bert", input=["a cat"] * 3)
    receipt = box.http.get(f"/v1/receipts/{raw.headers['x-request-id']}").json()
    lines = {line["dimension"]: line for line in receipt["lines"]}
    assert lines["input"]["quantity"] == 3 * 4
    assert (lines["input"]["disposition"], lines["device_ms"]["disposition"]) == ("billed", "free")
    assert receipt["amount_nano"] == 3 * 4 * 100 + 100
    assert box.http.get("/api/organization").json()["held_nano"] == 0


def test_the_engine_has_counted_what_was_metered(box: Box) -> None:
    time.sleep(REST_SECONDS)  # until it has had its last word
    checks = compare(box)
    assert differences(checks) == {}
    tokens = checks["engine_prompt_tokens"]
    assert tokens["left"] == tokens["right"] > 0
    assert "under way" not in tokens["note"]
