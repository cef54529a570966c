"""Real worker processes over real sockets: start, serve, and every way to end."""

import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.compiling.packaging import PROGRAM_NAME
from runtime.importing import landlock, seccomp
from runtime.importing.exported import load_exported
from runtime.protocol import (
    LENGTH,
    MAX_FRAME_BYTES,
    Cancel,
    ChatMessage,
    Drain,
    Failed,
    Fatal,
    Predict,
    Predicted,
    Serve,
    Start,
    Stats,
    Step,
    encode_frame,
)
from tests.runtime.peer import (
    WorkerProcess,
    generate,
    make_decoder_artifact,
    make_tensor_artifact,
    tensor,
)

Launch = Callable[..., WorkerProcess]


@pytest.fixture(scope="module")
def decoder_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder_artifact(tmp_path_factory.mktemp("decoder") / "artifact")


@pytest.fixture(scope="module")
def tensor_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tensor_artifact(tmp_path_factory.mktemp("tensor") / "artifact")


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started: list[WorkerProcess] = []

    def start(**environment: str) -> WorkerProcess:
        directory = tmp_path / str(len(started))
        directory.mkdir()
        started.append(WorkerProcess(directory, **environment))
        return started[-1]

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, decoder_artifact: Path
) -> Iterator[WorkerProcess]:
    """One decoder's worker for the tests that leave it as it was."""
    worker = WorkerProcess(tmp_path_factory.mktemp("shared"))
    options = {"kv_cache_bytes": 2**22, "block_size": 16}
    worker.serve(decoder_artifact, max_sequences=16, max_batch_tokens=256, **options)
    yield worker
    worker.stop()


PREDICTOR_ENVIRONMENT = {"PYTHONPROFILEIMPORTTIME": "1", "VISIBLE": "yes"}


@pytest.fixture(scope="module")
def predictor(
    tmp_path_factory: pytest.TempPathFactory, tensor_artifact: Path
) -> Iterator[WorkerProcess]:
    """One tensor program's worker, likewise, with every import in its log."""
    worker = WorkerProcess(tmp_path_factory.mktemp("predictor"), **PREDICTOR_ENVIRONMENT)
    worker.serve(tensor_artifact)
    yield worker
    worker.stop()


# --- decoders ---------------------------------------------------------------------------


def test_it_says_what_it_serves_and_how(shared: WorkerProcess) -> None:
    ready = shared.ready
    assert ready is not None
    assert ready.manifest.kind == "decoder"
    assert ready.manifest.decoder is not None
    assert ready.attention
    assert ready.block_size == 16
    assert ready.num_blocks == 2**22 // (16 * ready.manifest.decoder.kv_bytes_per_token)
    assert ready.memory_bytes > 50 * 2**20
    assert "isolation L" in shared.log


def test_it_generates_as_transformers_does(shared: WorkerProcess, decoder_artifact: Path) -> None:
    from transformers import LlamaForCausalLM

    prompt = list(b"a prompt of some length")
    outputs = shared.peer.generate(generate("same", prompt, max_tokens=24))["same"]
    token_ids = [token_id for output in outputs for token_id in output.token_ids]
    model = LlamaForCausalLM.from_pretrained(decoder_artifact, dtype="auto").eval()
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert token_ids == expected[0, len(prompt) :].tolist()
    assert [output.finish_reason for output in outputs[-2:]] == [None, "length"]
    assert all(output.device_ns > 0 for output in outputs)


def test_text_and_chat_prompts(shared: WorkerProcess) -> None:
    text = generate("text", text="hello", max_tokens=4)
    assert shared.peer.prepare(text).num_prompt_tokens == 5
    messages = [ChatMessage(role="user", content="hello")]
    chat = shared.peer.prepare(generate("chat", messages=messages, max_tokens=4))
    assert chat.num_prompt_tokens == len("user: hello\nassistant:")
    for request_id in ("text", "chat"):
        shared.peer.send(Cancel(request_id=request_id))
        failed = shared.peer.receive_until(Failed, lambda f, r=request_id: f.request_id == r)
        assert failed.error.code == "cancelled"


def test_with_little_room_requests_are_swapped_and_answer_the_same(
    launch: Launch, shared: WorkerProcess, decoder_artifact: Path
) -> None:
    assert shared.ready is not None
    assert shared.ready.manifest.decoder is not None
    block_bytes = 8 * shared.ready.manifest.decoder.kv_bytes_per_token
    worker = launch()
    worker.serve(
        decoder_artifact,
        block_size=8,
        kv_cache_bytes=16 * block_bytes,
        swap_bytes=64 * block_bytes,
        poisons_blocks=True,
    )
    requests = [generate(f"r{i}", [2 + i, 3, 4, 5, 6], max_tokens=40) for i in range(6)]
    outputs, expected = worker.peer.generate(*requests), shared.peer.generate(*requests)
    for request_id, steps in expected.items():
        tokens = [id_ for output in steps for id_ in output.token_ids]
        assert [id_ for output in outputs[request_id] for id_ in output.token_ids] == tokens
    stats = worker.peer.receive_until(Stats, lambda each: each.output_tokens == 6 * 40)
    assert stats.preemptions > 0
    assert stats.swapped_blocks > 0
    assert stats.used_blocks == 0


