"""Embeddings over the link, against a worker played by the test."""

import asyncio
from typing import Any

import msgspec
import pytest

from app.core.errors import AppError, RuntimeFailure
from runtime.protocol import Cancel, Embed, Embedded, Failed, Prepared, Start, WireError
from tests.app.deployments.fake_process import EMBEDDER
from tests.app.deployments.test_link import Pair, connect, ledger

__all__ = ["connect", "ledger"]

EMBED = Embed(request_id="e", token_ids=[[1, 2, 3], [4]])
ANSWER = Embedded(request_id="e", dimensions=2, data=bytes(16), num_tokens=[3, 1], device_ns=1000)


@pytest.fixture
async def pair(connect: Any) -> Pair:
    return await (await connect(manifest=EMBEDDER)).get_ready(EMBEDDER)


async def prepared(pair: Pair, request: Embed, num_tokens: int) -> Prepared:
    preparing = asyncio.create_task(pair.link.prepare(request))
    assert await pair.worker.receive() == request
    pair.worker.send(
        Prepared(request_id=request.request_id, num_prompt_tokens=num_tokens, max_tokens=0)
    )
    return await preparing


async def started(pair: Pair) -> None:
    await prepared(pair, EMBED, 4)
    pair.link.start("e")
    assert await pair.worker.receive() == Start(request_id="e")


async def test_vectors_come_back(pair: Pair) -> None:
    await started(pair)
    assert pair.link.num_outstanding == 1
    pair.worker.send(ANSWER)
    assert await pair.link.embedded("e") == ANSWER
    assert pair.link.num_outstanding == 0


@pytest.mark.parametrize(
    ("request_", "num_tokens"),
    [
        (EMBED, 3),
        (EMBED, 5),
        (Embed(request_id="e", texts=["ab", "c"]), 1),
        (Embed(request_id="e", texts=["ab", "c"]), 24),
        (Embed(request_id="e", texts=["x" * 1000]), 17),
    ],
)
async def test_counts_that_cannot_be_are_refused_and_the_worker_kept(
    pair: Pair, request_: Embed, num_tokens: int
) -> None:
    with pytest.raises(RuntimeFailure) as caught:
        await prepared(pair, request_, num_tokens)
    assert caught.value.code == "implausible_token_count"
    assert await pair.worker.receive() == Cancel(request_id="e")
    assert not pair.link.closed


LIES: list[dict[str, Any]] = [
    {"dimensions": 3},
    {"data": bytes(12)},
    {"data": b""},
    {"num_tokens": [4]},
    {"num_tokens": [1, 3]},
    {"num_tokens": [3, 1, 0]},
    {"device_ns": -1},
    {"device_ns": 10**12},
    {"request_id": "nobody"},
]


@pytest.mark.parametrize("lie", LIES, ids=str)
async def test_a_lie_ends_the_link(pair: Pair, lie: dict[str, Any]) -> None:
    await started(pair)
    answer = asyncio.create_task(pair.link.embedded("e"))
    await asyncio.sleep(0)
    pair.worker.send(msgspec.structs.replace(ANSWER, **lie))
    with pytest.raises(AppError) as caught:
        await answer
    assert caught.value.code == "worker_untrusted"
    assert pair.link.closed


async def test_vectors_before_the_start_end_the_link(pair: Pair) -> None:
    await prepared(pair, EMBED, 4)
    pair.worker.send(ANSWER)
    await pair.link.wait_closed()


async def test_a_failure_is_told(pair: Pair) -> None:
    await started(pair)
    error = WireError(type="server_error", message="It broke.", code="broke", status=500)
    answer = asyncio.create_task(pair.link.embedded("e"))
    await asyncio.sleep(0)
    pair.worker.send(Failed(request_id="e", error=error))
    with pytest.raises(RuntimeFailure, match="It broke"):
        await answer
    assert pair.link.num_outstanding == 0


async def test_what_is_cancelled_before_its_start_is_forgotten_at_once(pair: Pair) -> None:
    await prepared(pair, EMBED, 4)
    pair.link.cancel("e")
    assert pair.link.num_outstanding == 0
    assert await pair.worker.receive() == Cancel(request_id="e")
    with pytest.raises(AppError):
        await pair.link.embedded("e")


@pytest.mark.parametrize(
    ("counts", "is_possible"), [([3, 0], True), ([0, 0], True), ([2, 1], True), ([4, 0], False)]
)
async def test_a_cancelled_one_tells_what_ran(
    pair: Pair, counts: list[int], is_possible: bool
) -> None:
    await started(pair)
    answer = asyncio.create_task(pair.link.embedded("e"))
    await asyncio.sleep(0)
    pair.link.cancel("e")
    pair.link.cancel("e")
    assert await pair.worker.receive() == Cancel(request_id="e")
    pair.worker.send(msgspec.structs.replace(ANSWER, data=b"", num_tokens=counts))
    if is_possible:
        assert (await answer).num_tokens == counts
    else:
        with pytest.raises(AppError):
            await answer
    assert pair.link.num_outstanding == 0


async def test_a_worker_that_goes_fails_its_requests(pair: Pair) -> None:
    await started(pair)
    answer = asyncio.create_task(pair.link.embedded("e"))
    await asyncio.sleep(0)
    pair.worker.writer.close()
    with pytest.raises(AppError) as caught:
        await answer
    assert caught.value.code == "worker_lost"
