"""Snippets work as pasted: each one is run, against a server that answers like the box."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.console.snippets import example_value, snippets
from runtime.protocol import Schema, TensorSpec, TextInput
from tests.app.console.samples import DECODER, EMBEDDER, TENSOR

ANSWER = {
    "outputs": {"logits": [[0.5]]},
    "labels": [[{"label": "good", "score": 0.75}]],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 0,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "text": "Hello.",
            "message": {"role": "assistant", "content": "Hello."},
            "finish_reason": "stop",
        }
    ],
}
EMBEDDINGS = {
    "object": "list",
    "model": "m",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}],
    "usage": {"prompt_tokens": 3, "total_tokens": 3},
}
CHUNK = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": "Hello."}, "finish_reason": None}],
}


class Recorder(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Recorder

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        if body.get("stream"):
            kind, answer = "text/event-stream", f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n"
        else:
            answer = EMBEDDINGS if self.path == "/v1/embeddings" else ANSWER
            kind, answer = "application/json", json.dumps(answer)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Recorder]:
    with Recorder() as recorder:
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        yield recorder
        recorder.shutdown()


def run(language: str, text: str) -> str:
    command = ["bash", "-c", text] if language == "curl" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "TAPEOUT_API_KEY": "tp-key"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPLETIONS_ONLY = msgspec.structs.replace(
    DECODER, decoder=msgspec.structs.replace(DECODER.decoder, has_chat_template=False)
)
TOKENS_ONLY = msgspec.structs.replace(
    DECODER,
    decoder=msgspec.structs.replace(DECODER.decoder, has_chat_template=False, has_tokenizer=False),
)


@pytest.mark.parametrize(
    ("manifest", "path"),
    [
        (DECODER, "/v1/chat/completions"),
        (COMPLETIONS_ONLY, "/v1/completions"),
        (TOKENS_ONLY, "/v1/completions"),
    ],
    ids=["chat", "completions", "tokens"],
)
def test_every_snippet_of_a_decoder_runs(server: Recorder, manifest: Any, path: str) -> None:
    pytest.importorskip("openai")
    made = snippets(server.url, "my-model", manifest)
    assert [snippet.language for snippet in made] == ["curl", "openai", "python"]
    for snippet in made:
        assert "Hello." in run(snippet.language, snippet.text)
    for sent_path, authorization, body in server.requests:
        assert (sent_path, authorization, body["model"]) == (path, "Bearer tp-key", "my-model")
    if manifest is TOKENS_ONLY:
        assert server.requests[0][2]["prompt"] == [1, 2, 3]


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_every_snippet_of_an_embedder_runs(server: Recorder, has_tokenizer: bool) -> None:
    pytest.importorskip("openai")
    assert EMBEDDER.embedder is not None
    info = msgspec.structs.replace(EMBEDDER.embedder, has_tokenizer=has_tokenizer)
    made = snippets(server.url, "minilm", msgspec.structs.replace(EMBEDDER, embedder=info))
    assert [snippet.language for snippet in made] == ["curl", "openai", "python"]
    for snippet in made:
        assert "prompt_tokens" in run(snippet.language, snippet.text)
    for path, _, body in server.requests:
        assert (path, body["model"]) == ("/v1/embeddings", "minilm")
        assert isinstance(body["input"][0], str) == has_tokenizer


def test_every_snippet_of_a_tensor_program_sends_a_valid_input(server: Recorder) -> None:
    for snippet in snippets(server.url, "digits", TENSOR):
        assert "0.5" in run(snippet.language, snippet.text)
    zeros = [[[[0.0] * 8] * 8]]
    assert [body for _, _, body in server.requests] == [{"inputs": {"images": zeros}}] * 2
    assert {path for path, _, _ in server.requests} == {"/models/digits/predict"}


@pytest.mark.parametrize(
    ("labels", "axes", "printed", "is_pair"),
    [
        (["bad", "good"], 2, "'good'", False),
        (["name", "none"], 3, "0.5", False),  # of tokens: no row has a label of its own
        ([], 2, "0.5", True),
    ],
    ids=["classifier", "tokens", "ranker"],
)
def test_every_snippet_of_a_model_of_texts_sends_texts(
    server: Recorder, labels: list[str], axes: int, printed: str, is_pair: bool
) -> None:
    inputs = [TensorSpec(name="input_ids", dtype="int64", shape=[None, None])]
    outputs = [TensorSpec(name="logits", dtype="float32", shape=[None] * axes)]
    manifest = msgspec.structs.replace(
        TENSOR,
        schema=Schema(inputs=inputs, outputs=outputs, is_batched=True),
        text=TextInput(max_tokens=64, takes_pairs=True, token_ids="input_ids"),
        labels=labels,
    )
    made = snippets(server.url, "rater", manifest)
    assert [snippet.language for snippet in made] == ["curl", "python"]
    assert printed in run("python", made[1].text)
    assert "0.5" in run("curl", made[0].text)
    for path, _, body in server.requests:
        assert path == "/models/rater/predict"
        assert list(body) == ["texts"]
        assert all(len(row) == 2 if is_pair else isinstance(row, str) for row in body["texts"])


def test_a_large_input_is_made_rather_than_written_out(server: Recorder) -> None:
    schema = Schema(
        inputs=[
            TensorSpec(name="it's an image", dtype="float32", shape=[None, 3, 224, 224]),
            TensorSpec(name="mask", dtype="bool", shape=[]),
        ],
        outputs=[],
        is_batched=False,
    )
    made = snippets(server.url, "flowers", msgspec.structs.replace(TENSOR, schema=schema))
    for snippet in made:
        assert len(snippet.text) < 1000
        run(snippet.language, snippet.text)
    for _, _, body in server.requests:
        assert len(body["inputs"]["it's an image"][0][2]) == 224
        assert body["inputs"]["mask"] is False


def test_an_example_respects_the_least_size_of_a_dynamic_axis() -> None:
    spec = TensorSpec(name="x", dtype="int64", shape=[None, 2], min_shape=[3, 2])
    assert example_value(spec) == [[0, 0]] * 3
