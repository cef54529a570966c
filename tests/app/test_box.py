"""The whole box as a user meets it: `tapeout serve` as a process of its own, driven through the
command line, the openai SDK and HTTP, and killed where it hurts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import torch
from transformers import LlamaForCausalLM

from runtime.text.tokenizer import Tokenizer
from tests.app.conftest import ADMIN_KEY
from tests.app.traffic import Traffic, compare, differences
from tests.runtime.compiling.paging.decoders import HandWritten, export, masked_fill
from tests.runtime.importing.onnx_files import export_digits_onnx
from tests.runtime.importing.programs import Digits, export_digits
from tests.runtime.peer import make_decoder_artifact, save_tokenizer

TAPEOUT = Path(sys.executable).with_name("tapeout")
START_SECONDS = 60
REST_SECONDS = 6


class Box:
    """One running box with its data directory, and the commands a user would type."""

    def __init__(self, data_dir: Path, database_url: str, **settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.data_dir = data_dir
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60
        )
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=ADMIN_KEY, max_retries=0, timeout=60
        )
        self._environment = (
            os.environ
            | {
                "TAPEOUT_ADMIN_KEY": ADMIN_KEY,
                "TAPEOUT_DATABASE_URL": database_url,
                "TAPEOUT_DATA_DIR": str(data_dir),
                "TAPEOUT_OPTIMISE": "0",
                "TAPEOUT_PORT": str(port),
                "TAPEOUT_WORKER_THREADS": "1",
                "TAPEOUT_BUILD_THREADS": "1",
                "TAPEOUT_KV_CACHE": "32M",
                "TAPEOUT_DRAIN_SECONDS": "20",
                "TAPEOUT_URL": self.url,
                "TAPEOUT_API_KEY": ADMIN_KEY,
            }
            | settings
        )
        self.start()

    def start(self) -> None:
        self.log = (self.data_dir.parent / "serve.log").open("ab")
        self.process = subprocess.Popen(
            [TAPEOUT, "serve"], env=self._environment, stdout=self.log, stderr=self.log
        )
        self.wait(lambda: self.http.get("/readyz").is_success)

    def wait(self, is_so: Any, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the box has ended"
            try:
                if is_so():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError("it did not happen in time")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(40)
        self.log.close()
        return code

    def close(self) -> None:
        self.http.close()
        self.openai.close()
        if self.process.poll() is None:
            self.stop()
        self.log.close()

    def tapeout(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TAPEOUT, *map(str, arguments)],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def is_serving(self, name: str) -> bool:
        version = self.http.get(f"/api/models/{name}").json()["latest_version"]
        return version is not None and version["is_serving"]

    def workers(self) -> list[int]:
        """Process ids of this box's workers."""
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if is_worker(path, self.data_dir)
        ]


def is_worker(path: Path, data_dir: Path) -> bool:
    try:
        command = path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"runtime.worker" in command and bytes(data_dir) in command


