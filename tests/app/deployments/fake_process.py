"""A worker or build that follows a script: speaks the real protocol without a model.

Run as `python fake_process.py ROLE SOCKET SCRIPT_JSON`. A worker answers `Generate` with counting
tokens, `Embed` with counts and `Predict` with its inputs; the script makes it fail, lie, hang or
die on cue.
"""

import json
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from runtime.protocol import (
    LENGTH,
    BuildFailed,
    BuildReceipt,
    Built,
    Cancel,
    CandidateReport,
    DecoderInfo,
    Drain,
    Embed,
    Embedded,
    EmbedderInfo,
    Failed,
    Fatal,
    Generate,
    Manifest,
    Optimise,
    Optimised,
    Predict,
    Predicted,
    Prepared,
    Progress,
    Ready,
    Schema,
    SequenceOutput,
    Serve,
    Start,
    Stats,
    Step,
    TensorSpec,
    ToBuild,
    ToWorker,
    WireError,
    encode_frame,
)

DECODER = Manifest(
    kind="decoder",
    format="huggingface",
    num_parameters=1000,
    weight_bytes=4000,
    decoder=DecoderInfo(
        architecture="fake",
        vocab_size=1000,
        max_context_tokens=512,
        num_layers=1,
        kv_bytes_per_token=4,
        dtype="float32",
        has_tokenizer=True,
        has_chat_template=True,
        template_tokens=8,
        template_tokens_per_message=8,
    ),
)
TENSOR = Manifest(
    kind="tensor",
    format="pt2",
    num_parameters=10,
    weight_bytes=40,
    schema=Schema(
        inputs=[TensorSpec(name="x", dtype="float32", shape=[None, 2])],
        outputs=[TensorSpec(name="x", dtype="float32", shape=[None, 2])],
        is_batched=True,
    ),
)
EMBEDDER = Manifest(
    kind="embedder",
    format="huggingface",
    num_parameters=1000,
    weight_bytes=4000,
    embedder=EmbedderInfo(
        architecture="fake",
        dimensions=2,
        vocab_size=1000,
        max_tokens=16,
        dtype="float32",
        pooling="mean",
        is_normalized=True,
        special_tokens=2,
    ),
)
MANIFESTS = {"decoder": DECODER, "tensor": TENSOR, "embedder": EMBEDDER}
RECEIPT = BuildReceipt(
    verdict="equal",
    checks=[],
    candidates=[],
    phase_seconds={"import": 0.5},
    torch_version="2.13.0",
    device="cpu",
)


