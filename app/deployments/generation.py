"""One generation on a worker, as the gateway follows it: what it may still claim, and the outputs
that wait to be read."""

import asyncio
from collections import deque

from app.core.errors import AppError
from app.deployments.claims import (
    MAX_TOKEN_CHARS,
    FalseClaim,
    check_device_time,
    check_prepared,
    copy_of,
)
from runtime.protocol import Generate, Manifest, Prepared, SamplingParams, SequenceOutput


class Generation:
    """Counts are advanced by `check` when a frame arrives, and the outputs by `deliver` once they
    are durable."""

    __slots__ = (
        "_choice_tokens",
        "_device_ns",
        "_error",
        "_num_chars",
        "_num_outputs",
        "_num_to_deliver",
        "_steps",
        "_unfinished",
        "_waiter",
        "is_failed",
        "is_metered",
        "prepared",
        "preparing",
        "request",
        "started_ns",
    )

    def __init__(self, request: Generate, preparing: "asyncio.Future[Prepared]") -> None:
        self.request = request
        self.preparing = preparing
        self.prepared: Prepared | None = None
        self.started_ns: int | None = None
        self.is_metered = False  # its prompt is counted: see `metered.py`
        self.is_failed = False  # reported so; outputs before the failure may still be on their way
        self._unfinished = set(range(request.num_choices))
        self._choice_tokens = [0] * request.num_choices
        self._num_outputs = 0
        self._num_chars = 0
        self._device_ns = 0
        self._steps: deque[list[SequenceOutput]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: AppError | None = None
        self._num_to_deliver = request.num_choices  # choices whose end has not been delivered

    def check_prepared(self, prepared: Prepared, manifest: Manifest) -> None:
        """Raises `RuntimeFailure` for a count that cannot be, `FalseClaim` for a program that
        generates nothing."""
        if manifest.decoder is None:
            raise FalseClaim("prepared text for a program that generates none")
        check_prepared(prepared, self.request, manifest.decoder)

    def check(self, output: SequenceOutput, now_ns: int, vocab_size: int, num_devices: int) -> None:
        """Raises `FalseClaim` when this output cannot follow what came before."""
        prepared = self.prepared
        if prepared is None or self.started_ns is None or self.is_failed:
            raise FalseClaim("sent output of a request that does not run")
        choice = output.choice
        if choice not in self._unfinished:
            raise FalseClaim(f"sent output of choice {choice}, which is finished or unknown")
        self._choice_tokens[choice] += len(output.token_ids)
        if self._choice_tokens[choice] > prepared.max_tokens:
            raise FalseClaim(f"sent more than the {prepared.max_tokens} tokens it announced")
        if not 0 <= output.num_cached_tokens <= prepared.num_prompt_tokens:
            raise FalseClaim(f"claimed {output.num_cached_tokens} cached tokens")
        if any(not 0 <= token_id < vocab_size for token_id in output.token_ids):
            raise FalseClaim("sent a token that its vocabulary lacks")
        if output.device_ns < 0:
            raise FalseClaim("claimed negative device time")
        self._device_ns += output.device_ns
        check_device_time(self._device_ns, now_ns - self.started_ns, num_devices)
        self._check_size(output, prepared)
        is_constrained = self.request.json_schema is not None or bool(self.request.tools)
        if output.finish_reason == "refused" and not is_constrained:
            raise FalseClaim("refused to follow a schema that it was not given")
        if output.stop_string not in (None, *self.request.sampling.stop):
            raise FalseClaim("stopped at a string that it was not given")
        if output.finish_reason is not None:
            self._unfinished.discard(choice)

    def _check_size(self, output: SequenceOutput, prepared: Prepared) -> None:
        """Bounds what unread outputs can hold of this process's memory."""
        num_choices = len(self._choice_tokens)
        num_tokens = prepared.num_prompt_tokens + prepared.max_tokens * num_choices
        self._num_outputs += 1
        self._num_chars += len(output.text)
        if output.logprobs is not None:
            if len(output.logprobs) > len(output.token_ids) + prepared.num_prompt_tokens:
                raise FalseClaim("sent more logprobs than tokens")
            self._num_chars += sum(
                len(entry.text) + sum(len(text) for _, text, _ in entry.top)
                for entry in output.logprobs
            )
        entries = 2 + (self.request.sampling.logprobs or 0)
        if self._num_outputs > 2 * num_tokens * num_choices + 1024:
            raise FalseClaim("sent output without end")
        if self._num_chars > MAX_TOKEN_CHARS * entries * (num_tokens + num_choices):
            raise FalseClaim("sent more text than its tokens can hold")

    @property
    def is_received(self) -> bool:
        """The worker has nothing more to say: every choice ended, or all of it failed."""
        return self.is_failed or not self._unfinished

    @property
    def is_delivered(self) -> bool:
        """The end of every choice has been delivered."""
        return self._num_to_deliver == 0

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        self._steps.append(outputs)
        self._num_to_deliver -= sum(output.finish_reason is not None for output in outputs)
        self._wake()

    def fail(self, error: AppError) -> None:
        """What was delivered before can still be read."""
        self.is_failed = True
        self._error = self._error or error
        if not self.preparing.done():
            self.preparing.set_exception(copy_of(error))
        self._wake()

    async def next_step(self) -> list[SequenceOutput]:
        """May be cancelled, as by a time limit, without losing anything."""
        while True:
            if self._steps:
                return self._steps.popleft()
            if self.is_delivered:
                raise StopAsyncIteration
            if self._error is not None:
                raise copy_of(self._error)
            self._waiter = self.preparing.get_loop().create_future()
            await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Outputs:
    """Iterates over a generation's steps. Unlike a generator it survives a cancelled `anext`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __aiter__(self) -> "Outputs":
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        return await self._generation.next_step()


def lost_generation(
    loop: asyncio.AbstractEventLoop, request_id: str, error: AppError
) -> Generation:
    """Stands for a request whose replica went before its outputs were asked for."""
    preparing: asyncio.Future[Prepared] = loop.create_future()
    preparing.cancel()
    request = Generate(request_id=request_id, sampling=SamplingParams(), cache_salt=b"")
    generation = Generation(request, preparing)
    generation.fail(error)
    return generation
