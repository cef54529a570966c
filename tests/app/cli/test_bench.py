"""`bench` sends what it says, and counts what the answers say."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from app.cli import bench
from app.cli.client import Refused
from app.cli.workloads import Endpoint, Result, Shape, WorkloadError, Workloads

VOCAB_SIZE = 100


class FakeServer:
    """Answers completions with token 7 again and again; caches a prompt it has seen whole."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.prompts: list[list[int]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.status != 200:
            return httpx.Response(self.status, text="no room")
        body = json.loads(request.content)
        prompt: list[int] = body["prompt"]
        cached = max((common(prompt, seen) for seen in self.prompts), default=0)
        self.prompts.append(prompt)
        token_ids = [7] * body["max_tokens"]
        if body.get("stream"):
            chunks = [json.dumps({"choices": [{"token_ids": [id_]}]}) for id_ in token_ids]
            text = "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"])
            return httpx.Response(200, text=text)
        usage = {
            "prompt_tokens": len(prompt),
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return httpx.Response(200, json={"usage": usage, "choices": [{"token_ids": token_ids}]})


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def endpoint(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> Endpoint:
    made = httpx.AsyncClient

    def client(**options: Any) -> httpx.AsyncClient:
        return made(**options | {"transport": httpx.MockTransport(server)})

    monkeypatch.setattr(httpx, "AsyncClient", client)
    return Endpoint("http://box", "key", "model", VOCAB_SIZE)


class BreakingServer(FakeServer):
    """Starts a stream, then tells of a failure in it."""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        events = [{"choices": [{"token_ids": [7]}]}, {"error": {"message": "the worker ended"}}]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(200, text=text)


async def run_all(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> list[Result]:
    workloads = Workloads(endpoint(monkeypatch, server), Shape(), seed=1)
    return [await workload() for workload in workloads.all]


async def test_every_workload_sends_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    alone, unseen, warm, chats, unrelated = await run_all(monkeypatch, server)
    assert len(server.prompts) == 1 + 64 + 64 + 48 + 32
    assert (alone.output_tokens, alone.prompt_tokens) == (128, 32)
    assert alone.first_token_ms is not None
    assert (unseen.prompt_tokens, unseen.output_tokens) == (64 * 1050, 64 * 16)
    assert unseen.computed_tokens <= 1000 + 64 * 50
    assert warm.computed_tokens <= 64 * 50
    assert chats.prompt_tokens == 8 * sum(60 * (turn + 1) + 24 * turn for turn in range(6))
    assert unrelated.output_tokens == 32 * 64
    assert all(min(prompt) >= VOCAB_SIZE // 8 for prompt in server.prompts[:1])


async def test_a_refusal_is_told_in_the_servers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match="HTTP 507: no room"):
        await run_all(monkeypatch, FakeServer(507))


async def test_an_error_within_a_stream_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match="broke off: the worker ended"):
        await run_all(monkeypatch, BreakingServer())


def test_no_rounds_at_all_are_refused() -> None:
    result = CliRunner().invoke(bench.bench, ["model", "--rounds", "0"])
    assert result.exit_code == 2
    assert "'--rounds': 0 is not in the range x>=1" in result.output


def test_a_short_context_gets_shorter_prompts() -> None:
    shape = Shape.within(256)
    assert shape.shared + shape.own + shape.shared_new <= 256
    assert 6 * (shape.turn + shape.turn_new) <= 256
    assert Shape.within(4096) == Shape()
    assert min(vars(Shape.within(8)).values()) == 1


def test_zeros_have_the_smallest_shape() -> None:
    spec = {"dtype": "float32", "shape": [None, 2], "min_shape": None}
    assert bench.zeros(spec) == [[0, 0]]
    assert bench.zeros({"dtype": "bool", "shape": [None], "min_shape": [3]}) == [False] * 3


async def test_requests_are_counted_and_refusals_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneBox:
        url = "http://box"

        @staticmethod
        def checked(response: httpx.Response) -> httpx.Response:
            if not response.is_success:
                raise Refused(response.text)
            return response

    monkeypatch.setenv("TAPEOUT_API_KEY", "key")
    monkeypatch.setattr(bench, "NUM_REQUESTS", 8)
    server = FakeServer(200)
    made = httpx.AsyncClient
    answers: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        answers.append(request)
        return httpx.Response(server.status, text="no room")

    monkeypatch.setattr(
        httpx,
        "AsyncClient",
        lambda **options: made(**options | {"transport": httpx.MockTransport(answer)}),
    )
    box: Any = OneBox()
    seconds, latencies = await bench.send_many(box, "/p", dict, 4)
    assert len(latencies) == len(answers) == 8
    assert seconds > 0
    server.status = 503
    with pytest.raises(Refused, match="no room"):
        await asyncio.wait_for(bench.send_many(box, "/p", dict, 1), 10)