def say(*words: object) -> None:
    """Onto the captured output."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


class Wire:
    """Blocking frames over the accepted connection."""

    def __init__(self, path: str) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        self.connection, _ = listener.accept()

    def receive(self, of: Any) -> Any:
        prefix = self._exactly(LENGTH.size)
        return msgspec.msgpack.decode(self._exactly(LENGTH.unpack(prefix)[0]), type=of)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.connection.recv(size - len(data))
            if not chunk:
                sys.exit(0)
            data += chunk
        return data

    def send(self, *messages: Any) -> None:
        self.connection.sendall(b"".join(encode_frame(message) for message in messages))


def worker(path: str, script: dict[str, Any]) -> None:
    if script.get("no_socket"):
        time.sleep(60)
    wire = Wire(path)
    serve = wire.receive(Serve)
    say("serving", serve.artifact_dir)
    report = script.get("report")
    if report:
        surroundings(Path(report))
    manifest = served_manifest(serve, script)
    if script.get("fatal") or Path(serve.artifact_dir, "broken").exists():
        error = WireError(type="server_error", message="The weights are damaged.", code="damaged")
        wire.send(Fatal(error=error))
        return
    if script.get("never_ready"):
        time.sleep(60)
    if script.get("exit"):
        say("about to fail")
        sys.exit(script["exit"])
    wire.send(Ready(manifest=manifest, memory_bytes=1234))
    requests: dict[str, Generate | Embed] = {}
    while True:
        message = wire.receive(ToWorker)
        match message:
            case Generate():
                if message.text == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if message.text == "refuse":
                    error = WireError(
                        type="invalid_request_error", message="no\x1b[31m", code="bad", param="text"
                    )
                    wire.send(Failed(request_id=message.request_id, error=error))
                    continue
                if message.text == "silent":
                    continue
                requests[message.request_id] = message
                count = len(message.token_ids or message.text or "x")
                count = script.get("num_prompt_tokens", count)
                wire.send(
                    Prepared(
                        request_id=message.request_id,
                        num_prompt_tokens=count,
                        max_tokens=message.sampling.max_tokens,
                    )
                )
            case Embed():
                requests[message.request_id] = message
                count = sum(num_tokens(message))
                wire.send(
                    Prepared(request_id=message.request_id, num_prompt_tokens=count, max_tokens=0)
                )
            case Start():
                request = requests.pop(message.request_id)
                if isinstance(request, Embed):
                    embed(wire, request, script)
                else:
                    generate(wire, request, script)
            case Cancel():
                requests.pop(message.request_id, None)
            case Predict():
                if script.get("die_on_predict"):
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(script.get("seconds", 0))
                device_ns = script.get("device_ns", 1000)
                wire.send(
                    Predicted(
                        request_id=message.request_id,
                        outputs=message.inputs if not script.get("bad_output") else [],
                        device_ns=device_ns,
                        batch_rows=1,
                        queue_ns=0,
                    ),
                    Stats(requests=1),
                )
            case Drain():
                if script.get("ignore_drain"):
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    time.sleep(60)
                return
            case _:
                raise AssertionError(message)


def served_manifest(serve: Serve, script: dict[str, Any]) -> Manifest:
    """The artifact's, in the form that it was optimised to; eager where `only_eager` says so."""
    manifest = MANIFESTS[script.get("kind", "decoder")]
    stored = Path(serve.artifact_dir, "program.json")
    if stored.exists() and not script.get("only_eager"):
        built = msgspec.json.decode(stored.read_bytes(), type=Manifest)
        manifest = msgspec.structs.replace(manifest, form=built.form, environment=built.environment)
    return manifest


def num_tokens(request: Embed) -> list[int]:
    if request.token_ids is not None:
        return [len(ids) for ids in request.token_ids]
    return [len(text) for text in request.texts or []]


def embed(wire: Wire, request: Embed, script: dict[str, Any]) -> None:
    """Each vector is (number of tokens, 1)."""
    counts = num_tokens(request)
    values = [value for count in counts for value in (float(count), 1.0)]
    wire.send(
        Embedded(
            request_id=request.request_id,
            dimensions=2,
            data=struct.pack(f"<{len(values)}f", *values),
            num_tokens=counts,
            device_ns=script.get("device_ns", 1000),
        )
    )


def generate(wire: Wire, request: Generate, script: dict[str, Any]) -> None:
    lie = script.get("lie")
    if lie == "garbage":
        wire.connection.sendall(b"\xff" * 64)
        time.sleep(60)
    num_tokens = request.sampling.max_tokens
    for number in range(num_tokens):
        time.sleep(script.get("seconds", 0))
        if script.get("die_after") == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if script.get("fail_after") == number:
            error = WireError(type="server_error", message="It broke.", code="broke", status=500)
            wire.send(Failed(request_id=request.request_id, error=error))
            return
        is_last = number == num_tokens - 1
        output = SequenceOutput(
            request_id="nobody" if lie == "unknown_id" else request.request_id,
            choice=7 if lie == "choice" else 0,
            token_ids=[5000 if lie == "vocabulary" else number],
            text=f"{number} ",
            num_cached_tokens=10_000 if lie == "cached" else 0,
            device_ns=10**12 if lie == "device_time" else 1000,
            finish_reason="length" if is_last and lie != "too_many" else None,
        )
        wire.send(Step(outputs=[output]))
    if lie == "too_many":
        wire.send(Step(outputs=[output]))
        time.sleep(60)


