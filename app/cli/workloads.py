"""What a decoder's speed is measured with: the same requests for every server that speaks OpenAI's
`/v1/completions` with token ids.

Owns the requests and the figures of each workload. Which server, and what is printed, is the
caller's affair.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httpx

TIMEOUT_SECONDS = 900.0


class WorkloadError(Exception):
    """The server refused a request or went away; the text says what it said."""


@dataclass(frozen=True)
class Completion:
    """One answered request. Times are seconds from sending it."""

    prompt_tokens: int
    cached_tokens: int
    token_ids: list[int]
    seconds: float
    first_token_seconds: float | None = None


class Endpoint:
    """One model of one server, and the connections to it."""

    def __init__(self, url: str, key: str, model: str, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._model = model
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT_SECONDS,
            limits=httpx.Limits(max_connections=None),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def complete(self, prompt: list[int], max_tokens: int) -> Completion:
        """Greedy, exactly `max_tokens` long. Raises `WorkloadError`."""
        started = time.perf_counter()
        try:
            response = await self._http.post("/v1/completions", json=self._body(prompt, max_tokens))
        except httpx.TransportError as error:
            raise WorkloadError(f"the server went away: {error}") from error
        _check(response)
        answer: dict[str, Any] = response.json()
        details: dict[str, int] = answer["usage"].get("prompt_tokens_details") or {}
        return Completion(
            prompt_tokens=answer["usage"]["prompt_tokens"],
            cached_tokens=details.get("cached_tokens", 0),
            token_ids=answer["choices"][0]["token_ids"],
            seconds=time.perf_counter() - started,
        )

    async def stream(self, prompt: list[int], max_tokens: int) -> Completion:
        """The same as a stream, with the time of its first token. Raises `WorkloadError`."""
        body = self._body(prompt, max_tokens) | {"stream": True}
        token_ids: list[int] = []
        started = time.perf_counter()
        first: float | None = None
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    _check(response)
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise WorkloadError(f"the stream broke off: {_told(event['error'])}")
                    for choice in event.get("choices", ()):
                        token_ids += choice.get("token_ids") or []
                    if token_ids and first is None:
                        first = time.perf_counter() - started
        except httpx.TransportError as error:
            raise WorkloadError(f"the server went away: {error}") from error
        return Completion(
            prompt_tokens=len(prompt),
            cached_tokens=0,
            token_ids=token_ids,
            seconds=time.perf_counter() - started,
            first_token_seconds=first,
        )

    def _body(self, prompt: list[int], max_tokens: int) -> dict[str, object]:
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }


def _told(error: Any) -> str:
    if isinstance(error, dict):
        error = cast("dict[str, Any]", error).get("message", cast("object", error))
    return str(error)[:300]


def _check(response: httpx.Response) -> None:
    if not response.is_success:
        raise WorkloadError(f"HTTP {response.status_code}: {response.text[:300]}")


@dataclass(frozen=True)
class Result:
    """What one run of a workload gave. `value` is in `unit`; more is better."""

    name: str
    value: float
    unit: str
    seconds: float
    prompt_tokens: int
    computed_tokens: int  # prompt tokens that no cache served
    output_tokens: int
    first_token_ms: float | None = None
    answers: list[list[int]] = field(default_factory=list[list[int]])


@dataclass(frozen=True)
class Shape:
    """How much each workload sends, in tokens; `within` makes it fit a shorter context."""

    alone: int = 32
    alone_new: int = 128
    shared: int = 1000
    own: int = 50
    shared_new: int = 16
    turn: int = 60
    turn_new: int = 24
    random: int = 256
    random_new: int = 64

    @classmethod
    def within(cls, max_context_tokens: int) -> "Shape":
        """The usual shape, every length divided by the same number if the context is short."""
        usual = cls()
        longest = max(
            usual.alone + usual.alone_new,
            usual.shared + usual.own + usual.shared_new,
            NUM_TURNS * (usual.turn + usual.turn_new),
            usual.random + usual.random_new,
        )
        share = min(1.0, max_context_tokens / (longest + 1))
        lengths = {name: max(1, int(value * share)) for name, value in vars(usual).items()}
        return cls(**lengths)


NUM_TURNS = 6
NUM_CHATS = 8


class Workloads:
    """The five, each run by a method on fresh random tokens, so that nothing is known before."""

    def __init__(self, endpoint: Endpoint, shape: Shape, seed: int) -> None:
        self._endpoint = endpoint
        self._shape = shape
        self._random = random.Random(seed)  # noqa: S311 - prompts, not secrets
        self._shared: list[int] = []

    def _tokens(self, count: int) -> list[int]:
        """Of the middle of the vocabulary, where special tokens are rare."""
        size = self._endpoint.vocab_size
        return [self._random.randrange(size // 8, size) for _ in range(count)]

    async def one_stream(self) -> Result:
        """Tokens per second of a single stream, after its first token."""
        shape = self._shape
        started = time.perf_counter()
        done = await self._endpoint.stream(self._tokens(shape.alone), shape.alone_new)
        first = done.first_token_seconds or done.seconds
        rate = (len(done.token_ids) - 1) / max(done.seconds - first, 1e-9)
        return _result("one stream", [done], started, value=rate, unit="tok/s")

    async def shared_prefix_unseen(self) -> Result:
        """64 requests, 16 at once, that share a prefix nobody has sent before."""
        self._shared = self._tokens(self._shape.shared)
        return await self._on_shared_prefix("shared prefix, unseen")

    async def shared_prefix_warm(self) -> Result:
        """The same prefix once more, with other tokens after it."""
        return await self._on_shared_prefix("shared prefix, warm")

    async def _on_shared_prefix(self, name: str) -> Result:
        shape = self._shape
        prompts = [self._shared + self._tokens(shape.own) for _ in range(64)]
        return await self._many(name, prompts, shape.shared_new, 16, unit="req/s")

    async def chats(self) -> Result:
        """8 conversations of 6 turns side by side; each turn sends the whole conversation."""
        started = time.perf_counter()
        turns = [
            [self._tokens(self._shape.turn) for _ in range(NUM_TURNS)] for _ in range(NUM_CHATS)
        ]
        done = await asyncio.gather(*(self._chat(parts) for parts in turns))
        flat = [completion for chat in done for completion in chat]
        return _result("chats", flat, started, unit="req/s")

    async def _chat(self, turns: list[list[int]]) -> list[Completion]:
        conversation: list[int] = []
        done: list[Completion] = []
        for tokens in turns:
            conversation += tokens
            answer = await self._endpoint.complete(conversation, self._shape.turn_new)
            conversation += answer.token_ids
            done.append(answer)
        return done

    async def unrelated(self) -> Result:
        """32 requests, 16 at once, that share nothing."""
        shape = self._shape
        prompts = [self._tokens(shape.random) for _ in range(32)]
        return await self._many("random", prompts, shape.random_new, 16, unit="tok/s")

    async def _many(
        self, name: str, prompts: Sequence[list[int]], max_tokens: int, limit: int, unit: str
    ) -> Result:
        slots = asyncio.Semaphore(limit)

        async def one(prompt: list[int]) -> Completion:
            async with slots:
                return await self._endpoint.complete(prompt, max_tokens)

        started = time.perf_counter()
        done = await asyncio.gather(*map(one, prompts))
        return _result(name, done, started, unit=unit)

    @property
    def all(self) -> list[Callable[[], Awaitable[Result]]]:
        """In the order they are to be run: the warm prefix is that of the unseen one."""
        return [
            self.one_stream,
            self.shared_prefix_unseen,
            self.shared_prefix_warm,
            self.chats,
            self.unrelated,
        ]


def _result(
    name: str,
    done: Sequence[Completion],
    started: float,
    *,
    unit: str,
    value: float | None = None,
) -> Result:
    seconds = time.perf_counter() - started
    output_tokens = sum(len(completion.token_ids) for completion in done)
    if value is None:
        value = (len(done) if unit == "req/s" else output_tokens) / seconds
    firsts = [c.first_token_seconds for c in done if c.first_token_seconds is not None]
    return Result(
        name=name,
        value=value,
        unit=unit,
        seconds=seconds,
        prompt_tokens=sum(completion.prompt_tokens for completion in done),
        computed_tokens=sum(c.prompt_tokens - c.cached_tokens for c in done),
        output_tokens=output_tokens,
        first_token_ms=statistics.median(firsts) * 1e3 if firsts else None,
        answers=[completion.token_ids for completion in done],
    )
