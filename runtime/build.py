"""A build: one sandboxed process that turns one upload into an artifact, or says why not. Or an
optimisation: the same process, which looks for a faster form of what an artifact holds.

Owns the order of the phases, their progress, and what every failure becomes. Each phase's work
is done elsewhere. The process serves one connection on a unix socket: it takes one `Build` or
`Optimise`, answers with `Progress` and then with its result or `BuildFailed`, and ends when the
peer hangs up.

Nothing that could start a thread is imported before the sandbox is applied, hence the imports
inside functions.
"""

import argparse
import logging
import os
import shutil
import socket
import sys
import threading
from pathlib import Path

import msgspec

from runtime.building.failures import describe_failure, internal_error
from runtime.building.reporter import OPTIMISE_STARTS, PHASE_STARTS, Reporter
from runtime.importing import sandbox
from runtime.protocol import (
    LENGTH,
    Build,
    BuildFailed,
    BuildReceipt,
    Built,
    FrameError,
    Optimise,
    Optimised,
    ToBuild,
    check_frame_length,
)
from runtime.text.printable import printable

logger = logging.getLogger("runtime.build")

CONNECT_SECONDS = 120.0
HANG_UP_SECONDS = 60.0  # after the last frame, until the process ends by itself
UNPACKED_NAME = ".unpacked"


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
    job = read_job(connection)
    if job is None:
        return
    reporter = Reporter(connection, PHASE_STARTS if isinstance(job, Build) else OPTIMISE_STARTS)
    try:
        isolation = confine(job)
    except (OSError, sandbox.SandboxError) as error:
        logger.exception("the sandbox could not be applied")
        reporter.send(BuildFailed(error=internal_error(error)))
        return
    watcher = threading.Thread(target=end_with_peer, args=(connection,), daemon=True)
    watcher.start()
    if isinstance(job, Build):
        reporter.send(run_build(job, reporter, isolation.summary()))
    else:
        reporter.send(run_optimise(job, reporter, isolation.summary()))
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


def read_job(connection: socket.socket) -> Build | Optimise | None:
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


# --- the build --------------------------------------------------------------------------


def confine(job: Build | Optimise) -> sandbox.IsolationReport:
    """Apply the build sandbox and limit threads, before anything heavy is imported."""
    os.environ["OMP_NUM_THREADS"] = str(job.num_threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    output_dir = Path(job.output_dir)
    tmp_dir = Path(os.environ.get("TMPDIR") or output_dir)
    if isinstance(job, Build):
        return sandbox.apply_build(Path(job.upload_path), output_dir, tmp_dir)
    return sandbox.apply_build(Path(job.artifact_dir), output_dir, tmp_dir, device=job.device)


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
        _clear(output_dir)
        return BuildFailed(error=describe_failure(error))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_optimise(job: Optimise, reporter: Reporter, isolation: str) -> Optimised | BuildFailed:
    """Never raises, likewise."""
    logger.info("%s", isolation)
    try:
        from runtime.building.optimise import optimise

        return optimise(job, reporter, isolation)
    except Exception as error:
        logger.exception("the optimisation failed")
        _clear(Path(job.output_dir))
        return BuildFailed(error=describe_failure(error))


def _clear(output_dir: Path) -> None:
    """Half an artifact is of no use."""
    for path in output_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _run_phases(build: Build, reporter: Reporter, scratch: Path, isolation: str) -> Built:
    with reporter.phase("unpack") as report:
        report(0.0, "reading the upload")
        import torch

        from runtime.importing.archive import TITLES, unpack

        torch.set_num_threads(build.num_threads)
        upload = unpack(Path(build.upload_path), scratch)
        report(1.0, f"found {TITLES[upload.kind]}")
    from runtime.building.kinds import build_program

    outcome = build_program(upload, scratch, reporter, build.hints)
    output_dir = Path(build.output_dir)
    with reporter.phase("package") as report:
        from runtime.compiling.packaging import write_manifest

        report(0.0, "writing the artifact")
        if left := outcome.package(output_dir):
            outcome.notes.append(f"Not used: {', '.join(left[:20])}.")
    receipt = BuildReceipt(
        verdict=outcome.verdict,
        checks=outcome.checks,
        candidates=outcome.candidates,
        phase_seconds=reporter.phase_seconds,
        torch_version=str(torch.__version__),
        device="cpu",
        route=outcome.route,
        notes=[printable(note) for note in [*outcome.notes, f"Built with {isolation}."]],
        warnings=[printable(warning) for warning in outcome.warnings],
    )
    write_manifest(output_dir, outcome.manifest, receipt)
    return Built(manifest=outcome.manifest, receipt=receipt)


if __name__ == "__main__":
    main()
