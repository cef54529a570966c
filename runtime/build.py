"""A build: one sandboxed process that turns one upload into an artifact, or says why not.

Owns the order of the phases, their progress, and what every failure becomes. Each phase's work
is done elsewhere. The process serves one connection on a unix socket: it takes one `Build`,
answers with `Progress` and then `Built` or `BuildFailed`, and ends when the peer hangs up.

Nothing that could start a thread is imported before the sandbox is applied, hence the imports
inside functions.
"""

import argparse
import errno
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from runtime.importing import sandbox
from runtime.protocol import (
    LENGTH,
    Build,
    BuildFailed,
    BuildReceipt,
    Built,
    CandidateReport,
    Check,
    FrameError,
    Manifest,
    Message,
    Progress,
    ToBuild,
    Verdict,
    WireError,
    check_frame_length,
    encode_frame,
)
from runtime.text.printable import printable

if TYPE_CHECKING:
    from runtime.importing.archive import UnpackedUpload

logger = logging.getLogger("runtime.build")

CONNECT_SECONDS = 120.0
HANG_UP_SECONDS = 60.0  # after the last frame, until the process ends by itself
MAX_BATCH_ROWS = 64  # of a run, as `Serve.max_batch_rows`
UNPACKED_NAME = ".unpacked"

# Where each phase begins, as a fraction of the whole build.
PHASE_STARTS = {"unpack": 0.0, "import": 0.15, "prove": 0.4, "measure": 0.8, "package": 0.95}


def main() -> None:
    """Entry point of `python -m runtime.build --socket PATH`."""
    parser = argparse.ArgumentParser(prog="runtime.build")
    parser.add_argument("--socket", required=True, type=Path)
    arguments = parser.parse_args()
    os.closerange(3, 1024)  # whatever the launcher left open is not for a model to see
    sandbox.die_with_parent()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    connection = accept_one(arguments.socket)
    build = read_build(connection)
    if build is None:
        return
    reporter = Reporter(connection)
    try:
        isolation = confine(build)
    except (OSError, sandbox.SandboxError) as error:
        logger.exception("the sandbox could not be applied")
        reporter.send(BuildFailed(error=internal_error(error)))
        return
    watcher = threading.Thread(target=end_with_peer, args=(connection,), daemon=True)
    watcher.start()
    reporter.send(run_build(build, reporter, isolation.summary()))
    watcher.join(HANG_UP_SECONDS)


# --- the connection ---------------------------------------------------------------------


def accept_one(path: Path) -> socket.socket:
    """Listen at `path` and take the first connection. Raises `TimeoutError`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)  # the socket is made with mode 0600
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    listener.listen(1)
    listener.settimeout(CONNECT_SECONDS)
    connection, _ = listener.accept()
    listener.close()
    connection.settimeout(None)
    return connection


def read_build(connection: socket.socket) -> Build | None:
    """The one frame a build is given; None when the peer hangs up first. Raises `FrameError`."""
    prefix = _read_exactly(connection, LENGTH.size)
    if prefix is None:
        return None
    body = _read_exactly(connection, check_frame_length(prefix))
    if body is None:
        return None
    try:
        return msgspec.msgpack.decode(body, type=ToBuild)
    except msgspec.DecodeError as error:
        raise FrameError(f"not a build message: {error}") from error


def _read_exactly(connection: socket.socket, num_bytes: int) -> bytes | None:
    data = b""
    while len(data) < num_bytes:
        chunk = connection.recv(num_bytes - len(data))
        if not chunk:
            return None
        data += chunk
    return data


def end_with_peer(connection: socket.socket) -> None:
    """Ends the process when the peer hangs up, whatever phase is running: that is a cancel."""
    while True:
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        if not data:
            logger.info("the control plane hung up; ending")
            os._exit(0)


class Reporter:
    """Sends progress as it happens, logs it, and keeps the time of each phase."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._fraction = 0.0
        self.phase_seconds: dict[str, float] = {}

    def send(self, message: Message) -> None:
        """A frame to the peer; the watcher ends the process if it has gone."""
        try:
            self._connection.sendall(encode_frame(message))
        except OSError as error:
            logger.info("the control plane is gone: %s", error)

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[float, str], None]]:
        """Yields the phase's own report: a fraction of the phase and a line."""
        starts = [*PHASE_STARTS.values(), 1.0]
        start = PHASE_STARTS[name]
        end = min(other for other in starts if other > start)

        def report(fraction: float, detail: str) -> None:
            whole = start + (end - start) * min(1.0, max(0.0, fraction))
            self._fraction = max(self._fraction, whole)
            logger.info("%s: %s", name, detail)
            self.send(Progress(phase=name, fraction=self._fraction, detail=detail))

        started = time.monotonic()
        try:
            yield report
        finally:
            self.phase_seconds[name] = round(time.monotonic() - started, 3)


