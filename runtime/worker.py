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
    Generate,
    Manifest,
    Ready,
    SamplingParams,
    Serve,
    TensorSpec,
    WireError,
    check_frame_length,
    encode_frame,
)

if TYPE_CHECKING:
    from runtime.engine import DecoderEngine
    from runtime.execution.runner import Runner
    from runtime.importing.program import Decoder
    from runtime.server.connection import Server

logger = logging.getLogger("runtime.worker")

CONNECT_SECONDS = 120.0
WARM_UP_ID = "warm-up"
# Their text is meant for people. By name: importing them here would start threads.
PLAIN_ERRORS = ("ArtifactError", "TokenizerError", "ChatTemplateError", "SandboxError")


class LoadError(Exception):
    """The artifact cannot be served; `error` says why in plain words."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error = WireError(type="server_error", code=code, message=message, status=503)


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
        return load_tensor(config, manifest)
    if manifest.kind == "decoder":
        return load_decoder(config, manifest)
    raise LoadError("unsupported_kind", f"This release does not serve {manifest.kind} models.")


def load_tensor(config: Serve, manifest: Manifest) -> tuple["Server", Ready]:
    """A tensor program, after one run on zeros."""
    import torch

    from runtime.compiling.packaging import PROGRAM_NAME
    from runtime.importing.exported import load_exported
    from runtime.server.tensor import TensorServer

    model = load_exported(Path(config.artifact_dir) / PROGRAM_NAME, config.device)
    # The manifest's: the build may have found that rows must not share a run.
    schema = manifest.schema or model.schema

    def zeros(spec: TensorSpec) -> "torch.Tensor":
        shape = spec.min_shape or [size or 1 for size in spec.shape]
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype))

    try:
        model.run([zeros(spec) for spec in schema.inputs])
    except torch.AcceleratorError:
        raise
    except Exception:  # some graphs refuse zeros; the build has seen this one run
        logger.warning("the warm-up run failed", exc_info=True)
    return TensorServer(model.run, schema, config), Ready(
        manifest=manifest, memory_bytes=resident_bytes()
    )


def load_decoder(config: Serve, manifest: Manifest) -> tuple["Server", Ready]:
    """A decoder with its block pool, after one short request."""
    from runtime.cache.pool import KvPool, num_blocks_within
    from runtime.execution.attention import choose_backend
    from runtime.execution.runner import Runner
    from runtime.importing.huggingface import load_decoder as load_huggingface
    from runtime.server.decoder import DecoderServer

    model = load_huggingface(config.artifact_dir, config.device)
    shapes = [layer.kv_shape for layer in model.layers]
    num_blocks = num_blocks_within(config.kv_cache_bytes, shapes, config.block_size, model.dtype)
    if num_blocks < 2:
        raise LoadError(
            "cache_too_small",
            f"A KV cache of {config.kv_cache_bytes:,} bytes does not hold two blocks of "
            f"{config.block_size} tokens of this model. Give it more, or use smaller blocks.",
        )
    pool = KvPool(
        shapes,
        num_blocks=num_blocks,
        block_size=config.block_size,
        dtype=model.dtype,
        device=config.device,
    )
    backend = choose_backend(config.device)
    engine = make_engine(config, manifest, model, Runner(model, pool, backend), num_blocks)
    warm_up(engine)
    ready = Ready(
        manifest=manifest,
        memory_bytes=resident_bytes(),
        attention=backend.name,
        num_blocks=num_blocks,
        block_size=config.block_size,
    )
    return DecoderServer(engine, config), ready


def make_engine(
    config: Serve, manifest: Manifest, model: "Decoder", runner: "Runner", num_blocks: int
) -> "DecoderEngine":
    """The engine around a loaded model. Without a tokenizer it takes token ids only."""
    from runtime.engine import DecoderEngine
    from runtime.scheduling.scheduler import Scheduler
    from runtime.text.chat import ChatTemplate
    from runtime.text.tokenizer import Tokenizer

    info = manifest.decoder or model.info
    directory = Path(config.artifact_dir)
    tokenizer = Tokenizer.load(directory) if info.has_tokenizer else None
    template = None
    if tokenizer is not None and info.has_chat_template:
        template = ChatTemplate.load(directory, tokenizer)
    return DecoderEngine(
        runner,
        Scheduler(num_blocks, config.block_size, config.max_batch_tokens, config.max_sequences),
        tokenizer,
        info=info,
        chat_template=template,
        eos_token_ids=model.eos_token_ids,
    )


def warm_up(engine: "DecoderEngine") -> None:
    """Generate two tokens, so that the first caller does not wait for what happens only once.
    Raises `LoadError` when the model cannot."""
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    request = Generate(
        request_id=WARM_UP_ID, sampling=sampling, cache_salt=os.urandom(16), token_ids=[0]
    )
    engine.add(engine.prepare(request))
    while engine.has_work:
        if any(output.finish_reason == "error" for output in engine.step()):
            raise LoadError("model_failed", "The model failed on its first token; see its log.")


def resident_bytes() -> int:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- telling ----------------------------------------------------------------------------


def describe_failure(error: Exception) -> WireError:
    """What the operator and the model's owner are told; the log has the rest."""
    typed = getattr(error, "error", None)
    if isinstance(typed, WireError):
        return typed
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        message = "The model does not fit this machine's memory. Free some, or use a smaller dtype."
        return LoadError("out_of_memory", message).error
    if type(error).__name__ in PLAIN_ERRORS:
        return LoadError("load_failed", f"The model could not be loaded: {error}.").error
    message = f"The model could not be loaded ({type(error).__name__}). Its log says where."
    return LoadError("load_failed", message).error


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
