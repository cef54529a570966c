"""Steps a decoder: scheduler, runner, sampler and delivery, one after the other.

Owns the life of a request while it runs, and what fails with it. Does not own threads, sockets
(server) or devices (runtime.execution). `prepare` may be called from any thread; everything else
from the one that steps.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from runtime.engine.delivery import Deliverer, Delivery
from runtime.engine.preparation import Preparation, PreparedRequest
from runtime.execution.batch import StepBatch
from runtime.execution.sampler import SampledToken, Sampler, SamplingFailure
from runtime.protocol import DecoderInfo, FinishReason, Generate, SequenceOutput, Stats
from runtime.scheduling.plan import BlockMoves, CacheStats, StepPlan
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.validation import refusal
from runtime.text.chat import ChatTemplate
from runtime.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class StepRunner(Protocol):
    def move(self, moves: BlockMoves) -> None:
        """Move blocks, before `run`, and once. What fails here is lost for everyone."""
        ...

    def run(self, batch: StepBatch) -> Tensor:
        """Write every token's K/V to its slot; float32 logits [sampled, vocab] in the order of
        `batch.sample_indices`, on any device. Running the same batch again must be harmless."""
        ...


class StepScheduler(Protocol):
    """`Scheduler`, or `WholeScheduler` for a model without a cache; see there."""

    @property
    def block_size(self) -> int: ...
    @property
    def max_sequence_tokens(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def has_work(self) -> bool: ...
    def cache_stats(self) -> CacheStats: ...
    def add(self, sequence: Sequence) -> None: ...
    def abort(self, sequence: Sequence) -> None: ...
    def finish(self, sequence: Sequence, reason: FinishReason) -> None: ...
    def schedule(self) -> StepPlan | None: ...
    def commit(self, plan: StepPlan, sampled_token_ids: dict[int, int]) -> None: ...
    def check_integrity(self) -> None: ...


@dataclass(slots=True)
class Totals:
    """Counted since start. A request's prompt counts once, whatever its number of choices."""

    requests: int = 0
    runs: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    device_ns: int = 0


