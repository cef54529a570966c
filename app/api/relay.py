"""Takes a request through hold, replica and settlement, for every kind of program.

Owns each request from its admission to its settlement, in tasks of its own: a client that goes
away ends the waiting, never the accounting. HTTP is `openai.py`'s and `predict.py`'s; what is
charged when is in `metering/records.py` and `billing/rating.py`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from app.api.embedding import Answer as EmbeddingAnswer
from app.api.embedding import Embedding
from app.api.endings import aborted, client_left, grammar_refused, timed_out
from app.api.execution import Execution
from app.api.held_time import max_device_ms
from app.api.prediction import Answer, Prediction
from app.billing.accounts import AccountWriter
from app.billing.prices import PriceTable, Rates
from app.billing.rating import (
    decoder_worst_case,
    embedder_worst_case,
    rate,
    tensor_worst_case,
)
from app.core.errors import AppError, Unavailable
from app.core.ids import new_id
from app.metering.journal import Journal
from app.metering.records import AdmitRecord, FinishRecord, Outcome, Tally, Usage, use_of
from app.organizations.principal import Principal
from runtime.protocol import Embed, Embedded, Generate, Predict, Predicted, ServiceClass

if TYPE_CHECKING:
    from app.deployments.replica import Target

HOLD_SECONDS = 30.0  # a database that does not answer for so long is down

log = logging.getLogger(__name__)
T = TypeVar("T")


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks what of which replica. `is_stream`: the caller gets output as it is made.
    `resolve`: chooses a replica anew, should the target be replaced before it gets the request."""

    principal: Principal
    target: "Target"
    route: str
    service_class: ServiceClass = "standard"
    is_stream: bool = False
    request_id: str = msgspec.field(default_factory=lambda: new_id("req"))
    started_at_ns: int = msgspec.field(default_factory=time.time_ns)
    resolve: "Callable[[], Target] | None" = None

    def renewed(self) -> "Call":
        """The same of a replica that takes requests now. Raises what `resolve` does, and
        `Unavailable` where what was read for one program would go to another."""
        old = self.target
        if self.resolve is None or not (old.link.closed or old.link.is_draining):
            return self
        target = self.resolve()
        new, known = target.manifest, old.manifest
        if (new.schema, new.text) != (known.schema, known.text):
            raise Unavailable(
                f"Version {target.version_number} took the place of version {old.version_number} "
                "while this request came in, and takes other inputs; try again.",
                code="version_replaced",
                retry_after_seconds=1,
            )
        return msgspec.structs.replace(self, target=target)

    def admit_record(self, rates: Rates, **counts: int) -> AdmitRecord:
        principal, target = self.principal, self.target
        return AdmitRecord(
            request_id=self.request_id,
            organization_id=principal.organization_id,
            api_key_id=principal.api_key_id,
            api_key_name=principal.api_key_name,
            endpoint_name=target.endpoint_name,
            version_number=target.version_number,
            route=self.route,
            kind=target.manifest.kind,
            service_class=self.service_class,
            price_book_id=rates.book_id,
            started_at_ns=self.started_at_ns,
            **counts,
        )