def test_sixteen_at_once_share_their_prefix(shared: WorkerProcess) -> None:
    prompt = list(range(2, 102))
    requests = [generate(f"r{i}", [*prompt, 2 + i], max_tokens=8) for i in range(16)]
    outputs = shared.peer.generate(*requests)
    alone = shared.peer.generate(generate("alone", [*prompt, 2 + 7], max_tokens=8))["alone"]
    assert [o.token_ids for o in outputs["r7"]] == [o.token_ids for o in alone]
    for each in outputs.values():
        assert sum(len(output.token_ids) for output in each) == 8
        assert each[-1].finish_reason == "length"
    assert max(each[0].num_cached_tokens for each in outputs.values()) == 100


def test_choices_end_one_by_one(shared: WorkerProcess) -> None:
    request = generate("n", [5, 6, 7], max_tokens=5, num_choices=3, temperature=1.0, seed=1)
    outputs = shared.peer.generate(request)["n"]
    finished = [output.choice for output in outputs if output.finish_reason]
    assert sorted(finished) == [0, 1, 2]


def test_a_wrong_request_fails_typed_and_alone(shared: WorkerProcess) -> None:
    shared.peer.send(generate("wrong", [5], temperature=-1.0))
    failed = shared.peer.receive_until(Failed)
    assert failed.request_id == "wrong"
    assert failed.error.type == "invalid_request_error"
    assert failed.error.status == 400
    assert shared.peer.generate(generate("right", [5], max_tokens=2))["right"]


def test_cancel_stops_a_running_request_and_is_idempotent(shared: WorkerProcess) -> None:
    shared.peer.send(Cancel(request_id="unknown"))
    shared.peer.prepare(generate("long", [5, 6], max_tokens=3000))
    shared.peer.send(Start(request_id="long"))
    shared.peer.receive_until(Step)
    shared.peer.send(Cancel(request_id="long"), Cancel(request_id="long"))
    num_steps = 0
    while True:
        (output,) = shared.peer.receive_until(Step).outputs
        num_steps += 1
        if output.finish_reason:
            break
    assert output.finish_reason == "abort"
    assert num_steps < 200  # far from what was asked for: the rest was never computed
    stats = shared.peer.receive_until(Stats, lambda s: s.num_running == 0)
    assert stats.used_blocks == 0
    # Nothing more comes of it.
    shared.peer.generate(generate("after", [5], max_tokens=1))
    assert not [m for m in shared.peer.others if isinstance(m, Failed) and m.request_id == "long"]


def test_without_a_tokenizer_it_takes_token_ids(launch: Launch, tmp_path: Path) -> None:
    artifact = make_decoder_artifact(tmp_path / "artifact", has_tokenizer=False)
    worker = launch()
    worker.serve(artifact)
    assert worker.peer.generate(generate("ids", [5, 6], max_tokens=2))["ids"]
    worker.peer.send(generate("text", text="hello"))
    failed = worker.peer.receive_until(Failed)
    assert failed.error.status == 400
    assert "token ids" in failed.error.message


# --- tensor programs --------------------------------------------------------------------


def test_predictions_equal_the_program(predictor: WorkerProcess, tensor_artifact: Path) -> None:
    peer = predictor.peer
    images = torch.rand(20, 1, 8, 8)
    requests = [
        Predict(request_id=f"p{at}", inputs=[tensor("image", images[at : at + 1])])
        for at in range(20)
    ]
    wrong = Predict(request_id="wrong", inputs=[tensor("image", torch.zeros(1, 1, 9, 9))])
    peer.send(*requests, wrong)
    answers: dict[str, Predicted] = {}
    while len(answers) < 20:
        answer = peer.receive_until(Predicted)
        answers[answer.request_id] = answer
    (expected,) = load_exported(tensor_artifact / PROGRAM_NAME).run([images])
    for at in range(20):
        (output,) = answers[f"p{at}"].outputs
        got = np.frombuffer(output.data, np.float32)
        np.testing.assert_allclose(got, expected[at].numpy(), rtol=1e-4, atol=1e-5)
        assert answers[f"p{at}"].device_ns > 0
    assert max(answer.batch_rows for answer in answers.values()) > 1
    failures = [each for each in peer.others if isinstance(each, Failed)]
    failed = failures[0] if failures else peer.receive_until(Failed)
    assert (failed.request_id, failed.error.status) == ("wrong", 400)


# --- the end ----------------------------------------------------------------------------


