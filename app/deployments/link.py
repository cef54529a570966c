"""The gateway's side of one worker's stream.

Owns the requests under way on one replica: who waits for what, and the end of all of them when
the worker goes. Framing is `stream.py`'s, the bounds on what a worker may claim are in
`claims.py`, the order in which outputs are made durable and handed out in `delivery.py`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

import msgspec

from app.core.clock import monotonic_ns
from app.core.errors import AppError, RateLimited, TooLarge, Unavailable
from app.deployments.claims import (
    FalseClaim,
    cancelled,
    check_device_time,
    check_predicted,
    failure_of,
    is_form_of,
    lost_worker,
    slow_worker,
)
from app.deployments.delivery import Commit, Delivery
from app.deployments.embedding import Embedding
from app.deployments.failed_runs import failure_of_run
from app.deployments.generation import Generation, Outputs, lost_generation
from app.deployments.launchers.base import LaunchError
from app.deployments.metered import Metered
from app.deployments.outstanding import Call, Outstanding
from app.deployments.stream import FrameStream
from runtime.protocol import (
    Cancel,
    Drain,
    Embed,
    Embedded,
    Failed,
    Fatal,
    FromWorker,
    Generate,
    Manifest,
    Message,
    Predict,
    Predicted,
    Prepared,
    Ready,
    SequenceOutput,
    Serve,
    Start,
    Stats,
    Step,
    encode_frame,
)

MAX_OUTSTANDING = 2048
PREPARE_SECONDS = 60.0
CANCEL_SECONDS = 60.0  # a worker that has not ended a cancelled request by then hangs

log = logging.getLogger(__name__)


class ReplicaLink:
    """Multiplexes requests over one worker's stream; `stream` is the protocol to connect it with.

    `commit` is awaited for each step's outputs, in order, before any of them is handed out. A
    worker that goes, or that claims what cannot be true, ends the link: `wait_closed` tells why,
    and every request on it fails with a typed 503.
    """

    def __init__(
        self,
        commit: Commit,
        *,
        manifest: Manifest | None = None,
        num_devices: int = 1,
        max_outstanding: int = MAX_OUTSTANDING,
    ) -> None:
        self._manifest = manifest
        self._num_devices = num_devices
        self._max_outstanding = max_outstanding
        self._loop = asyncio.get_running_loop()
        decoder = msgspec.msgpack.Decoder(FromWorker)
        self.stream: FrameStream[FromWorker] = FrameStream(decoder, self._receive, self._on_lost)
        self.stats = Stats()
        self._outstanding = Outstanding()
        self.metered = Metered()
        self._delivery = Delivery(commit, self._outstanding, self.stream, self.metered)
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self._ready_ns = self._device_ns = 0
        self._vocab_size = 0
        self._closed: asyncio.Future[str] = self._loop.create_future()
        self.is_draining = self._is_false = False
        self._fatal = ""
        self._delivering = self._loop.create_task(self._deliver())

    # --- life -----------------------------------------------------------------------------

    @property
    def num_outstanding(self) -> int:
        """Requests prepared, queued or running."""
        return len(self._outstanding)

    @property
    def closed(self) -> bool:
        return self._closed.done()

    @property
    def gave_up(self) -> bool:
        """The worker itself said why it could not go on."""
        return bool(self._fatal)

    async def wait_closed(self) -> str:
        """Why the stream ended, to follow `The worker`."""
        return await asyncio.shield(self._closed)

    async def serve(self, serve: Serve, timeout_seconds: float) -> Ready:
        """Tells a fresh worker what to serve. Raises `LaunchError` with the reason if it does not
        get ready."""
        self._send(serve)
        try:
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(self._ready)
        except TimeoutError:
            reason = f"did not get ready within {timeout_seconds:.0f} seconds"
            self.stream.close(reason)
            raise LaunchError(f"The worker {reason}") from None

    async def drain(self, grace_seconds: float = 0.0) -> None:
        """Takes requests for `grace_seconds` more, from callers that chose this replica before it
        was taken off, lets all finish and asks the worker to end. The caller bounds the time."""
        if grace_seconds:
            await asyncio.sleep(grace_seconds)
        self.is_draining = True
        await self._outstanding.wait_idle()
        self._send(Drain())
        await self.wait_closed()

    def close(self, reason: str) -> None:
        """Ends the link at once; requests on it fail."""
        self.stream.close(reason)

    # --- requests -------------------------------------------------------------------------

    async def prepare(self, request: Generate | Embed) -> Prepared:
        """Has the worker tokenise and validate. Afterwards the request waits for `start` or
        `cancel`. Raises `RuntimeFailure`, `RateLimited` or `Unavailable`."""
        frame = self._admit(request.request_id, request)
        preparing: asyncio.Future[Prepared] = self._loop.create_future()
        if isinstance(request, Embed):
            self._outstanding.embeddings[request.request_id] = Embedding(request, preparing)
        else:
            self._outstanding.generations[request.request_id] = Generation(request, preparing)
        try:
            async with asyncio.timeout(PREPARE_SECONDS):
                await self.stream.writable()
                if not preparing.done():  # cancelled while it waited to be sent
                    self.stream.send_frame(frame)
                return await preparing
        except TimeoutError:
            self.cancel(request.request_id)
            raise slow_worker() from None
        except asyncio.CancelledError:
            self.cancel(request.request_id)
            raise

    def start(self, request_id: str) -> None:
        """Runs a prepared request: the money for it is held."""
        request = self._outstanding.prepared(request_id)
        if request is None:  # its replica went in between; `outputs` and `embedded` say so
            return
        assert request.prepared is not None, "started before it was prepared"
        request.started_ns = monotonic_ns()
        self._send(Start(request_id=request_id))

    def cancel(self, request_id: str) -> None:
        """Stops a request; idempotent. One that runs still delivers what it had made, and tells
        what it used; one that does not is forgotten at once."""
        if request_id not in self._outstanding:
            return
        request = self._outstanding.prepared(request_id)
        if isinstance(request, Generation) and request.is_received:
            return  # its end is here already and waits for the journal alone
        if isinstance(request, Embedding):
            request.is_cancelled = True
        self._send(Cancel(request_id=request_id))
        if request is None or request.started_ns is None:
            self._outstanding.fail(request_id, cancelled())
        received_ns = self.metered.received_ns
        self._loop.call_later(CANCEL_SECONDS, self._expect_end, request_id, received_ns)

    def withdraw(self, request_id: str) -> None:
        """Has a tensor request dropped, unless it is running or done: what the worker answers,
        either way, is its end."""
        call = self._outstanding.calls.get(request_id)
        if call is not None and call.is_sent:
            self._send(Cancel(request_id=request_id))
        elif call is not None:
            self._outstanding.fail(request_id, cancelled())

    def outputs(self, request_id: str) -> AsyncIterator[list[SequenceOutput]]:
        """What each step added, until every choice is finished. Raises `RuntimeFailure` when the
        request fails. To be called once, right after `start`."""
        generation = self._outstanding.generations.get(request_id)
        if generation is None:
            generation = lost_generation(self._loop, request_id, self._lost())
        return Outputs(generation)

    async def embedded(self, request_id: str) -> Embedded:
        """The answer to a started request for embeddings; whoever waits may be cancelled. Raises
        `RuntimeFailure` when it fails. To be called once, right after `start`."""
        embedding = self._outstanding.embeddings.get(request_id)
        if embedding is None:
            raise self._lost()
        return await asyncio.shield(embedding.answer)

    async def predict(self, request: Predict) -> Predicted:
        """Runs a tensor request. Raises like `prepare`."""
        frame = self._admit(request.request_id, request)
        call = Call(self._loop.create_future())
        self._outstanding.calls[request.request_id] = call
        try:
            await self.stream.writable()
            if not call.answer.done():
                call.is_sent = True
                self.stream.send_frame(frame)
            return await call.answer
        except asyncio.CancelledError:
            self.cancel(request.request_id)
            raise

    def _admit(self, request_id: str, request: Message) -> bytes:
        """The request's frame, if it may be sent."""
        if self.closed:
            raise self._lost()
        if self.is_draining:
            raise Unavailable(
                "This replica is stopping; try again.", code="draining", retry_after_seconds=1
            )
        if self.num_outstanding >= self._max_outstanding:
            raise RateLimited(
                f"This replica already has {self.num_outstanding} requests; try again shortly.",
                code="replica_full",
                retry_after_seconds=1,
            )
        assert request_id not in self._outstanding, request_id
        try:
            return encode_frame(request)
        except ValueError as error:
            raise TooLarge(f"The request is too large to be sent to the model: {error}") from None

    def _send(self, message: Message) -> None:
        self.stream.send_frame(encode_frame(message))

    def _expect_end(self, request_id: str, received_ns: int) -> None:
        """A worker answers a cancel, whatever else it does. One that has not sent a thing since
        hangs."""
        if request_id in self._outstanding or self.metered.received_ns == received_ns:
            self.stream.close(f"did not stop a cancelled request within {CANCEL_SECONDS:.0f} s")

    # --- what the worker sends ------------------------------------------------------------

    def _receive(self, message: FromWorker) -> None:
        self.metered.received_ns = monotonic_ns()
        try:
            if not self._ready.done() and not isinstance(message, Ready | Fatal | Stats):
                raise FalseClaim("answered before it was ready")
            match message:
                case Step():
                    self._on_step(message)
                case Predicted():
                    self._on_predicted(message)
                case Embedded():
                    self._on_embedded(message)
                case Prepared():
                    self._on_prepared(message)
                case Failed():
                    self._on_failed(message)
                case Stats():
                    self.stats = message
                case Ready():
                    self._on_ready(message)
                case Fatal():
                    self._fatal = failure_of(message.error).message
                    self.stream.close(f"gave up: {self._fatal}")
        except FalseClaim:
            self._is_false = True
            raise

    def _on_ready(self, ready: Ready) -> None:
        if self._ready.done():
            raise FalseClaim("got ready twice")
        if self._manifest is not None and not is_form_of(ready.manifest, self._manifest):
            raise FalseClaim("serves something else than its build made")
        self._manifest = ready.manifest
        self._vocab_size = ready.manifest.decoder.vocab_size if ready.manifest.decoder else 0
        self._ready_ns = monotonic_ns()
        self._ready.set_result(ready)

    def _on_prepared(self, prepared: Prepared) -> None:
        request = self._outstanding.prepared(prepared.request_id)
        if request is None:
            return self._outstanding.expect_ended(prepared.request_id)
        if request.prepared is not None or self._manifest is None:
            raise FalseClaim("prepared a request twice")
        try:
            request.check_prepared(prepared, self._manifest)
        except AppError as error:
            log.warning("refused a request: %s", error.message)
            self._send(Cancel(request_id=prepared.request_id))
            self._outstanding.fail(prepared.request_id, error)
            return
        request.prepared = prepared
        if not request.preparing.done():
            request.preparing.set_result(prepared)

    def _on_step(self, step: Step) -> None:
        now_ns = monotonic_ns()
        for output in step.outputs:
            generation = self._outstanding.generations.get(output.request_id)
            if generation is None:
                self._outstanding.expect_ended(output.request_id)
                continue
            generation.check(output, now_ns, self._vocab_size, self._num_devices)
        self._count_device_time(sum(output.device_ns for output in step.outputs))
        self._delivery.add(step)

    def _on_embedded(self, embedded: Embedded) -> None:
        embedding = self._outstanding.embeddings.get(embedded.request_id)
        if embedding is None:
            return self._expect_late(embedded)
        embedding.check(embedded, self._num_devices)
        self._count_device_time(embedded.device_ns)
        self.metered.embedded(embedded)
        self._outstanding.forget(embedded.request_id)
        embedding.finish(embedded)

    def _expect_late(self, answer: Predicted | Embedded) -> None:
        """To a request that ended here before it did there."""
        self._outstanding.expect_ended(answer.request_id)
        self.metered.fail(answer.device_ns, has_begun=True)

    def _count_device_time(self, device_ns: int) -> None:
        self._device_ns += device_ns
        check_device_time(self._device_ns, monotonic_ns() - self._ready_ns, self._num_devices)

    def _on_predicted(self, predicted: Predicted) -> None:
        call = self._outstanding.calls.get(predicted.request_id)
        if call is None:
            return self._expect_late(predicted)
        assert self._manifest is not None
        check_predicted(predicted, self._manifest)
        self._count_device_time(call.check(predicted.device_ns, self._num_devices))
        self.metered.predicted(predicted)
        self._outstanding.forget(predicted.request_id)
        if not call.answer.done():
            call.answer.set_result(predicted)

    def _on_failed(self, failed: Failed) -> None:
        if (call := self._outstanding.calls.get(failed.request_id)) is not None:
            self._count_device_time(call.check(failed.device_ns, self._num_devices))
        request = self._outstanding.prepared(failed.request_id)
        has_begun = request is not None and request.started_ns is not None
        self.metered.fail(failed.device_ns, has_begun=has_begun)
        if isinstance(request, Generation) and has_begun:
            request.is_failed = True
            self._delivery.add(failed)  # behind the outputs that came before it
        elif failed.request_id in self._outstanding:
            self._outstanding.fail(failed.request_id, failure_of_run(failed))
        else:
            self._outstanding.expect_ended(failed.request_id)

    # --- the end --------------------------------------------------------------------------

    async def _deliver(self) -> None:
        """Hands out outputs until the stream ends; then fails what is left."""
        try:
            await self._delivery.run()
        finally:
            self.stream.close("answered, but the answer could not be handled")
            for request_id in list(self._outstanding.generations):
                self._outstanding.fail(request_id, self._lost())

    def _on_lost(self, reason: str) -> None:
        log.info("a worker %s", reason)
        self._closed.set_result(reason)
        if not self._ready.done():
            self._ready.set_exception(LaunchError(self._fatal or f"The worker {reason}"))
            self._ready.exception()  # nobody may be waiting for it
        for request_id in [*self._outstanding.calls, *self._outstanding.embeddings]:
            self._outstanding.fail(request_id, self._lost())
        for request_id, generation in list(self._outstanding.generations.items()):
            if generation.started_ns is None:
                self._outstanding.fail(request_id, self._lost())
        self._delivery.end()

    def _lost(self) -> AppError:
        reason = self._closed.result() if self._closed.done() else "went away"
        return lost_worker(reason, is_false=self._is_false)