@pytest.fixture(scope="module")
def module_database_url(template_database: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SQLite file: what is shown here is the box, not the database."""
    return f"sqlite:///{tmp_path_factory.mktemp('database') / 'box.db'}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_decoder_artifact(tmp_path_factory.mktemp("llama") / "tiny-llama")
    (directory / "program.json").unlink()
    (directory / "receipt.json").unlink()
    return directory


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory, module_database_url: str, llama: Path
) -> Iterator[Box]:
    directory = tmp_path_factory.mktemp("box")
    box = Box(directory / "data", module_database_url)
    try:
        program = export_digits(directory / "digits.pt2")
        for path, name in ((program, "digits"), (llama, "tiny-llama")):
            pushed = box.tapeout("push", path, "--name", name)
            assert pushed.returncode == 0, pushed.stderr
            assert pushed.stdout == f"{box.url}/models/{name}\n"
            assert pushed.stderr.endswith("ready\n")
        yield box
    finally:
        box.close()


def test_a_prediction_equals_the_model(box: Box) -> None:
    program = torch.export.load(box.data_dir.parent / "digits.pt2").module()
    images = torch.rand(5, 1, 8, 8)
    name = box.http.get("/api/models/digits").json()["latest_version"]["manifest"]["schema"]
    field = name["inputs"][0]["name"]
    answer = box.http.post("/models/digits/predict", json={"inputs": {field: images.tolist()}})
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"].values()
    torch.testing.assert_close(torch.tensor(output), program(images), rtol=1e-5, atol=1e-5)


def test_an_onnx_file_is_answered_as_its_model(box: Box, tmp_path: Path) -> None:
    pushed = box.tapeout("push", export_digits_onnx(tmp_path / "m.onnx"), "--name", "digits-onnx")
    assert pushed.returncode == 0, pushed.stderr
    torch.manual_seed(0)
    module, images = Digits().eval(), torch.rand(5, 1, 8, 8)
    body = {"inputs": {"image": images.tolist()}}
    answer = box.http.post("/models/digits-onnx/predict", json=body)
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"].values()
    torch.testing.assert_close(torch.tensor(output), module(images), rtol=1e-5, atol=1e-5)


def test_greedy_tokens_equal_generate_and_a_repeat_is_cached(box: Box, llama: Path) -> None:
    prompt = [(7 * i) % 200 + 4 for i in range(100)]
    model = LlamaForCausalLM.from_pretrained(llama)
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
    usages = []
    for _ in range(2):
        answer = box.http.post(
            "/v1/completions",
            json={
                "model": "tiny-llama",
                "prompt": prompt,
                "max_tokens": 20,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        ).json()
        assert answer["choices"][0]["token_ids"] == expected
        usages.append(answer["usage"])
    assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"] == 100
    assert usages[0]["prompt_tokens_details"]["cached_tokens"] == 0
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == 99


def test_the_books_agree_while_requests_run_and_at_rest(box: Box) -> None:
    with Traffic(box) as traffic:
        for _ in range(3):
            time.sleep(1.0)
            assert differences(compare(box)) == {}
    assert traffic.num_done > 10
    time.sleep(REST_SECONDS)  # until the engines have had their last word
    checks = compare(box)
    assert differences(checks) == {}
    for name in ("output_tokens", "prompt_tokens", "cached_tokens", "requests"):
        check = checks[f"engine_{name}"]
        assert "under way" not in check["note"]
        assert check["left"] == check["right"] > 0
    assert checks["holds"]["left"] == 0
    assert [name for name in checks if checks[name]["skipped"] and "stripe" not in name] == []


def test_a_graph_pushed_with_a_tokenizer_completes_text(box: Box, tmp_path: Path) -> None:
    model = HandWritten(masked_fill, positions="rotary").eval()
    torch.export.save(export(model), tmp_path / "hand-written.pt2")
    (tmp_path / "tokenizer").mkdir()
    save_tokenizer(tmp_path / "tokenizer")
    pushed = box.tapeout(
        *("push", tmp_path / "hand-written.pt2", "--name", "hand-written"),
        *("--tokenizer", tmp_path / "tokenizer"),
    )
    assert pushed.returncode == 0, pushed.stderr
    prompt = "#$%&!"
    answer = box.http.post(
        "/v1/completions",
        json={
            "model": "hand-written",
            "prompt": prompt,
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    ).json()
    tokens = Tokenizer.load(tmp_path / "tokenizer").encode(prompt)
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    with torch.inference_mode():
        for _ in range(8):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert answer["choices"][0]["token_ids"] == tokens[-8:]
    version = box.http.get("/api/models/hand-written").json()["latest_version"]
    assert version["manifest"]["decoder"]["is_paged"]
    assert version["receipt"]["route"] == "Paged by rewriting its graph."
    assert {check["name"] for check in version["receipt"]["checks"]} >= {"partial", "swapped"}


def test_the_openai_sdk_streams_a_chat_with_usage(box: Box) -> None:
    stream = box.openai.chat.completions.create(
        model="tiny-llama",
        messages=[{"role": "user", "content": "Hé, 你好 🙂"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_every_api_for_text_says_the_same(box: Box) -> None:
    recommended = {"is_default": True}
    assert box.http.patch("/api/endpoints/tiny-llama", json=recommended).is_success
    assert box.openai.models.retrieve("default").id == "tiny-llama"
    said: Any = [{"role": "user", "content": "Say it all."}]
    greedy: Any = {"temperature": 0, "ignore_eos": True}
    chat = box.openai.chat.completions.create(
        model="default", messages=said, max_tokens=12, extra_body=greedy
    )
    response = box.openai.responses.create(
        model="default", input="Say it all.", max_output_tokens=12, extra_body=greedy
    )
    with anthropic.Anthropic(base_url=box.url, api_key=ADMIN_KEY, max_retries=0) as claude:
        message = claude.messages.create(
            model="default", messages=said, max_tokens=12, extra_body=greedy
        )
        stop = message.content[0].text[3:6]  # type: ignore[union-attr]
        stopped = claude.messages.create(
            model="default", messages=said, max_tokens=12, stop_sequences=[stop], extra_body=greedy
        )
        counted = claude.messages.count_tokens(model="default", messages=said)
    assert chat.usage is not None
    assert response.usage is not None
    text = chat.choices[0].message.content
    assert text == response.output_text == message.content[0].text  # type: ignore[union-attr]
    num_cached = message.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == message.usage.input_tokens + num_cached
    assert counted.input_tokens == chat.usage.prompt_tokens == response.usage.input_tokens
    assert num_cached == response.usage.input_tokens_details.cached_tokens > 0
    assert chat.usage.completion_tokens == message.usage.output_tokens == 12
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)


ASKED: Any = [{"role": "user", "content": "Where is it?"}]
PLACE: Any = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -99, "maximum": 99},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["x", "kind"],
    "additionalProperties": False,
}


def format_of(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}


def check_place(text: str | None) -> None:
    place = json.loads(text or "")
    assert place.keys() == {"x", "kind"}
    assert isinstance(place["x"], int)
    assert place["x"] <= 99
    assert place["kind"] in ("a", "b")


def test_a_random_model_keeps_to_a_schema(box: Box) -> None:
    answer = box.openai.chat.completions.create(
        model="tiny-llama",
        messages=ASKED,
        response_format=format_of(PLACE),
        temperature=0.7,
        n=2,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        check_place(choice.message.content)


def test_a_random_model_calls_the_tool_it_must(box: Box) -> None:
    tools: Any = [{"type": "function", "function": {"name": "place", "parameters": PLACE}}]
    answer = box.openai.chat.completions.create(
        model="tiny-llama",
        messages=ASKED,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=500,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "place"
    check_place(call.function.arguments)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 200, "the tool is told to the model"
    # The result goes back, and the answer is free.
    said: Any = choice.message.model_dump(exclude_none=True)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    after = box.openai.chat.completions.create(
        model="tiny-llama", messages=[*ASKED, said, result], tools=tools, max_tokens=5
    )
    assert after.choices[0].finish_reason is not None


def test_a_bad_schema_fails_alone(box: Box) -> None:
    stream = box.openai.chat.completions.create(
        model="tiny-llama",
        messages=ASKED,
        max_tokens=300,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    for schema in ({"type": "objec"}, {"type": "string", "pattern": "("}, {"not": {}}):
        with pytest.raises(openai.BadRequestError) as caught:
            box.openai.chat.completions.create(
                model="tiny-llama", messages=ASKED, response_format=format_of(schema)
            )
        assert caught.value.param == "response_format"
    assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == "length"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x04}.", "torch.export.save"),
        (b"not a model at all", "not recognised"),
        (b"", "empty"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_to_do(
    box: Box, tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    pushed = box.tapeout("push", path, "--name", "refused")
    assert pushed.returncode == 1
    assert pushed.stdout == ""
    lines = pushed.stderr.splitlines()
    assert len([line for line in lines if line.startswith("tapeout: ")]) == 1
    assert words in pushed.stderr
    assert "Traceback" not in pushed.stderr


def test_the_listing_commands_show_what_is_there(box: Box) -> None:
    models = box.tapeout("models")
    assert "digits" in models.stdout
    assert "decoder" in models.stdout
    assert "MODEL" in box.tapeout("usage").stdout
    assert "Owed: $" in box.tapeout("usage", "--by", "key").stdout
    assert "input" in box.tapeout("prices").stdout
    assert box.tapeout("logs", "tiny-llama").stdout
    assert box.tapeout("logs", "tiny-llama", "--build").stdout
    secret = box.tapeout("keys", "create", "ci").stdout.strip()
    assert secret.startswith("tp-")
    listing = box.tapeout("keys").stdout
    assert secret not in listing
    (line,) = [line for line in listing.splitlines() if "  ci " in line]
    assert box.tapeout("keys", "revoke", line.split()[0]).returncode == 0
    missing = box.tapeout("logs", "no-such-model")
    assert missing.returncode == 1
    assert "no-such-model" in missing.stderr


def test_a_spending_limit_is_enforced(box: Box) -> None:
    assert box.http.patch("/api/organization", json={"spending_limit": "0"}).is_success
    with pytest.raises(openai.APIStatusError) as caught:
        box.openai.completions.create(model="tiny-llama", prompt="hello", max_tokens=5)
    assert caught.value.status_code == 402
    assert "prepaid balance does not cover" in caught.value.message
    assert box.http.patch("/api/organization", json={"spending_limit": None}).is_success


def long_stream(box: Box) -> Any:
    return box.openai.completions.create(
        model="tiny-llama",
        prompt="hello",
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def test_a_killed_worker_fails_its_requests_at_once_and_comes_back(box: Box) -> None:
    stream = long_stream(box)
    next(iter(stream))
    for pid in filter(is_decoder, box.workers()):
        os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(openai.APIError, match=r"worker|replica|ended|lost"):
        for _ in stream:
            pass
    assert time.monotonic() - started < 5
    box.wait(lambda: box.is_serving("tiny-llama"))
    answer = box.openai.completions.create(model="tiny-llama", prompt="hello", max_tokens=3)
    assert answer.usage is not None


def is_decoder(pid: int) -> bool:
    """Only a decoder's worker has the tokenizer library mapped."""
    return "tokenizers" in Path(f"/proc/{pid}/maps").read_text()


def test_a_killed_box_recovers_what_was_running(box: Box) -> None:
    stream = long_stream(box)
    received = [next(iter(stream)) for _ in range(1)]
    assert received
    box.stop(signal.SIGKILL)
    box.start()
    box.wait(lambda: box.is_serving("tiny-llama"))
    organization = box.http.get("/api/organization").json()
    assert organization["held_nano"] == 0
    assert box.openai.completions.create(model="tiny-llama", prompt="x", max_tokens=2).usage


def test_sigterm_lets_running_requests_finish(box: Box) -> None:
    stream = iter(long_stream(box))
    next(stream)
    box.process.send_signal(signal.SIGTERM)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert box.process.wait(40) == 0
    assert box.workers() == []
