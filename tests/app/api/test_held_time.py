"""What is held for a prediction covers rows that are larger than those the build ran by rows."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app.api.held_time import max_device_ms
from app.billing.service import set_spending_limit
from runtime.protocol import (
    BuildReceipt,
    CandidateReport,
    Predict,
    Schema,
    Tensor,
    TensorSpec,
    TextInput,
)
from tests.app.api.conftest import ORGANIZATION, Box
from tests.app.api.scripted_worker import TENSOR

TIMEOUT = 600.0
SIZES = {8: 1.0, 64: 3.0, 128: 2.0, 512: 20.0}


def target(shapes: list[list[int | None]], *, is_batched: bool = True, **options: Any) -> Any:
    schema = Schema(
        inputs=[TensorSpec(name=f"x{i}", dtype="int64", shape=s) for i, s in enumerate(shapes)],
        outputs=[TensorSpec(name="y", dtype="int64", shape=[None])],
        is_batched=is_batched,
    )
    eager = CandidateReport(
        name="eager",
        is_chosen=True,
        reason="",
        p50_ms={1: 1.0, 32: 5.0},
        device_ms_max=6.0,
        row_ms_by_size=options.pop("sizes", SIZES),
    )
    lost = msgspec.structs.replace(eager, is_chosen=False, device_ms_max=1e6, row_ms_by_size={})
    receipt = BuildReceipt(
        verdict="equal",
        checks=[],
        candidates=[lost, eager],
        phase_seconds={},
        torch_version="",
        device="cpu",
    )
    manifest = msgspec.structs.replace(TENSOR, schema=schema, **options)
    return SimpleNamespace(receipt=receipt, manifest=manifest)


def held(target: Any, *shapes: list[int], timeout: float = TIMEOUT) -> int:
    tensors = [Tensor(name="x", dtype="int64", shape=shape, data=b"") for shape in shapes]
    return max_device_ms(target, Predict(request_id="r", inputs=tensors), timeout)


def test_rows_of_the_measured_size_are_held_for_by_batches() -> None:
    model = target([[None, None]])
    assert held(model, [1, 8]) == held(model, [32, 8]) == 25
    assert held(model, [33, 8]) == 50
    assert held(target([[None, 64]], sizes={}), [64, 64]) == 50


def test_larger_rows_are_held_for_by_the_size_that_covers_them() -> None:
    model = target([[None, None]])
    assert held(model, [10, 9]) == 4 * 10 * 3 + 1
    assert held(model, [10, 100]) == 4 * 10 * 3 + 1, "no faster than a smaller one was"
    assert held(model, [10, 512]) == 4 * 10 * 20 + 1
    assert held(model, [10, 1024]) == 4 * 10 * 20 * 4 + 1, "by the square beyond the largest"
    assert held(model, [1, 9]) == 25, "never less than a batch"
    assert held(model, [1000, 4096], timeout=2.0) == 2000, "never more than it may take"


def test_all_axes_that_vary_count() -> None:
    model = target([[None, None, 64], [None, None], [None, 1000]])
    assert held(model, [10, 256, 64], [10, 256], [10, 1000]) == 4 * 10 * 20 + 1
    rows = target([[None, None]], is_batched=False)
    assert held(rows, [8, 64]) == 4 * 20 + 1, "where rows share no run, they are an axis too"


def test_texts_are_held_for_as_long_as_they_may_become() -> None:
    text = TextInput(max_tokens=512, takes_pairs=True, token_ids="x0")
    model = target([[None, None]], text=text)

    def of_texts(*rows: list[str]) -> int:
        return max_device_ms(model, Predict(request_id="r", texts=list(rows)), TIMEOUT)

    assert of_texts(["a" * 50], ["b", "c"]) == 4 * 2 * 3 + 1, "58 tokens at most"
    assert of_texts(["é" * 40]) == 25
    assert of_texts(*[["a" * 10_000]] * 3) == 4 * 3 * 20 + 1, "512 at most"


def long_rows(box: Box, row_ms: dict[int, float]) -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=[None, None])
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    doubler = box.fleet.targets["doubler"]
    doubler.manifest = msgspec.structs.replace(TENSOR, schema=schema)
    (eager,) = doubler.receipt.candidates
    eager = msgspec.structs.replace(eager, row_ms_by_size=row_ms, device_ms_max=0.1)
    doubler.receipt = msgspec.structs.replace(doubler.receipt, candidates=[eager])


async def test_the_money_for_a_long_row_is_there_first(box: Box) -> None:
    """Of 1,000 ms a row, four times are held, and one: 277.8 nano-dollars each, and 100."""
    long_rows(box, {2: 0.1, 8: 1000.0})
    async with box.http() as http:
        async with box.database.write() as session:
            await set_spending_limit(session, ORGANIZATION, 1_000_000, "usd")
        long = {"inputs": [[1.0] * 8]}
        assert (await http.post("/models/doubler/predict", json=long)).status_code == 402
        short = {"inputs": [[1.0] * 2]}
        assert (await http.post("/models/doubler/predict", json=short)).status_code != 402
        async with box.database.write() as session:
            await set_spending_limit(session, ORGANIZATION, 1_200_000, "usd")
        assert (await http.post("/models/doubler/predict", json=long)).status_code != 402


async def test_what_a_hold_does_not_cover_is_told(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    box.fleet.targets["doubler"].receipt = msgspec.structs.replace(
        box.fleet.targets["doubler"].receipt,
        candidates=[CandidateReport(name="eager", is_chosen=True, reason="", device_ms_max=0.001)],
    )
    box.workers["doubler"].device_ns = 2_500_000
    async with box.http() as http:
        sent = {"inputs": {"x": [[1, 2]], "k": [1]}}
        response = await http.post("/models/doubler/predict", json=sent)
    assert response.json()["usage"]["device_ms"] == 2
    receipt = await box.receipt(response.headers["x-request-id"])
    assert (receipt["outcome"], receipt["finish_reason"]) == ("completed", "over_hold")
    assert "of which the hold of 2 ms does not cover 1" in caplog.text
