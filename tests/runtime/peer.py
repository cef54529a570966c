"""A small blocking peer of worker processes, and artifacts for them to serve."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from runtime.compiling.packaging import PROGRAM_NAME, write_manifest
from runtime.importing.exported import load_exported
from runtime.protocol import (
    LENGTH,
    BuildReceipt,
    FromWorker,
    Generate,
    Manifest,
    Message,
    Prepared,
    Ready,
    SamplingParams,
    SequenceOutput,
    Serve,
    Start,
    Step,
    Tensor,
    encode_frame,
)
from tests.runtime.importing.programs import export_digits

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 260
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
M = TypeVar("M", bound=Message)

_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class Peer:
    """One end of a stream. Messages that a call was not waiting for are kept in `others`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.others: list[Message] = []
        connection.settimeout(60)

    def send(self, *messages: Message) -> None:
        self.connection.sendall(b"".join(map(encode_frame, messages)))

    def receive(self) -> Message | None:
        """The next message; None at the end of the stream."""
        prefix = self._read(LENGTH.size)
        if len(prefix) < LENGTH.size:
            return None
        return _decoder.decode(self._read(LENGTH.unpack(prefix)[0]))

    def receive_until(self, kind: type[M], accept: Callable[[M], bool] = lambda _: True) -> M:
        while (message := self.receive()) is not None:
            if isinstance(message, kind) and accept(message):
                return message
            self.others.append(message)
        raise AssertionError(f"the stream ended before a {kind.__name__}; got {self.others}")

    def rest(self) -> list[Message]:
        """Everything up to the end of the stream."""
        messages: list[Message] = []
        try:
            while (message := self.receive()) is not None:
                messages.append(message)
        except ConnectionResetError:
            pass
        return messages

    def prepare(self, generate: Generate) -> Prepared:
        self.send(generate)
        return self.receive_until(Prepared, lambda each: each.request_id == generate.request_id)

    def generate(self, *requests: Generate) -> dict[str, list[SequenceOutput]]:
        """Prepare, start and follow requests to the end of all their choices."""
        for request in requests:
            self.prepare(request)
            self.send(Start(request_id=request.request_id))
        outputs: dict[str, list[SequenceOutput]] = {each.request_id: [] for each in requests}
        num_left = sum(request.num_choices for request in requests)
        kept = [each for each in self.others if isinstance(each, Step)]
        self.others = [each for each in self.others if not isinstance(each, Step)]
        while num_left:
            step = kept.pop(0) if kept else self.receive_until(Step)
            for output in step.outputs:
                outputs[output.request_id].append(output)
                num_left -= output.finish_reason is not None
        return outputs

    def close(self) -> None:
        self.connection.close()

    def _read(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes and (chunk := self.connection.recv(num_bytes - len(data))):
            data += chunk
        return data


class WorkerProcess:
    """A real `python -m runtime.worker` with an environment of its own, connected."""

    def __init__(self, directory: Path, **environment: str) -> None:
        self.socket_path = directory / "s"
        self.log_path = directory / "log"
        self.ready: Ready | None = None
        allowed = {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "runtime.worker", "--socket", str(self.socket_path)],
                cwd=directory,
                env=allowed | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.peer = Peer(self._connect())

    def serve(self, artifact_dir: Path, **options: object) -> Ready:
        serve = msgspec.convert({"artifact_dir": str(artifact_dir), **options}, Serve)
        self.peer.send(msgspec.structs.replace(serve, num_threads=1))
        message = self.peer.receive()
        assert isinstance(message, Ready), f"{message}\n{self.log}"
        self.ready = message
        return message

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait(self) -> int:
        return self.process.wait(timeout=30)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.peer.close()

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + 30
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(self.socket_path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                assert self.process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.01)
            else:
                return connection


def generate(request_id: str, token_ids: list[int] | None = None, **options: object) -> Generate:
    """A greedy request that runs to its `max_tokens`; sampling fields may be overridden."""
    fields = {"temperature": 0.0, "ignore_eos": True}
    for name in list(options):
        if name in SamplingParams.__struct_fields__:
            fields[name] = options.pop(name)  # type: ignore[assignment]
    return Generate(
        request_id=request_id,
        sampling=SamplingParams(**fields),  # type: ignore[arg-type]
        cache_salt=b"organization",
        token_ids=token_ids,
        **options,  # type: ignore[arg-type]
    )


def tensor(name: str, values: torch.Tensor) -> Tensor:
    return Tensor(
        name=name,
        dtype=str(values.dtype).removeprefix("torch."),
        shape=list(values.shape),
        data=values.contiguous().numpy().tobytes(),
    )


RECEIPT = BuildReceipt(
    verdict="equal",
    checks=[],
    candidates=[],
    phase_seconds={},
    torch_version=str(torch.__version__),
    device="cpu",
)


def make_tensor_artifact(directory: Path) -> Path:
    """A small CNN: 8x8 images to ten logits, rows batched."""
    directory.mkdir()
    model = load_exported(export_digits(directory / PROGRAM_NAME))
    manifest = Manifest(
        kind="tensor",
        format="pt2",
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        schema=model.schema,
    )
    write_manifest(directory, manifest, RECEIPT)
    return directory


def make_decoder_artifact(directory: Path, *, has_tokenizer: bool = True) -> Path:
    """A random Llama of two layers, in float32, with one token per byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from runtime.importing.huggingface import load_decoder

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    if has_tokenizer:
        save_tokenizer(directory)
    model = load_decoder(directory)
    parameters = list(model.module.parameters())
    manifest = Manifest(
        kind="decoder",
        format="huggingface",
        num_parameters=sum(each.numel() for each in parameters),
        weight_bytes=sum(each.nbytes for each in parameters),
        decoder=model.info,
    )
    write_manifest(directory, manifest, RECEIPT)
    return directory


def save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: at for at, piece in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_bytes(msgspec.json.encode(settings))
