"""Serves a tensor program: each `Predict` joins the batcher and is answered by itself.

Which requests share a run is the batcher's decision.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

import msgspec

from runtime.batching.batcher import Batcher, Prediction, Request
from runtime.batching.runner import Run
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
    Tensor,
    ToWorker,
    WireError,
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
    own, one call at a time; `text_rows` makes inputs of texts, where the model takes them;
    `measured` are the milliseconds of runs by rows that the build found."""

    def __init__(
        self,
        run: Run,
        schema: Schema,
        config: Serve,
        text_rows: TextRows | None = None,
        *,
        measured: Mapping[int, float] | None = None,
    ) -> None:
        self._inputs = TensorInputs(schema, text_rows)
        self._batcher = Batcher(
            run,
            schema,
            config.max_batch_rows,
            config.latency_target_ms,
            measured=measured,
            on_lost_device=self._lose_device,
        )
        self._max_requests = config.max_waiting
        # Unanswered ones: in the batcher, or in the task that makes their inputs.
        self._requests: dict[str, Request | asyncio.Task[None]] = {}
        self._memory = WaitingMemory()

    @property
    def num_requests(self) -> int:
        return len(self._requests)

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
        if request_id in self._requests:
            raise FrameError("a request's id is already in use")
        if self.is_draining:
            self.refuse_draining(request_id)
            return
        is_full = len(self._requests) >= self._max_requests
        if is_full or not self._memory.hold(request_id, self._inputs.num_bytes(message)):
            seconds = self._batcher.drain_seconds()
            self.refuse(
                request_id, msgspec.structs.replace(queue_full(), retry_after_seconds=seconds)
            )
        elif message.inputs is not None:
            self._submit(request_id, message.inputs, message.fairness_key)
        else:
            self._requests[request_id] = asyncio.create_task(self._make_inputs(message))

    async def _make_inputs(self, message: Predict) -> None:
        try:
            tensors = await self._inputs.tensors_of(message)
        except Exception as error:  # noqa: BLE001 - only this request may suffer
            self._fail(message.request_id, wire_error(error))
            return
        self._submit(message.request_id, tensors, message.fairness_key)

    def _submit(self, request_id: str, tensors: Sequence[Tensor], caller: str) -> None:
        try:
            self._requests[request_id] = self._batcher.submit(
                tensors, caller, partial(self._answer, request_id)
            )
        except Exception as error:  # noqa: BLE001 - only this request may suffer
            self._fail(request_id, wire_error(error))

    def _answer(self, request_id: str, result: Prediction | PredictFailure) -> None:
        if isinstance(result, PredictFailure):
            self._fail(request_id, result.error, result.device_ns)
            return
        answer = Predicted(
            request_id=request_id,
            outputs=result.outputs,
            device_ns=result.device_ns,
            batch_rows=result.batch_rows,
            queue_ns=result.queue_ns,
        )
        try:
            self.connection.send(answer)
        except ValueError:  # names and shapes count too
            self._fail(request_id, output_too_large(), result.device_ns)
        else:
            self._forget(request_id)

    def _cancel(self, request_id: str) -> None:
        """Drops a request that waits. One that has begun costs its device time whether or not
        somebody wants it, and is answered, so that it can be charged."""
        match self._requests.get(request_id):
            case None:
                return
            case asyncio.Task() as task:
                task.cancel()  # before its first turn it says nothing any more
            case request:
                if not self._batcher.cancel(request):
                    return
        self._fail(request_id, cancelled())

    def _fail(self, request_id: str, error: WireError, device_ns: int = 0) -> None:
        self._forget(request_id)
        self.connection.send(Failed(request_id=request_id, error=error, device_ns=device_ns))

    def _forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._memory.release(request_id)

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
            queue_ns=counters.queue_ns,
            runs_by_rows=dict(counters.runs_by_rows),
        )

    def close(self) -> None:
        for request in self._requests.values():
            if isinstance(request, asyncio.Task):
                request.cancel()
        self._requests.clear()
        self._batcher.close()
        self._inputs.close()
