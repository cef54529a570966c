"""Serves a tensor program: each `Predict` joins the batcher and is answered by itself.

Which requests share a run is the batcher's decision.
"""

import asyncio

from runtime.batching.batcher import Batcher, Run
from runtime.batching.tensors import PredictFailure
from runtime.protocol import (
    Cancel,
    Failed,
    FrameError,
    Predict,
    Predicted,
    Schema,
    Serve,
    Stats,
    ToWorker,
)
from runtime.server.connection import (
    Server,
    cancelled,
    output_too_large,
    queue_full,
    server_error,
    wire_error,
)
from runtime.server.memory import WaitingMemory
from runtime.server.tensor_inputs import TensorInputs, TextRows


class TensorServer(Server):
    """Predictions. `run` takes and returns tensors in the schema's order, on a thread of its
    own, one call at a time; `text_rows` makes inputs of texts, where the model takes them."""

    def __init__(
        self, run: Run, schema: Schema, config: Serve, text_rows: TextRows | None = None
    ) -> None:
        self._inputs = TensorInputs(schema, text_rows)
        self._batcher = Batcher(
            run,
            schema,
            config.max_batch_rows,
            min(2.0, config.latency_target_ms),
            max_waiting=config.max_waiting,
            on_lost_device=self._lose_device,
        )
        self._max_requests = config.max_waiting
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._begun: set[str] = set()  # of `_tasks`, those of whose rows some run or ran
        self._memory = WaitingMemory()

    @property
    def num_requests(self) -> int:
        return len(self._tasks)

    def handle(self, message: ToWorker) -> None:
        match message:
            case Predict():
                self._take(message)
            case Cancel():
                self._cancel(message.request_id)
            case _:
                raise FrameError(f"a tensor program takes no {type(message).__name__}")

    def _take(self, message: Predict) -> None:
        request_id = message.request_id
        if request_id in self._tasks:
            raise FrameError("a request's id is already in use")
        if self.is_draining:
            self.refuse_draining(request_id)
            return
        is_full = len(self._tasks) >= self._max_requests
        if is_full or not self._memory.hold(request_id, self._inputs.num_bytes(message)):
            self.refuse(request_id, queue_full())
        else:
            self._tasks[request_id] = asyncio.create_task(self._predict(message))

    async def _predict(self, message: Predict) -> None:
        request_id = message.request_id
        try:
            tensors = await self._inputs.tensors_of(message)
            prediction = await self._batcher.predict(tensors, lambda: self._begun.add(request_id))
            answer = Predicted(
                request_id=request_id,
                outputs=prediction.outputs,
                device_ns=prediction.device_ns,
                batch_rows=prediction.batch_rows,
                queue_ns=prediction.queue_ns,
            )
        except PredictFailure as failure:
            answer = Failed(request_id=request_id, error=failure.error)
        except Exception as error:  # noqa: BLE001 - only this request may suffer
            answer = Failed(request_id=request_id, error=wire_error(error))
        try:
            self.connection.send(answer)
        except ValueError:  # names and shapes count too
            self.refuse(request_id, output_too_large())
        del self._tasks[request_id]
        self._begun.discard(request_id)
        self._memory.release(request_id)

    def _cancel(self, request_id: str) -> None:
        """Drops a request that waits. One that has begun costs its device time whether or not
        somebody wants it, and is answered, so that it can be charged."""
        if request_id in self._begun:
            return
        if (task := self._tasks.pop(request_id, None)) is not None:
            task.cancel()  # before its first turn it says nothing any more
            self._memory.release(request_id)
            self.refuse(request_id, cancelled())

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
        return Stats(
            num_running=self._batcher.num_running,
            num_waiting=self._batcher.num_waiting,
            requests=counters.requests,
            rows=counters.rows,
            runs=counters.runs,
            device_ns=counters.device_ns,
        )

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._inputs.close()
