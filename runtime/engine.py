"""The decoder engine: requests in, a step at a time, token ids and text out.

Owns the life of a request between scheduler, runner, sampler and text. Does not own threads,
sockets (server) or devices (runtime.execution). `prepare` may be called from any thread;
everything else from the one that steps.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from runtime.execution.batch import StepBatch
from runtime.execution.sampler import SampledToken, Sampler, SamplingFailure
from runtime.protocol import (
    DecoderInfo,
    FinishReason,
    Generate,
    SequenceOutput,
    Stats,
    TokenLogprob,
)
from runtime.scheduling.scheduler import Scheduler, StepPlan
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.validation import (
    RequestError,
    check_sampling,
    check_vocabulary,
    refusal,
)
from runtime.text.chat import ChatTemplate, ChatTemplateError
from runtime.text.stream import TextStream
from runtime.text.tokenizer import Tokenizer

__all__ = ["DecoderEngine", "PreparedRequest", "RequestError", "StepRunner"]

MAX_CHOICES = 128

log = logging.getLogger(__name__)


class StepRunner(Protocol):
    def run(self, batch: StepBatch) -> Tensor:
        """Write every token's K/V to its slot; float32 logits [sampled, vocab] in the order of
        `batch.sample_indices`, on any device. Running the same batch again must be harmless."""
        ...


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A valid request, ready to run. `max_tokens` is per choice: the request's own limit or what
    is left of the context, whichever is less."""

    generate: Generate
    token_ids: list[int]
    max_tokens: int

    @property
    def request_id(self) -> str:
        return self.generate.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(eq=False, slots=True)
class Delivery:
    """What is on its way to the caller of one sequence."""

    sequence: Sequence
    stream: TextStream | None  # None without a tokenizer
    echo: str = ""
    device_ns: int = 0
    is_first: bool = True


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
        scheduler: Scheduler,
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
        self._sampler = Sampler()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._vocab_size = info.vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            self._eos_token_ids |= {tokenizer.eos_token_id}
        self._sequence_ids = count()
        self._requests: dict[str, list[Delivery]] = {}  # what is alive of each
        self._deliveries: dict[int, Delivery] = {}  # by sequence id
        self._aborted: list[Delivery] = []
        self._totals = Totals()

    # --- before a request runs ----------------------------------------------------------

    def prepare(self, generate: Generate) -> PreparedRequest:
        """Tokenise and validate. Raises `RequestError`. Thread-safe."""
        params = generate.sampling
        check_sampling(params, self._vocab_size, has_tokenizer=self._tokenizer is not None)
        if not 1 <= generate.num_choices <= MAX_CHOICES:
            raise refusal(f"n must be 1 to {MAX_CHOICES}, not {generate.num_choices}", "n")
        if generate.echo and params.logprobs is not None:
            raise refusal("logprobs of an echoed prompt are not supported", "echo")
        param = "prompt" if generate.messages is None else "messages"
        token_ids = self._tokenise(generate)
        if not token_ids:
            raise refusal("the prompt is empty: it must have at least one token", param)
        self._check_length(len(token_ids), param)
        check_vocabulary(token_ids, self._vocab_size, param)
        num_left = self.max_sequence_tokens - len(token_ids)
        return PreparedRequest(generate, token_ids, min(params.max_tokens, num_left))

    def _tokenise(self, generate: Generate) -> list[int]:
        given = (generate.text, generate.token_ids, generate.messages)
        if sum(each is not None for each in given) != 1:
            raise refusal("give exactly one of text, token ids and messages", "prompt")
        if generate.token_ids is not None:
            return generate.token_ids
        if self._tokenizer is None:
            raise refusal("this model has no tokenizer; send the prompt as token ids", "prompt")
        if generate.text is not None:
            self._check_length(self._tokenizer.num_tokens_at_least(generate.text), "prompt")
            return self._tokenizer.encode(generate.text)
        assert generate.messages is not None
        if self._chat_template is None:
            raise refusal("this model has no chat template; use plain completions", "messages")
        if not generate.messages:
            raise refusal("messages must hold at least one message", "messages")
        try:
            text = self._chat_template.render(generate.messages)
        except ChatTemplateError as error:
            raise refusal(str(error), "messages") from error
        return self._tokenizer.encode(text, is_templated=True)

    def _check_length(self, num_tokens: int, param: str) -> None:
        if num_tokens >= self.max_sequence_tokens:
            raise refusal(
                f"the prompt has {num_tokens} tokens or more; with at least one token to generate, "
                f"it may have {self.max_sequence_tokens - 1}",
                param,
                code="context_length_exceeded",
            )

    # --- while it runs ------------------------------------------------------------------

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
            delivery = Delivery(sequence, self._make_stream(prepared))
            if generate.echo:
                delivery.echo = self._echo(prepared)
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
        pool = self.scheduler.pool
        return Stats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            used_blocks=pool.num_used,
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
        `error`. When a step fails as a whole, its sequences run one by one, so that only those
        fail that fail alone."""
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
                self.scheduler.finish(sequence, "error")
        return sampled

    def _run(self, plan: StepPlan) -> dict[Sequence, SampledToken | SamplingFailure]:
        logits = self._runner.run(StepBatch.from_plan(plan, self.scheduler.block_size))
        sequences = [item.sequence for item in plan.items if item.is_sampled]
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
        """The sequence's output of this step: its new token, if any, and its end, if it ended."""
        sequence = delivery.sequence
        token_ids = [] if token is None else [token.token_id]
        text, reason = self._read(delivery, token_ids)
        output = SequenceOutput(
            request_id=sequence.request_id,
            choice=sequence.choice,
            token_ids=token_ids,
            text=delivery.echo + text,
            num_cached_tokens=sequence.num_cached_tokens,
            device_ns=delivery.device_ns,
            logprobs=None if token is None else self._describe(sequence, token),
            finish_reason=reason,
        )
        self._count(delivery, output)
        return output

    def _read(self, delivery: Delivery, token_ids: list[int]) -> tuple[str, FinishReason | None]:
        """The new text, and why the sequence ended, if it did. A tokenizer that fails on its
        tokens ends this sequence alone."""
        sequence, stream = delivery.sequence, delivery.stream
        if stream is None:
            return "", sequence.finish_reason
        if sequence.finish_reason == "stop":  # by its last token, which is no part of the text
            token_ids = []
        try:
            text = stream.add(token_ids)
            if stream.is_stopped:
                self.scheduler.finish(sequence, "stop")
            if sequence.is_finished:
                text += stream.flush()
        except Exception:  # someone else's tokenizer may raise anything
            log.exception("request %s: its text cannot be read", sequence.request_id)
            self.scheduler.finish(sequence, "error")
            return "", "error"
        return text, "stop" if stream.is_stopped else sequence.finish_reason

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

    def _describe(self, sequence: Sequence, token: SampledToken) -> list[TokenLogprob] | None:
        if token.logprob is None:
            return None
        top = [(id_, self._token_text(id_), logprob) for id_, logprob in token.top]
        text = self._token_text(token.token_id)
        return [TokenLogprob(token_id=token.token_id, text=text, logprob=token.logprob, top=top)]

    def _token_text(self, token_id: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def _make_stream(self, prepared: PreparedRequest) -> TextStream | None:
        if self._tokenizer is None:
            return None
        return TextStream(self._tokenizer, prepared.token_ids, prepared.generate.sampling.stop)

    def _echo(self, prepared: PreparedRequest) -> str:
        if prepared.generate.text is not None or self._tokenizer is None:
            return prepared.generate.text or ""
        return self._tokenizer.decode(prepared.token_ids)