def build(path: str, script: dict[str, Any]) -> None:
    wire = Wire(path)
    message = wire.receive(ToBuild)
    if isinstance(message, Optimise):
        optimise(wire, message, {**script, **script.get("optimise", {})})
        return
    output = Path(message.output_dir)
    say("building", message.upload_path)
    wire.send(Progress(phase="import", fraction=0.25, detail="reading"))
    wire.send(Progress(phase="prove", fraction=0.1, detail="bad\x00\x1b[1m detail"))
    if script.get("signal"):
        os.kill(os.getpid(), script["signal"])
    if script.get("exit"):
        say("it did not work")
        sys.exit(script["exit"])
    if script.get("hog"):
        block = bytearray(script["hog"])
        block[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(block[:: os.sysconf("SC_PAGE_SIZE")])
        time.sleep(60)
    if script.get("child"):
        child = os.fork()
        if not child:
            time.sleep(600)
        partial = Path(script["child"]).with_suffix(".partial")
        partial.write_text(str(child))
        partial.rename(script["child"])  # whoever waits for the file finds it whole
    time.sleep(script.get("seconds", 0))
    if script.get("refuse") or Path(message.upload_path).read_bytes() == b"refuse":
        error = WireError(type="invalid_request_error", message="Export it again.", code="stale")
        wire.send(BuildFailed(error=error))
        return
    if script.get("garbage"):
        wire.connection.sendall(b"\xff\xff\xff\xffgarbage")
        time.sleep(60)
    (output / "sub").mkdir()
    manifest = MANIFESTS[script.get("kind", "decoder")]
    (output / "program.json").write_bytes(msgspec.json.encode(manifest))
    (output / "sub" / "weights").write_bytes(Path(message.upload_path).read_bytes())
    if script.get("link"):
        (output / "link").symlink_to("/etc/passwd")
    if Path(message.upload_path).read_bytes() == b"broken":
        (output / "broken").touch()
    receipt = RECEIPT
    if script.get("verdict"):
        receipt = msgspec.structs.replace(receipt, verdict=script["verdict"])
    wire.send(Progress(phase="package", fraction=1.0), Built(manifest=manifest, receipt=receipt))


def optimise(wire: Wire, message: Optimise, script: dict[str, Any]) -> None:
    """Chooses `form`; the process's own id tells results apart."""
    artifact, output = Path(message.artifact_dir), Path(message.output_dir)
    form = script.get("form", "quick")
    say("optimising", sorted(path.name for path in artifact.iterdir()), message.accepts_loss)
    wire.send(Progress(phase="measure", fraction=0.5, detail=form))
    if script.get("signal"):
        os.kill(os.getpid(), script["signal"])
    time.sleep(script.get("seconds", 0))
    if script.get("refuse"):
        error = WireError(type="server_error", message="Nothing could be measured.", code="none")
        wire.send(BuildFailed(error=error))
        return
    manifest = msgspec.json.decode((artifact / "program.json").read_bytes(), type=Manifest)
    manifest = msgspec.structs.replace(
        manifest, form=form, environment="" if form == "eager" else "here"
    )
    if script.get("bad_manifest"):
        manifest = msgspec.structs.replace(manifest, num_parameters=7)
    receipt = msgspec.structs.replace(
        RECEIPT,
        candidates=[
            CandidateReport(
                name=name,
                is_chosen=name == form,
                reason="measured",
                fate="chosen" if name == form else "slower",
                p50_ms={1: milliseconds, 8: 8 * milliseconds},
            )
            for name, milliseconds in (("eager", 1.0), ("quick", 0.5))
        ],
    )
    if script.get("fate"):
        slow = CandidateReport(name="slow", is_chosen=False, reason="", fate=script["fate"])
        receipt = msgspec.structs.replace(receipt, candidates=[*receipt.candidates, slow])
    (output / "program.json").write_bytes(msgspec.json.encode(manifest))
    (output / "made_by").write_text(str(os.getpid()))
    if script.get("broken"):
        (output / "broken").touch()
    wire.send(Optimised(manifest=manifest, receipt=receipt))


def surroundings(path: Path) -> None:
    """Everything this process can see of the app that started it."""
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
    path.write_text(
        json.dumps(
            {
                "environment": dict(os.environ),
                "descriptors": descriptors,
                "session": os.getsid(0),
                "group": os.getpgid(0),
                "pid": os.getpid(),
                "parent_session": os.getsid(os.getppid()),
                "cwd": os.getcwd(),
            }
        )
    )


if __name__ == "__main__":
    role, path, script_text = sys.argv[1:]
    {"worker": worker, "build": build}[role](path, json.loads(script_text))
