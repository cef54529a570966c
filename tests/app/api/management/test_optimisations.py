"""The search for faster forms over HTTP: start, stop, and what it found."""

from typing import Any

import httpx
import msgspec
from sqlalchemy import update

from app.core.database import Database
from app.registry.tables import Optimisation
from runtime.protocol import BuildReceipt, CandidateReport
from tests.app.api.management.serving import Serving, set_version

URL = "/api/models/digits/versions/1"


def receipt(**milliseconds: dict[int, float]) -> dict[str, Any]:
    """Whose last candidate is chosen."""
    names = list(milliseconds)
    candidates = [
        CandidateReport(name=name, is_chosen=name == names[-1], reason="", p50_ms=times)
        for name, times in milliseconds.items()
    ]
    made = BuildReceipt(
        verdict="equal",
        checks=[],
        candidates=candidates,
        phase_seconds={},
        torch_version="",
        device="cpu",
    )
    return msgspec.to_builtins(made, str_keys=True)


async def test_it_is_started_shown_and_stopped(
    client: httpx.AsyncClient, database: Database, serving: Serving
) -> None:
    headers = serving.caller.headers
    assert (await client.get(URL, headers=headers)).json()["optimisation"] is None
    started = await client.post(f"{URL}/optimise", headers=headers)
    assert started.status_code == 202
    shown = started.json()["optimisation"]
    assert (shown["status"], shown["cause"], shown["form"]) == ("queued", "asked", "eager")
    again = await client.post(f"{URL}/optimise", headers=headers)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "optimisation_running")
    async with database.write() as session:
        await session.execute(
            update(Optimisation).values(
                status="running", phase="measure", phase_detail="int8", progress_permille=250
            )
        )
    model = (await client.get("/api/models/digits", headers=headers)).json()
    for version in (model["latest_version"], model["versions"][0]):
        shown = version["optimisation"]
        assert (shown["status"], shown["phase"], shown["progress"]) == ("running", "measure", 0.25)
        assert shown["phase_detail"] == "int8"
    stopped = await client.post(f"{URL}/optimise/cancel", headers=headers)
    assert (stopped.status_code, stopped.json()["optimisation"]["status"]) == (202, "cancelled")
    over = await client.post(f"{URL}/optimise/cancel", headers=headers)
    assert (over.status_code, over.json()["error"]["code"]) == (409, "not_optimising")


async def test_form_and_speed_up(
    client: httpx.AsyncClient, database: Database, serving: Serving
) -> None:
    headers = serving.caller.headers
    await client.post(f"{URL}/optimise", headers=headers)
    found = receipt(eager={1: 4.0, 8: 8.0, 32: 9.0}, aot_inductor={1: 1.0, 8: 8.0})
    manifest = {"kind": "tensor", "form": "aot_inductor"}
    await set_version(database, serving.version_id, manifest=manifest, receipt=found)
    async with database.write() as session:
        await session.execute(
            update(Optimisation).values(status="failed", error_code="x", error_message="Why.")
        )
    shown = (await client.get(URL, headers=headers)).json()["optimisation"]
    assert (shown["form"], shown["speed_up"]) == ("aot_inductor", 2.0)
    assert shown["error"] == {"code": "x", "message": "Why."}


async def test_the_receipt(client: httpx.AsyncClient, database: Database, serving: Serving) -> None:
    headers = serving.caller.headers
    early = await client.get(f"{URL}/receipt", headers=headers)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_built")
    found = receipt(eager={1: 4.0})
    await set_version(database, serving.version_id, receipt=found)
    answer = await client.get(f"{URL}/receipt", headers=headers)
    assert answer.json() == found
    assert answer.json()["candidates"][0]["p50_ms"] == {"1": 4.0}
    missing = await client.get("/api/models/digits/versions/9/receipt", headers=headers)
    assert missing.status_code == 404