class DecoderEngine:
    def __init__(
        self,
        runner: StepRunner,
        scheduler: StepScheduler,
        tokenizer: Tokenizer | None,
        *,
        info: DecoderInfo,
        chat_template: ChatTemplate | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        """`eos_token_ids` are the model's; the tokenizer's own is added to them."""
        self.scheduler = scheduler
        self.max_sequence_tokens = min(info.max_context_tokens, scheduler.max_sequence_tokens)
        self._runner = runner
        self._sampler = Sampler(info.num_ids)
        self._eos_token_ids = frozenset(eos_token_ids)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            self._eos_token_ids |= {tokenizer.eos_token_id}
        self._preparation = Preparation(
            tokenizer,
            chat_template,
            num_ids=info.num_ids,
            max_sequence_tokens=self.max_sequence_tokens,
            eos_token_ids=self._eos_token_ids,
        )
        self._deliverer = Deliverer(tokenizer, scheduler.finish)
        self._sequence_ids = count()
        self._requests: dict[str, list[Delivery]] = {}  # what is alive of each
        self._deliveries: dict[int, Delivery] = {}  # by sequence id
        self._aborted: list[Delivery] = []
        self._totals = Totals()

    def prepare(self, generate: Generate) -> PreparedRequest:
        """Tokenise and validate. Raises `RequestError`. Thread-safe."""
        return self._preparation.prepare(generate)

    def to_compile(self, generate: Generate) -> bytes | None:
        """See `Preparation.to_compile`. Thread-safe."""
        return self._preparation.to_compile(generate)

    def add(self, prepared: PreparedRequest) -> None:
        """Queue every choice of the request. Raises `RequestError` for an id that is in use."""
        generate, params = prepared.generate, prepared.generate.sampling
        if generate.request_id in self._requests:
            raise refusal(f"request {generate.request_id} is running", None, "duplicate_request")
        eos_token_ids = frozenset[int]() if params.ignore_eos else self._eos_token_ids
        deliveries = self._requests[generate.request_id] = []
        for choice in range(generate.num_choices):
            sequence = Sequence(
                sequence_id=next(self._sequence_ids),
                request_id=generate.request_id,
                choice=choice,
                token_ids=list(prepared.token_ids),
                num_prompt_tokens=prepared.num_prompt_tokens,
                max_tokens=prepared.max_tokens,
                sampling=params,
                cache_salt=generate.cache_salt,
                stop_token_ids=eos_token_ids | frozenset(params.stop_token_ids),
                service_class=generate.service_class,
                fairness_key=generate.fairness_key,
            )
            if params.seed is not None:
                sequence.seed = params.seed
            if deliveries:  # hashing a long prompt again for every choice would hold up the others
                sequence.block_keys = list(deliveries[0].sequence.block_keys)
            delivery = self._deliverer.open(sequence, prepared)
            if delivery.grammar is not None:
                self._sampler.constrain(sequence, delivery.grammar)
            deliveries.append(delivery)
            self._deliveries[sequence.sequence_id] = delivery
            self.scheduler.add(sequence)
        self._totals.requests += 1

    def abort(self, request_id: str) -> None:
        """End the request now; its next outputs, from `step`, are its last. Idempotent."""
        for delivery in list(self._requests.get(request_id, ())):
            if not delivery.sequence.is_finished:
                self.scheduler.abort(delivery.sequence)
                self._aborted.append(delivery)

    def step(self) -> list[SequenceOutput]:
        """Run one step; what it added to each sequence, and the end of those aborted before."""
        outputs = [self._deliver(delivery, None) for delivery in self._take_aborted()]
        plan = self.scheduler.schedule()
        if plan is None:
            return outputs
        started_ns = time.perf_counter_ns()
        if plan.moves:
            self._runner.move(plan.moves)
        sampled = self._run_guarded(plan)
        self.scheduler.commit(plan, {id_: token.token_id for id_, token in sampled.items()})
        self._share_time(plan, time.perf_counter_ns() - started_ns)
        for item in plan.items:
            token = sampled.get(item.sequence.sequence_id)
            if token is not None or item.sequence.is_finished:
                outputs.append(self._deliver(self._deliveries[item.sequence.sequence_id], token))
        return outputs

    @property
    def has_work(self) -> bool:
        return bool(self._aborted) or self.scheduler.has_work

    def stats(self) -> Stats:
        return Stats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            **asdict(self.scheduler.cache_stats()),
            **asdict(self._totals),
        )

    def check_integrity(self) -> None:
        """Assert that no block and no sequence is lost."""
        self.scheduler.check_integrity()
        num_alive = self.scheduler.num_running + self.scheduler.num_waiting + len(self._aborted)
        assert len(self._deliveries) == num_alive
        assert sum(map(len, self._requests.values())) == num_alive

    # --- running ------------------------------------------------------------------------

    def _run_guarded(self, plan: StepPlan) -> dict[int, SampledToken]:
        """The plan's tokens by sequence id; sequences without one to come are finished as
        `error`, or `refused`. When a step fails as a whole, its sequences run one by one, so that
        only those fail that fail alone."""
        try:
            results = self._run(plan)
        except torch.AcceleratorError:  # the device is lost, for everyone
            raise
        except Exception as error:  # someone else's model may raise anything
            if len(plan.items) > 1:
                alone = (self._run_guarded(StepPlan([item])) for item in plan.items)
                return {id_: token for each in alone for id_, token in each.items()}
            # As an exception, for the log of a worker shows its type and place, never its text.
            log.exception("the model failed")
            reason = f"the model failed: {type(error).__name__}"
            results = {plan.items[0].sequence: SamplingFailure(reason)}
        sampled: dict[int, SampledToken] = {}
        for sequence, result in results.items():
            if isinstance(result, SampledToken):
                sampled[sequence.sequence_id] = result
            else:
                log.error("request %s: %s", sequence.request_id, result.message)
                self.scheduler.finish(sequence, "refused" if result.is_refusal else "error")
        return sampled

    def _run(self, plan: StepPlan) -> dict[Sequence, SampledToken | SamplingFailure]:
        sequences = [item.sequence for item in plan.items if item.is_sampled]
        self._sampler.begin(sequences)
        logits = self._runner.run(StepBatch.from_plan(plan, self.scheduler.block_size))
        if not sequences:
            return {}
        return dict(zip(sequences, self._sampler.sample(logits, sequences), strict=True))

    def _share_time(self, plan: StepPlan, elapsed_ns: int) -> None:
        num_tokens = plan.num_tokens
        for item in plan.items:
            share_ns = elapsed_ns * item.num_tokens // num_tokens
            self._deliveries[item.sequence.sequence_id].device_ns += share_ns
        self._totals.runs += 1
        self._totals.device_ns += elapsed_ns

    # --- delivering ---------------------------------------------------------------------

    def _take_aborted(self) -> list[Delivery]:
        aborted, self._aborted = self._aborted, []
        return aborted

    def _deliver(self, delivery: Delivery, token: SampledToken | None) -> SequenceOutput:
        output = self._deliverer.deliver(delivery, token)
        self._count(delivery, output)
        return output

    def _count(self, delivery: Delivery, output: SequenceOutput) -> None:
        sequence = delivery.sequence
        if delivery.is_first and sequence.choice == 0:
            self._totals.prompt_tokens += sequence.num_prompt_tokens
            self._totals.cached_tokens += sequence.num_cached_tokens
        self._totals.output_tokens += len(output.token_ids)
        delivery.is_first, delivery.echo, delivery.device_ns = False, "", 0
        if sequence.is_finished:
            del self._deliveries[sequence.sequence_id]
            alive = self._requests[sequence.request_id]
            alive.remove(delivery)
            if not alive:
                del self._requests[sequence.request_id]
