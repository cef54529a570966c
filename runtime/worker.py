"""A worker: one sandboxed process that serves one built artifact over one stream.

Owns the order of its start: listen, confine, load, warm up, serve. What it serves is
`runtime/server/`'s. Nothing that could start a thread is imported before the sandbox is applied,
hence the imports inside functions; a tensor program never imports transformers.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import msgspec

from runtime.importing import sandbox
from runtime.protocol import (
    LENGTH,
    Fatal,
    FrameError,
    Ready,
    Serve,
    check_frame_length,
    encode_frame,
)
from runtime.starting.failures import LoadError, describe_failure

if TYPE_CHECKING:
    from runtime.server.connection import Server

logger = logging.getLogger("runtime.worker")

CONNECT_SECONDS = 120.0


def main() -> NoReturn:
    """Entry point of `python -m runtime.worker --socket PATH`. Exits with 0 after a drain or when
    the peer closes, with 1 after `Fatal`."""
    parser = argparse.ArgumentParser(prog="runtime.worker")
    parser.add_argument("--socket", required=True, type=Path)
    arguments = parser.parse_args()
    os.closerange(3, 1024)  # whatever the launcher left open is not for a model to see
    log_without_content()
    sandbox.die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until there is something to drain
    connection = accept_one(arguments.socket)
    try:
        status = run(connection)
    except (FrameError, EOFError) as error:
        logger.error("closing the stream: %s", error)
        status = 1
    logging.shutdown()
    # At once: threads of a model, or one within a step, must not delay the end.
    os._exit(status)


def run(connection: socket.socket) -> int:
    """Serve over `connection` until it closes; the exit status. Raises `FrameError` and
    `EOFError` for a peer that does not send a `Serve`."""
    started = time.monotonic()
    config = read_serve(connection)
    try:
        report = confine(config)
        logger.info("%s", report.summary())
        server, ready = load(config)
    except Exception as error:
        # No prompt has come in yet, so the text is safe to keep.
        logger.exception("the artifact cannot be served: %s", error)
        with contextlib.suppress(OSError):  # the peer has gone
            connection.sendall(encode_frame(Fatal(error=describe_failure(error))))
        return 1
    gc.collect()
    gc.freeze()  # the model stays; later collections need not look at it
    logger.info("ready after %.1f s", time.monotonic() - started)
    return asyncio.run(serve(connection, server, ready))


async def serve(connection: socket.socket, server: "Server", ready: Ready) -> int:
    """Say `Ready` and serve until the stream is over; the exit status."""
    from runtime.server.connection import Connection

    loop = asyncio.get_running_loop()
    _, protocol = await loop.connect_accepted_socket(lambda: Connection(server, ready), connection)
    loop.add_signal_handler(signal.SIGTERM, protocol.drain)
    status = await protocol.done
    server.close()
    return status


# --- the connection ---------------------------------------------------------------------


def accept_one(path: Path) -> socket.socket:
    """Listen at `path` and take the first connection. Raises `TimeoutError`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        previous = os.umask(0o177)  # the socket is made with mode 0600
        try:
            listener.bind(str(path))
        finally:
            os.umask(previous)
        listener.listen(1)
        listener.settimeout(CONNECT_SECONDS)
        connection, _ = listener.accept()
    path.unlink(missing_ok=True)  # one connection is all there will be
    connection.settimeout(CONNECT_SECONDS)
    return connection


def read_serve(connection: socket.socket) -> Serve:
    """The first frame, and not a byte beyond it. Raises `FrameError` and `EOFError`."""
    length = check_frame_length(_read_exactly(connection, LENGTH.size))
    try:
        return msgspec.msgpack.decode(_read_exactly(connection, length), type=Serve)
    except msgspec.DecodeError as error:
        raise FrameError(f"the first frame must be a serve message: {error}") from error


def _read_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        chunk = connection.recv(num_bytes - len(data))
        if not chunk:
            raise EOFError("the peer closed before it said what to serve")
        data += chunk
    return bytes(data)


# --- starting ---------------------------------------------------------------------------


def confine(config: Serve) -> sandbox.IsolationReport:
    """Apply the serve sandbox and fix what libraries read from the environment as they load."""
    os.environ["OMP_NUM_THREADS"] = str(config.num_threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The engine's thread and the loop's share the interpreter; the default of 5 ms is a frame late.
    sys.setswitchinterval(0.001)
    return sandbox.apply_serve(Path(config.artifact_dir), device=config.device)


def load(config: Serve) -> tuple["Server", Ready]:
    """Load and warm up what the artifact holds. Raises `LoadError` and whatever loading raises."""
    import torch

    from runtime.compiling.packaging import read_manifest

    torch.set_num_threads(config.num_threads)
    torch.set_num_interop_threads(1)
    manifest = read_manifest(Path(config.artifact_dir))
    if manifest.kind == "tensor":
        from runtime.starting.tensor import load_tensor

        return load_tensor(config, manifest)
    if manifest.kind == "decoder":
        from runtime.starting.decoder import load_decoder

        return load_decoder(config, manifest)
    if manifest.kind == "embedder":
        from runtime.starting.embedder import load_embedder

        return load_embedder(config, manifest)
    raise LoadError("unsupported_kind", f"This release does not serve {manifest.kind} models.")


# --- telling ----------------------------------------------------------------------------


class ContentFreeFormatter(logging.Formatter):
    """Shows where an exception came from and of what type, never its text, which may quote a
    prompt."""

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None]
        | tuple[None, None, None],
    ) -> str:
        kind, _, trace = ei
        frames = "".join(traceback.format_tb(trace)).rstrip()
        return f"{frames}\n{kind.__name__ if kind else 'no exception'}"


def log_without_content() -> None:
    """Log to stderr, which the launcher keeps."""
    handler = logging.StreamHandler()
    handler.setFormatter(ContentFreeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


if __name__ == "__main__":
    main()
