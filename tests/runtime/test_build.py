"""Real build processes over real sockets: what they answer, write and leave behind."""

import io
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from runtime.compiling.packaging import read_manifest, read_receipt
from runtime.importing.exported import load_exported
from runtime.protocol import (
    LENGTH,
    Build,
    BuildFailed,
    BuildHints,
    Built,
    FromBuild,
    Message,
    Progress,
    encode_frame,
)
from tests.runtime.importing.programs import (
    Counting,
    Digits,
    MinusBatchMean,
    export,
    export_digits,
)
from tests.runtime.peer import make_decoder_artifact

PHASES = ["unpack", "import", "prove", "measure", "package"]


class BuildProcess:
    """A started build and the stream to it."""

    def __init__(self, directory: Path) -> None:
        self.output_dir = directory / "artifact"
        self.upload_path = directory / "upload"
        self.log_path = directory / "log"
        self.socket_path = directory / "socket"
        home = directory / "home"
        for path in (self.output_dir, home):
            path.mkdir()
        environment = {
            **{name: os.environ[name] for name in ("PATH",)},
            **{"HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"},
            **{"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.getcwd(), "LANG": "C.UTF-8"},
        }
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "runtime.build", "--socket", str(self.socket_path)],
                env=environment,
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._connection: socket.socket | None = None
        self.hints = BuildHints()

    def connect(self) -> socket.socket:
        deadline = time.monotonic() + 60
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(self.socket_path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                assert self.process.poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.02)
                continue
            connection.settimeout(120)
            self._connection = connection
            return connection

    def send(self, data: bytes) -> None:
        assert self._connection is not None
        self._connection.sendall(data)

    def start(self) -> None:
        self.connect()
        build = Build(
            upload_path=str(self.upload_path),
            output_dir=str(self.output_dir),
            num_threads=1,
            hints=self.hints,
        )
        self.send(encode_frame(build))

    def receive(self) -> Message | None:
        """The next message; None at the end of the stream."""
        assert self._connection is not None
        prefix = self._exactly(LENGTH.size)
        if not prefix:
            return None
        body = self._exactly(LENGTH.unpack(prefix)[0])
        return msgspec.msgpack.decode(body, type=FromBuild)

    def _exactly(self, num_bytes: int) -> bytes:
        assert self._connection is not None
        data = b""
        while len(data) < num_bytes:
            chunk = self._connection.recv(num_bytes - len(data))
            if not chunk:
                break
            data += chunk
        return data

    def run(self) -> tuple[list[Progress], Message | None]:
        """All progress, and the message that ends the build."""
        self.start()
        progress: list[Progress] = []
        while isinstance(message := self.receive(), Progress):
            progress.append(message)
        return progress, message

    def hang_up(self) -> int:
        """Close the stream; the exit code that follows."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        return self.process.wait(30)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@pytest.fixture
def build(tmp_path: Path) -> Iterator[BuildProcess]:
    process = BuildProcess(tmp_path)
    yield process
    if process.process.poll() is None:
        process.process.kill()
        process.process.wait()
    process.hang_up()


@pytest.fixture
def built(build: BuildProcess) -> Callable[[], tuple[list[Progress], Built]]:
    def run() -> tuple[list[Progress], Built]:
        progress, message = build.run()
        assert isinstance(message, Built), (message, build.log())
        return progress, message

    return run


@pytest.fixture
def failed(build: BuildProcess) -> Callable[[], BuildFailed]:
    def run() -> BuildFailed:
        _, message = build.run()
        assert isinstance(message, BuildFailed), (message, build.log())
        leftovers = [path.name for path in build.output_dir.iterdir()]
        assert leftovers == [], "a failed build leaves nothing"
        return message

    return run


def test_a_tensor_program_is_built(build, built):
    export_digits(build.upload_path)
    progress, message = built()

    phases = list(dict.fromkeys(each.phase for each in progress))
    assert phases == PHASES
    fractions = [each.fraction for each in progress]
    assert fractions == sorted(fractions)
    details = " | ".join(each.detail for each in progress)
    assert "image float32 [n, 1, 8, 8] -> output float32 [n, 10]" in details
    assert "eager, batch of 128" in details

    manifest, receipt = message.manifest, message.receipt
    assert (manifest.kind, manifest.format) == ("tensor", "pt2")
    assert manifest.schema is not None
    assert manifest.schema.is_batched
    assert receipt.verdict == "equal"
    assert all(check.is_equal for check in receipt.checks)
    assert list(receipt.candidates[0].p50_ms) == [1, 8, 32, 128]
    assert list(receipt.phase_seconds) == PHASES
    assert receipt.torch_version == torch.__version__

    assert read_manifest(build.output_dir) == manifest
    assert read_receipt(build.output_dir) == receipt
    names = sorted(path.name for path in build.output_dir.iterdir())
    assert names == ["program.json", "program.pt2", "receipt.json"]
    served = load_exported(build.output_dir / "program.pt2")
    torch.manual_seed(0)
    module = Digits().eval()
    image = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(served.run([image])[0], module(image))

    assert "isolation L" in build.log()
    assert build.hang_up() == 0


def test_a_program_whose_rows_mix_is_built_unbatched(build, built):
    export(build.upload_path, MinusBatchMean(), torch.randn(2, 4))
    _, message = built()
    assert message.manifest.schema is not None
    assert not message.manifest.schema.is_batched
    assert message.receipt.verdict == "equal"
    assert any("one at a time" in note for note in message.receipt.notes)
    assert list(message.receipt.candidates[0].p50_ms) == [1]


def test_files_beside_a_program_are_named_in_the_receipt(build, built, tmp_path):
    program = export_digits(tmp_path / "digits.pt2")
    with tarfile.open(build.upload_path, "w:gz") as tar:
        tar.add(program, "digits.pt2")
        tar.addfile(tarfile.TarInfo("labels.txt"), io.BytesIO())
        tar.addfile(tarfile.TarInfo("lis\udcc9.md"), io.BytesIO())  # Latin-1
    _, message = built()
    assert "Not used: labels.txt, lis\\udcc9.md." in message.receipt.notes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `save_pretrained` writes it, with files that are not served."""
    directory = make_decoder_artifact(tmp_path_factory.mktemp("llama") / "model")
    (directory / "README.md").write_text("A model.")
    return directory


