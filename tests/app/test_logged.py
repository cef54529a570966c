"""What a box writes about a billed call, an upload and a fault: that they happened, and nothing of
what was sent or answered."""

import json
import shutil
import sqlite3
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.app.conftest import ADMIN_KEY
from tests.app.test_box import Box
from tests.runtime.peer import make_decoder_artifact

PROMPT, COMPLETION = "mandrake-in-the-prompt", "nightshade-in-the-answer"
FILE_NAME, FAULT = "belladonna-in-the-name", "wolfsbane-in-the-row"
FIELDS = {"time", "level", "logger", "request_id", "message"}
SECRETS = (PROMPT, COMPLETION, FILE_NAME, FAULT, ADMIN_KEY)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    url = f"sqlite:///{tmp_path / 'box.db'}"
    box = Box(tmp_path / "data", url, TAPEOUT_LOG_FORMAT="json", TAPEOUT_LOG_LEVEL="DEBUG")
    try:
        yield box
    finally:
        box.close()


def _push(box: Box, tmp_path: Path) -> None:
    made = make_decoder_artifact(tmp_path / "tiny")
    (made / "program.json").unlink()
    (made / "receipt.json").unlink()
    named = tmp_path / FILE_NAME
    shutil.move(made, named)
    pushed = box.tapeout("push", named, "--name", "tiny")
    assert pushed.returncode == 0, pushed.stderr
    version = box.http.get("/api/models/tiny").json()["latest_version"]
    assert FILE_NAME in version["filename"]


def _call(box: Box) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": COMPLETION}}}
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": PROMPT}],
        "response_format": schema,
        "max_tokens": 200,
    }
    answer = box.http.post("/v1/chat/completions", json=asked)
    assert COMPLETION in answer.json()["choices"][0]["message"]["content"]
    receipt = box.http.get(f"/v1/receipts/{answer.headers['x-request-id']}")
    assert receipt.is_success, receipt.text
    refused = box.http.post("/v1/chat/completions", json=asked | {"messages": PROMPT})
    assert refused.status_code == 400


def _fail(box: Box, database: Path) -> None:
    """By rows that the code cannot read, and by a table that is gone."""
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE model_version SET created_at = ?", [FAULT])
        connection.execute("ALTER TABLE upload RENAME TO elsewhere")
    connection.close()
    assert box.http.get("/api/models/tiny").status_code == 500
    begun = box.http.post(
        "/api/uploads",
        headers={
            "Tus-Resumable": "1.0.0",
            "Upload-Length": "4",
            "Upload-Metadata": "filename " + _base64(f"{FILE_NAME}.pt2"),
        },
    )
    assert begun.status_code == 500, begun.text


def _base64(text: str) -> str:
    return b64encode(text.encode()).decode()


@pytest.mark.slow
def test_nothing_of_what_customers_send_is_logged(box: Box, tmp_path: Path) -> None:
    _push(box, tmp_path)
    _call(box)
    _fail(box, tmp_path / "box.db")
    box.stop()
    text = (tmp_path / "serve.log").read_text()
    assert [secret for secret in SECRETS if secret in text] == []
    lines = [json.loads(line) for line in text.splitlines()]
    assert all(line.keys() >= FIELDS for line in lines)
    faults = {line["message"].partition(" at ")[2]: line.get("error", "") for line in lines}
    assert "ValueError" in faults["GET /api/models/{name}"]
    assert "no such table" in faults["POST /api/uploads"]