def test_a_signal_drains_it(launch: Launch, decoder_artifact: Path) -> None:
    worker = launch()
    worker.serve(decoder_artifact)
    peer = worker.peer
    peer.prepare(generate("running", [5, 6], max_tokens=600))
    peer.send(Start(request_id="running"))
    peer.receive_until(Step)
    worker.process.send_signal(signal.SIGTERM)
    while "draining" not in worker.log:
        time.sleep(0.01)
    peer.send(generate("late", [5], max_tokens=1))
    messages = peer.rest()
    (failed,) = [each for each in messages if isinstance(each, Failed)]
    assert failed.request_id == "late"
    assert (failed.error.status, failed.error.code) == (503, "draining")
    outputs = [o for each in messages if isinstance(each, Step) for o in each.outputs]
    assert outputs[-1].finish_reason == "length"
    assert worker.wait() == 0


def test_it_exits_when_its_peer_closes(launch: Launch, decoder_artifact: Path) -> None:
    worker = launch()
    worker.serve(decoder_artifact)
    worker.peer.prepare(generate("running", [5, 6], max_tokens=3000))
    worker.peer.send(Start(request_id="running"))
    worker.peer.receive_until(Step)
    worker.peer.close()
    assert worker.wait() == 0


def test_a_bad_frame_ends_it(launch: Launch, tensor_artifact: Path) -> None:
    worker = launch()
    worker.serve(tensor_artifact)
    worker.peer.connection.sendall(LENGTH.pack(MAX_FRAME_BYTES + 1) + b"junk")
    assert not [each for each in worker.peer.rest() if not isinstance(each, Stats)]
    assert worker.wait() == 1
    assert "closing the stream" in worker.log


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", encode_frame(Drain()), b""])
def test_a_peer_that_does_not_say_what_to_serve(launch: Launch, first: bytes) -> None:
    worker = launch()
    worker.peer.connection.sendall(first)
    worker.peer.connection.shutdown(socket.SHUT_WR)
    assert worker.peer.rest() == []
    assert worker.wait() == 1


def test_what_does_not_load_is_fatal_in_plain_words(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    worker = launch()
    worker.peer.send(Serve(artifact_dir=str(tmp_path / "empty")))
    (fatal,) = worker.peer.rest()
    assert isinstance(fatal, Fatal)
    assert "program.json" in fatal.error.message
    assert worker.wait() == 1


def test_a_cache_that_holds_nothing_is_fatal(launch: Launch, decoder_artifact: Path) -> None:
    worker = launch()
    worker.peer.send(Serve(artifact_dir=str(decoder_artifact), kv_cache_bytes=1000))
    (fatal,) = worker.peer.rest()
    assert isinstance(fatal, Fatal)
    assert fatal.error.code == "cache_too_small"


# --- what it may see --------------------------------------------------------------------


def test_environment_and_imports_are_its_own(predictor: WorkerProcess) -> None:
    environ = Path(f"/proc/{predictor.process.pid}/environ").read_bytes().split(b"\0")
    names = {each.partition(b"=")[0].decode() for each in environ if each}
    assert names == {"PATH", "PYTHONPATH", "OMP_WAIT_POLICY", *PREDICTOR_ENVIRONMENT}
    assert not predictor.socket_path.exists()  # no second peer can come
    imported = {line.rpartition("|")[2].strip() for line in predictor.log.splitlines()}
    assert "torch" in imported
    assert not imported & {"transformers", "tokenizers", "app"}


def test_the_socket_is_private(tmp_path: Path) -> None:
    from runtime.worker import accept_one

    path = tmp_path / "s"
    seen: list[int] = []

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:  # type: ignore[override]
            seen.append(stat.S_IMODE(path.stat().st_mode))
            raise TimeoutError

    original, socket.socket = socket.socket, Listener  # type: ignore[misc]
    try:
        with pytest.raises(TimeoutError):
            accept_one(path)
    finally:
        socket.socket = original  # type: ignore[misc]
    assert seen == [0o600]


@pytest.mark.skipif(
    not (landlock.abi_version() and seccomp.is_supported()),
    reason="the kernel lacks Landlock or seccomp",
)
def test_it_serves_inside_its_sandbox(predictor: WorkerProcess) -> None:
    process = Path(f"/proc/{predictor.process.pid}")
    lines = (process / "status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert fields["Seccomp"] == "2"
    assert fields["NoNewPrivs"] == "1"
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert "isolation L1" in predictor.log


def test_the_log_holds_no_content(shared: WorkerProcess) -> None:
    secret = "the-secret-of-a-caller"
    shared.peer.generate(generate("logged", text=secret, max_tokens=2))
    shared.peer.send(generate("refused", text=secret, max_tokens=2, top_p=7.0))
    shared.peer.receive_until(Failed)
    assert "ready after" in shared.log
    assert secret not in shared.log
