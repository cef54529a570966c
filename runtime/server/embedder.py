"""Serves an embedder: prepare, wait for the go-ahead, run beside others, answer once.

Owns the life of a request from `Embed` to its end. Which texts share a run is the batcher's
decision; what may be asked for is `batching/embedding_texts.py`'s.
"""

import asyncio
import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from runtime.batching.embedding_batcher import EmbeddingBatcher, Run, Vectors
from runtime.batching.embedding_texts import EmbeddingTexts
from runtime.batching.length_queue import LengthQueue
from runtime.protocol import (
    Cancel,
    Embed,
    Embedded,
    EmbedderInfo,
    Failed,
    FrameError,
    Prepared,
    Serve,
    Start,
    Stats,
    ToWorker,
    WireError,
)
from runtime.server.connection import Server, cancelled, queue_full, server_error, wire_error
from runtime.server.decoder import DRAINING_START_SECONDS, START_SECONDS
from runtime.server.memory import ID_BYTES, WaitingMemory


class _Request:
    """A request that is not answered yet: being prepared, prepared, or (with a task) running."""

    __slots__ = ("deadline", "fairness_key", "task", "texts")

    def __init__(self, fairness_key: str) -> None:
        self.fairness_key = fairness_key
        self.texts: list[list[int]] | None = None
        self.deadline = 0.0  # for `Start`; means something while `texts` is set and `task` is not
        self.task: asyncio.Task[None] | None = None


class EmbedderServer(Server):
    """Embeddings. `run` takes token ids and returns vectors, on a thread of its own, one call at
    a time."""

    def __init__(self, run: Run, texts: EmbeddingTexts, info: EmbedderInfo, config: Serve) -> None:
        self._texts = texts
        self._info = info
        queue = LengthQueue(config.max_batch_tokens, config.max_batch_rows, info.batching)
        self._batcher = EmbeddingBatcher(run, queue, on_lost_device=self._lose_device)
        self._max_requests = config.max_waiting
        self._requests: dict[str, _Request] = {}
        self._memory = WaitingMemory()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def handle(self, message: ToWorker) -> None:
        match message:
            case Embed():
                self._embed(message)
            case Start():
                self._start(message.request_id)
            case Cancel():
                self._cancel(message.request_id)
            case _:
                raise FrameError(f"an embedder takes no {type(message).__name__}")

    # --- before a request runs ----------------------------------------------------------

    def _embed(self, message: Embed) -> None:
        request_id = message.request_id
        if request_id in self._requests:
            raise FrameError("a request's id is already in use")
        if self.is_draining:
            self.refuse_draining(request_id)
            return
        is_full = len(self._requests) >= self._max_requests
        if is_full or not self._memory.hold(request_id, embed_bytes(message)):
            self.refuse(request_id, queue_full())
            return
        request = self._requests[request_id] = _Request(message.fairness_key)
        prepared = self._executor.submit(self._prepare, message, request)
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._prepared, request_id, request, prepared.result())

        prepared.add_done_callback(done)

    def _prepare(self, message: Embed, request: _Request) -> list[list[int]] | WireError:
        """On the executor's thread."""
        if self._requests.get(message.request_id) is not request:
            return cancelled()  # before its turn; nobody hears this
        try:
            return self._texts.token_ids(message)
        except BaseException as error:  # noqa: BLE001 - a tokenizer may raise anything
            return wire_error(error)

    def _prepared(
        self, request_id: str, request: _Request, result: list[list[int]] | WireError
    ) -> None:
        if self._requests.get(request_id) is not request:
            return  # cancelled meanwhile
        if isinstance(result, WireError):
            self._end(request_id, result)
            return
        num_tokens = sum(map(len, result))
        # Its vectors are there before the answer is.
        num_bytes = num_tokens * ID_BYTES + len(result) * self._info.dimensions * 8
        if not self._memory.hold(request_id, num_bytes):
            self._end(request_id, queue_full())
            return
        request.texts = result
        seconds = DRAINING_START_SECONDS if self.is_draining else START_SECONDS
        request.deadline = time.monotonic() + seconds
        self.connection.send(
            Prepared(request_id=request_id, num_prompt_tokens=num_tokens, max_tokens=0)
        )

    def tick(self) -> None:
        """End what was prepared and not started in time."""
        now = time.monotonic()
        expired = [
            request_id
            for request_id, request in self._requests.items()
            if request.texts is not None and request.task is None and request.deadline <= now
        ]
        for request_id in expired:
            message = "The request was not started in time."
            self._end(request_id, server_error("start_timeout", message, 503))

    def drain(self) -> None:
        super().drain()
        latest = time.monotonic() + DRAINING_START_SECONDS
        for request in self._requests.values():
            request.deadline = min(request.deadline, latest)

    # --- while it runs ------------------------------------------------------------------

    def _start(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is None or request.texts is None or request.task is not None:
            message = "The request is not prepared, was cancelled, or waited too long."
            self.refuse(request_id, server_error("not_prepared", message, 500))
            return
        answer = self._batcher.submit(request_id, request.texts, request.fairness_key)
        request.task = asyncio.create_task(self._finish(request_id, answer))

    async def _finish(self, request_id: str, answer: "asyncio.Future[Vectors]") -> None:
        try:
            vectors = await answer
        except Exception as error:  # noqa: BLE001 - only this request may suffer
            self._end(request_id, wire_error(error))
            return
        self._forget(request_id)
        self.connection.send(
            Embedded(
                request_id=request_id,
                dimensions=self._info.dimensions,
                data=vectors.data,
                num_tokens=vectors.num_tokens,
                device_ns=vectors.device_ns,
            )
        )

    def _cancel(self, request_id: str) -> None:
        """What runs already is finished and told of, so that it can be charged; the rest of the
        request's texts do not run."""
        request = self._requests.get(request_id)
        if request is None:
            return  # answered already
        if request.task is None:
            self._end(request_id, cancelled())
        else:
            self._batcher.cancel(request_id)

    def _end(self, request_id: str, error: WireError) -> None:
        if self._forget(request_id):
            self.connection.send(Failed(request_id=request_id, error=error))

    def _forget(self, request_id: str) -> bool:
        """The request is answered; False if it was before."""
        self._memory.release(request_id)
        return self._requests.pop(request_id, None) is not None

    def pause(self) -> None:
        self._batcher.pause()

    def resume(self) -> None:
        self._batcher.resume()

    def _lose_device(self) -> None:
        message = "The model's device failed; it is being restarted. Try again."
        asyncio.get_running_loop().call_soon(
            self.connection.fail, server_error("device_lost", message, 503)
        )

    def stats(self) -> Stats:
        counters = self._batcher.counters
        num_not_started = sum(request.task is None for request in self._requests.values())
        return Stats(
            num_running=self._batcher.num_running,
            num_waiting=self._batcher.num_waiting + num_not_started,
            prompt_tokens=counters.tokens,
            requests=counters.requests,
            rows=counters.texts,
            runs=counters.runs,
            device_ns=counters.device_ns,
        )

    def close(self) -> None:
        for request in self._requests.values():
            if request.task is not None:
                request.task.cancel()
        self._batcher.close()
        self._executor.shutdown(wait=False, cancel_futures=True)


def embed_bytes(embed: Embed) -> int:
    """What was received; the ids of a text are counted once it is prepared."""
    num_ids = sum(map(len, embed.token_ids or ()))
    return sum(map(sys.getsizeof, embed.texts or ())) + num_ids * ID_BYTES