def test_a_decoder_is_built(build, built, llama):
    with tarfile.open(build.upload_path, "w") as tar:
        tar.add(llama, "my-model")
    progress, message = built()
    assert list(dict.fromkeys(each.phase for each in progress)) == PHASES
    manifest, receipt = message.manifest, message.receipt
    assert manifest.kind == "decoder"
    info = manifest.decoder
    assert info is not None
    assert info.architecture == "LlamaForCausalLM"
    assert info.is_paged
    assert info.eos_token_ids == [1]
    assert info.has_tokenizer
    assert info.has_chat_template
    assert info.template_tokens > 0
    assert receipt.verdict == "equal"
    assert {check.form for check in receipt.checks} == {"eager, float32", "fused, float32"}
    eager, fused = receipt.candidates
    assert (eager.name, fused.name) == ("eager", "fused")
    for candidate in receipt.candidates:
        assert list(candidate.p50_ms) == [1, 8, 32]
        assert candidate.prefill_ms is not None
        assert candidate.device_ms_max > 0
    # The weights lie there once, as the form that won needs them.
    assert manifest.form == ("fused" if fused.is_chosen else "eager")
    assert manifest.format == ("pt2" if fused.is_chosen else "huggingface")
    weights = {"program.pt2", "program.plan"} if fused.is_chosen else {"model.safetensors"}
    names = {path.name for path in build.output_dir.iterdir()}
    assert names == {
        *weights,
        *("config.json", "generation_config.json", "program.json"),
        *("receipt.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert read_manifest(build.output_dir) == manifest
    assert any("README.md" in note for note in receipt.notes)


def test_a_decoder_without_a_usable_tokenizer_takes_token_ids(build, built, llama):
    with tarfile.open(build.upload_path, "w") as tar:
        for path in llama.iterdir():
            if path.name != "tokenizer.json":
                tar.add(path, path.name)
    _, message = built()
    info = message.manifest.decoder
    assert info is not None
    assert not info.has_tokenizer
    assert not info.has_chat_template
    assert any("only token ids" in note for note in message.receipt.notes)


def test_other_models_in_a_directory_are_refused(build, failed, llama):
    config = msgspec.json.decode((llama / "config.json").read_bytes())
    config |= {"model_type": "bert", "architectures": ["BertForMultipleChoice"]}
    with tarfile.open(build.upload_path, "w") as tar:
        tar.add(llama / "model.safetensors", "model.safetensors")
        data = msgspec.json.encode(config)
        member = tarfile.TarInfo("config.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    error = failed().error
    assert error.code == "not_a_decoder"
    assert "BertForMultipleChoice" in error.message


def test_a_refusal_says_what_to_run_instead(build, failed):
    torch.save(Digits().state_dict(), build.upload_path)
    error = failed().error
    assert error.code == "state_dict"
    assert "torch.export.save" in error.message
    assert build.hang_up() == 0


def test_a_program_that_changes_itself_is_refused(build, failed):
    export(build.upload_path, Counting(), torch.randn(2, 4))
    assert failed().error.code == "stateful"


def test_our_own_failures_are_short_for_the_owner_and_long_in_the_log(build):
    (build.output_dir / ".unpacked").mkdir()  # as no build finds it
    export_digits(build.upload_path)
    _, message = build.run()
    assert isinstance(message, BuildFailed)
    assert message.error.code == "build_error"
    assert "/" not in message.error.message
    assert "Traceback" in build.log()


def test_hanging_up_cancels(build):
    export_digits(build.upload_path)
    build.start()
    assert isinstance(build.receive(), Progress)
    assert build.hang_up() == 0
    assert not (build.output_dir / "program.json").exists()


def test_hanging_up_before_a_build_ends_the_process(build):
    build.connect()
    assert build.hang_up() == 0


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", LENGTH.pack(3) + b"abc"])
def test_nonsense_ends_the_process(build, data):
    build.connect()
    build.send(data)
    assert build.process.wait(30) != 0


def test_the_socket_is_private(build):
    build.connect()
    assert build.socket_path.stat().st_mode & 0o777 == 0o600