# --- the build --------------------------------------------------------------------------


class _Outcome(msgspec.Struct, kw_only=True):
    """What import, proof and measurement found; packaged in the end."""

    manifest: Manifest
    verdict: Verdict
    checks: list[Check]
    candidates: list[CandidateReport]
    notes: list[str]


def confine(build: Build) -> sandbox.IsolationReport:
    """Apply the build sandbox and limit threads, before anything heavy is imported."""
    os.environ["OMP_NUM_THREADS"] = str(build.num_threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    output_dir = Path(build.output_dir)
    tmp_dir = Path(os.environ.get("TMPDIR") or output_dir)
    return sandbox.apply_build(Path(build.upload_path), output_dir, tmp_dir)


def run_build(build: Build, reporter: Reporter, isolation: str) -> Built | BuildFailed:
    """All phases. Never raises: whatever goes wrong becomes a `BuildFailed`."""
    logger.info("%s", isolation)
    output_dir = Path(build.output_dir)
    scratch = output_dir / UNPACKED_NAME
    try:
        scratch.mkdir()
        return _run_phases(build, reporter, scratch, isolation)
    except Exception as error:
        logger.exception("the build failed")
        for path in output_dir.iterdir():
            if path.is_file():
                path.unlink()
        return BuildFailed(error=describe_failure(error))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_phases(build: Build, reporter: Reporter, scratch: Path, isolation: str) -> Built:
    with reporter.phase("unpack") as report:
        report(0.0, "reading the upload")
        import torch

        from runtime.importing.archive import unpack

        torch.set_num_threads(build.num_threads)
        upload = unpack(Path(build.upload_path), scratch)
        names = {"pt2": "an exported program (.pt2)", "huggingface": "a Hugging Face directory"}
        report(1.0, f"found {names[upload.kind]}")
    build_kind = _build_tensor if upload.kind == "pt2" else _build_decoder
    output_dir = Path(build.output_dir)
    outcome = build_kind(upload, reporter)
    with reporter.phase("package") as report:
        from runtime.compiling.packaging import add_directory, add_program, write_manifest

        report(0.0, "writing the artifact")
        if upload.kind == "pt2":
            add_program(upload.path, output_dir)
            left = upload.beside
        else:
            left = add_directory(upload.path, output_dir)
        if left:
            outcome.notes.append(f"Not used: {', '.join(left[:20])}.")
    receipt = BuildReceipt(
        verdict=outcome.verdict,
        checks=outcome.checks,
        candidates=outcome.candidates,
        phase_seconds=reporter.phase_seconds,
        torch_version=str(torch.__version__),
        device="cpu",
        notes=[printable(note) for note in [*outcome.notes, f"Built with {isolation}."]],
    )
    write_manifest(output_dir, outcome.manifest, receipt)
    return Built(manifest=outcome.manifest, receipt=receipt)


def _build_tensor(upload: "UnpackedUpload", reporter: Reporter) -> _Outcome:
    from runtime.compiling.candidates import measure_candidates
    from runtime.importing.exported import load_exported
    from runtime.importing.signature import describe_schema
    from runtime.proving.tensor import prove_tensor

    with reporter.phase("import") as report:
        report(0.0, "loading the graph")
        model = load_exported(upload.path)
        schema = describe_schema(model.schema)
        report(1.0, f"{model.num_parameters:,} parameters; {schema}")
    with reporter.phase("prove") as report:
        proof = prove_tensor(model, MAX_BATCH_ROWS, report)
    with reporter.phase("measure") as report:
        make_inputs = proof.makers[0].make
        candidates = measure_candidates(model, make_inputs, proof.max_rows, report)
    manifest = Manifest(
        kind="tensor",
        format="pt2",
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        schema=msgspec.structs.replace(model.schema, is_batched=proof.is_batched),
    )
    return _Outcome(
        manifest=manifest,
        verdict=proof.verdict,
        checks=proof.checks,
        candidates=candidates,
        notes=model.notes + proof.notes,
    )


def _build_decoder(upload: "UnpackedUpload", reporter: Reporter) -> _Outcome:
    from runtime.importing.huggingface import load_decoder
    from runtime.importing.text_support import check_text
    from runtime.proving.decoder import prove_decoder
    from runtime.proving.speed import measure_decoder

    with reporter.phase("import") as report:
        report(0.0, "loading the model")
        decoder = load_decoder(upload.path)
        parameters = list(decoder.module.parameters())
        num_parameters = sum(parameter.numel() for parameter in parameters)
        info, text_notes = check_text(upload.path, decoder.info)
        report(
            1.0,
            f"{info.architecture}: {num_parameters:,} parameters in {info.dtype}, "
            f"{info.num_layers} layers, {info.max_context_tokens:,} tokens of context",
        )
    with reporter.phase("prove") as report:
        proof = prove_decoder(
            upload.path, decoder, on_progress=lambda label, fraction: report(fraction, label)
        )
        _require_proof(proof.verdict, proof.checks)
        report(1.0, f"{proof.verdict}: {len(proof.checks)} checks")
    with reporter.phase("measure") as report:
        candidates = measure_decoder(decoder, report)
    manifest = Manifest(
        kind="decoder",
        format="huggingface",
        num_parameters=num_parameters,
        weight_bytes=sum(parameter.nbytes for parameter in parameters),
        decoder=info,
    )
    return _Outcome(
        manifest=manifest,
        verdict=proof.verdict,
        checks=proof.checks,
        candidates=candidates,
        notes=[*decoder.notes, *text_notes, *proof.notes],
    )


def _require_proof(verdict: Verdict, checks: list[Check]) -> None:
    """Raises `ImportFailure` when the served form is not the uploaded model."""
    from runtime.importing.program import ImportFailure

    if verdict == "different":
        failed = "; ".join(
            f"{check.name}: {check.error} of {check.tolerance} allowed"
            for check in checks
            if not check.is_equal
        )
        raise ImportFailure(
            "not_equal",
            f"The model is not served, because its served form does not compute what it does "
            f"({failed[:400]}). That is a limit of this release, not a fault of the upload.",
        )


# --- failures ---------------------------------------------------------------------------


def describe_failure(error: Exception) -> WireError:
    """What the model's owner is told; the log has the rest."""
    from runtime.importing.program import ImportFailure

    if isinstance(error, ImportFailure):
        return error.error
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return WireError(
            type="server_error",
            code="out_of_memory",
            message="The model does not fit this machine's memory. Try a smaller dtype, for "
            "example bfloat16, or a smaller model.",
            status=507,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WireError(
            type="server_error",
            code="disk_full",
            message="The disk is full. Ask the operator for room, then build again.",
            status=507,
        )
    return internal_error(error)


def internal_error(error: Exception) -> WireError:
    """A failure that is ours, or that we do not understand yet."""
    return WireError(
        type="server_error",
        code="build_error",
        message=f"The build failed unexpectedly ({type(error).__name__}). Its log says where; "
        "building again may help.",
        status=500,
    )


if __name__ == "__main__":
    main()