class Relay:
    """One per process. Call `recover` before the first request and `close` after the last."""

    def __init__(
        self,
        journal: Journal,
        prices: PriceTable,
        accounts: AccountWriter,
        *,
        timeout_seconds: float,
    ) -> None:
        self._journal = journal
        self._prices = prices
        self._accounts = accounts
        self._timeout_seconds = timeout_seconds
        self._running: set[asyncio.Task[Any]] = set()

    async def recover(self, usages: list[Usage]) -> None:
        """Settles what an earlier process left in the journal and frees the holds it left."""
        for usage in usages:
            book = self._prices.book(usage.admitted.price_book_id)
            if book is None:
                log.error("%s: its price book is gone", usage.admitted.request_id)
                continue
            admitted = usage.admitted
            rates = book.rates(admitted.endpoint_name, admitted.service_class)
            self._accounts.settle(rate(usage, rates))
        await self._accounts.flush()
        known = {usage.admitted.request_id for usage in usages}
        num_freed = await self._accounts.release_orphans(known)
        if usages or num_freed:
            log.warning(
                "settled %d requests of an earlier run (%d of them lost); freed %d other holds",
                len(usages),
                sum(usage.outcome == "lost" for usage in usages),
                num_freed,
            )

    async def close(self) -> None:
        """Returns when every request is settled; the fleet, closed before, has ended them all."""
        while self._running:
            await asyncio.wait(self._running)

    async def settled(self) -> None:
        """Returns when every request that has ended is in the database."""
        await self._accounts.flush()

    # --- decoders -------------------------------------------------------------------------

    def generate(self, call: Call, request: Generate) -> Execution:
        """`started` of what is returned tells once the request runs, or raises what its replica
        or its account has against it."""
        execution = Execution(call.request_id, call.target.link, is_stream=call.is_stream)
        self._own(self._generate(execution, call, request))
        return execution

    async def _generate(self, execution: Execution, call: Call, request: Generate) -> None:
        """From admission to settlement. Never raises: its execution tells what happened."""
        loop = asyncio.get_running_loop()
        seconds = self._timeout_seconds
        expiry = loop.call_later(seconds, execution.expire, timed_out(seconds))
        try:
            rates = self._prices.rates(call.target.endpoint_name, call.service_class)
            tally = await self._admit(execution, call, request, rates)
            await self._follow(execution, tally, rates)
        except AppError as error:
            execution.fail(error)
        except Exception:
            log.exception("%s failed", call.request_id)
            execution.fail(AppError("Something went wrong inside the box; this costs nothing."))
        finally:
            expiry.cancel()

    async def _admit(
        self, execution: Execution, call: Call, request: Generate, rates: Rates
    ) -> Tally:
        """Prepares, holds the worst case, records, starts."""
        link = call.target.link
        prepared = await link.prepare(request)
        num_prompt_tokens = prepared.num_prompt_tokens
        worst = decoder_worst_case(
            rates, num_prompt_tokens, prepared.max_tokens, request.num_choices
        )
        try:
            await self._hold(call, worst)
            if execution.is_cancelled:
                self._accounts.void(call.request_id)
                raise client_left()
        except AppError:
            link.cancel(call.request_id)
            raise
        record = call.admit_record(
            rates, num_prompt_tokens=num_prompt_tokens, num_choices=request.num_choices
        )
        self._journal.admit(record)
        link.start(call.request_id)
        tally = Tally(record)
        execution.start(tally)
        return tally

    async def _hold(self, call: Call, amount_nano: int) -> None:
        organization_id = call.principal.organization_id
        try:
            async with asyncio.timeout(HOLD_SECONDS):
                await self._accounts.hold(call.request_id, organization_id, amount_nano)
        except TimeoutError:
            self._accounts.void(call.request_id)  # it may still be taken
            raise Unavailable(
                "The box cannot reserve the money for this request at the moment.",
                code="accounts_unavailable",
                retry_after_seconds=5,
            ) from None

    async def _follow(self, execution: Execution, tally: Tally, rates: Rates) -> None:
        """Counts and hands on what the replica sends. The settlement is queued before the last
        output is handed on, so that whoever acts on it finds the money freed."""
        try:
            async for outputs in execution.link.outputs(execution.request_id):
                at_ns = time.time_ns()
                for output in outputs:
                    tally.add(use_of(output), at_ns)
                if tally.is_finished:
                    error = self._settle_generation(execution, tally, rates)
                    execution.push(outputs)
                    execution.end(error)
                    return
                execution.push(outputs)
        except AppError as error:
            self._settle(tally, rates, "failed", error.code)
            raise
        except Exception:
            self._settle(tally, rates, "failed", "internal_error")
            raise
        raise AssertionError("the replica's outputs ended before the request did")

    def _settle_generation(
        self, execution: Execution, tally: Tally, rates: Rates
    ) -> AppError | None:
        """Settles by how the sequences ended and who wanted that. Returns what to tell the
        caller where the end is not theirs to see as an answer."""
        outcome, reason = tally.outcome()
        if outcome == "completed":
            self._settle(tally, rates, outcome, reason)
            return None
        # What a stream delivered was had; an answer that never came was not.
        was_had = execution.is_stream and tally.num_output_tokens > 0
        if reason == "refused" and not execution.is_expired and not execution.is_cancelled:
            self._settle(tally, rates, "cancelled" if was_had else "failed", "grammar_too_complex")
            return grammar_refused()
        if outcome == "cancelled" and execution.is_expired:
            self._settle(tally, rates, "cancelled" if was_had else "failed", "timeout")
            return timed_out(self._timeout_seconds)
        if outcome == "cancelled" and execution.is_cancelled:
            self._settle(tally, rates, outcome, reason)
            return client_left()
        self._settle(tally, rates, "failed", reason)
        return aborted()

    # --- tensor programs ------------------------------------------------------------------

    def predict(self, call: Call, request: Predict) -> Prediction:
        """What is returned, awaited, gives the outputs and what they cost in device time."""
        prediction = Prediction(call.request_id, call.target.link)
        prediction.answer = self._own(self._predict(prediction, call, request))
        return prediction

    async def _predict(self, prediction: Prediction, call: Call, request: Predict) -> Answer:
        rates = self._prices.rates(call.target.endpoint_name, call.service_class)
        held_ms = max_device_ms(call.target, request, self._timeout_seconds)
        await self._hold(call, tensor_worst_case(rates, held_ms))
        try:
            if prediction.is_cancelled:
                raise client_left()
            call = call.renewed()
        except AppError:
            self._accounts.void(call.request_id)
            raise
        prediction.link = call.target.link
        tally = Tally(call.admit_record(rates, max_device_ms=held_ms))
        self._journal.admit(tally.admitted)
        try:
            predicted = await self._predict_in_time(call, request)
            tally.device_ns = predicted.device_ns
            record = FinishRecord(
                call.request_id, time.time_ns(), "completed", "stop", predicted.device_ns
            )
            await self._journal.finish(record)
        except AppError as error:
            tally.device_ns = 0
            if prediction.is_cancelled and error.code == "cancelled":
                self._settle(tally, rates, "cancelled", "abort")
            else:
                self._settle(tally, rates, "failed", error.code)
            raise
        except Exception:
            self._settle(tally, rates, "failed", "internal_error")
            raise
        usage = tally.usage("completed", "stop", record.at_ns)
        if usage.excess_device_ms:
            log.warning(
                "%s: %s took %d ms of device time, of which the hold of %d ms does not cover %d",
                *(call.request_id, call.target.endpoint_name, -(-tally.device_ns // 1_000_000)),
                *(held_ms, usage.excess_device_ms),
            )
        self._accounts.settle(rate(usage, rates))
        return predicted, usage

    async def _predict_in_time(self, call: Call, request: Predict) -> Predicted:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call.target.link.predict(request)
        except TimeoutError:
            raise timed_out(self._timeout_seconds) from None

    # --- embedders ------------------------------------------------------------------------

    def embed(self, call: Call, request: Embed) -> Embedding:
        """What is returned, awaited, gives the vectors and what they cost."""
        embedding = Embedding(call.request_id, call.target.link)
        embedding.answer = self._own(self._embed(embedding, call, request))
        return embedding

    async def _embed(self, embedding: Embedding, call: Call, request: Embed) -> EmbeddingAnswer:
        rates = self._prices.rates(call.target.endpoint_name, call.service_class)
        num_tokens = (await embedding.link.prepare(request)).num_prompt_tokens
        try:
            await self._hold(call, embedder_worst_case(rates, num_tokens))
            if embedding.is_cancelled:
                self._accounts.void(call.request_id)
                raise client_left()
        except AppError:
            embedding.link.cancel(call.request_id)
            raise
        tally = Tally(call.admit_record(rates, num_prompt_tokens=num_tokens))
        self._journal.admit(tally.admitted)
        embedding.link.start(call.request_id)
        try:
            embedded = await self._embedded_in_time(embedding)
            is_whole = bool(embedded.data)
            record = FinishRecord(
                call.request_id,
                time.time_ns(),
                "completed" if is_whole else "cancelled",
                "stop" if is_whole else "abort",
                embedded.device_ns,
                None if is_whole else sum(embedded.num_tokens),
            )
            await self._journal.finish(record)
        except AppError as error:
            if embedding.is_cancelled and error.code == "cancelled":
                self._settle(tally, rates, "cancelled", "abort")
            else:
                self._settle(tally, rates, "failed", error.code)
            raise
        except Exception:
            self._settle(tally, rates, "failed", "internal_error")
            raise
        tally.close(record)
        usage = tally.usage(record.outcome, record.finish_reason, record.at_ns)
        self._accounts.settle(rate(usage, rates))
        if not is_whole:
            raise client_left()
        return embedded, usage

    async def _embedded_in_time(self, embedding: Embedding) -> Embedded:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await embedding.link.embedded(embedding.request_id)
        except TimeoutError:
            embedding.cancel()
            raise timed_out(self._timeout_seconds) from None

    # --- all ------------------------------------------------------------------------------

    def _own(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._disown)
        return task

    def _disown(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked has it, or has gone

    def _settle(self, tally: Tally, rates: Rates, outcome: Outcome, reason: str) -> None:
        """Queues the settlement; an end that the steps do not show is put on record first."""
        at_ns = time.time_ns()
        if (outcome, reason) != tally.outcome():
            request_id = tally.admitted.request_id
            self._journal.note_finish(FinishRecord(request_id, at_ns, outcome, reason))
        self._accounts.settle(rate(tally.usage(outcome, reason, at_ns), rates))
