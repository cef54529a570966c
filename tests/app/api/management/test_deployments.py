"""Deployments and endpoints over HTTP."""

import httpx
from litestar import Litestar
from sqlalchemy import select

from app.core.database import Database
from app.deployments import service
from app.deployments.logs import replica_log_name
from app.registry.tables import ModelVersion
from tests.app.api.management.serving import Serving
from tests.app.conftest import ADMIN_KEY

OPERATOR = {"Authorization": f"Bearer {ADMIN_KEY}"}


async def test_what_serves(client: httpx.AsyncClient, serving: Serving) -> None:
    listed = (await client.get("/api/deployments", headers=serving.caller.headers)).json()
    (deployment,) = listed["deployments"]
    assert deployment["endpoint"] == deployment["model"] == "digits"
    assert (deployment["version"], deployment["revision"]) == (1, 1)
    assert (deployment["is_public"], deployment["is_stopped"]) == (False, False)
    (replica,) = deployment["replicas"]
    assert (replica["status"], replica["detail"], replica["version"]) == ("starting", "loading", 1)
    shown = await client.get("/api/deployments/digits", headers=serving.caller.headers)
    assert shown.json() == deployment


async def test_stop_and_start_tell_the_reconciler(
    client: httpx.AsyncClient, app: Litestar, serving: Serving
) -> None:
    notices: list[str] = []
    app.state.broadcast.publish = notices.append
    for verb, is_stopped in (("stop", True), ("stop", True), ("start", False)):
        response = await client.post(
            f"/api/deployments/digits/{verb}", headers=serving.caller.headers
        )
        assert (response.status_code, response.json()["is_stopped"]) == (202, is_stopped)
    assert notices == [service.CHANGED] * 3


async def test_rollback(client: httpx.AsyncClient, database: Database, serving: Serving) -> None:
    headers = serving.caller.headers
    response = await client.post("/api/deployments/digits/rollback", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "no_revision")
    async with database.write() as session:
        version = await session.scalar(select(ModelVersion))
        assert version is not None
        await service.deploy_version(session, version, num_replicas=2)
    revisions = await client.get("/api/deployments/digits/revisions", headers=headers)
    assert [r["number"] for r in revisions.json()["revisions"]] == [2, 1]
    response = await client.post("/api/deployments/digits/rollback", headers=headers)
    assert (response.json()["revision"], response.json()["num_replicas"]) == (1, 1)
    response = await client.post(
        "/api/deployments/digits/rollback", headers=headers, json={"revision": 2}
    )
    assert response.json()["revision"] == 2
    for body, status in (({"revision": 9}, 409), ({"revision": "x"}, 400), ({"to": 1}, 400)):
        response = await client.post("/api/deployments/digits/rollback", headers=headers, json=body)
        assert response.status_code == status


async def test_publishing(client: httpx.AsyncClient, serving: Serving) -> None:
    url, headers = "/api/endpoints/digits", serving.caller.headers
    response = await client.patch(url, headers=headers, json={"is_public": True})
    assert response.json()["is_public"] is True
    response = await client.patch(url, headers=headers, json={"is_default": True})
    assert response.json()["error"]["code"] == "operator_only"
    for body in ({}, {"is_public": None}, {"is_public": "yes"}, {"name": "x"}):
        assert (await client.patch(url, headers=headers, json=body)).status_code == 400
    state = (await client.get("/api/deployments/digits", headers=headers)).json()
    assert (state["is_public"], state["is_default"]) == (True, False)


async def test_only_the_operators_own_endpoint_becomes_the_default(
    client: httpx.AsyncClient, serving: Serving
) -> None:
    response = await client.patch(
        "/api/endpoints/digits", headers=OPERATOR, json={"is_default": True}
    )
    assert response.status_code == 404


async def test_worker_log(client: httpx.AsyncClient, app: Litestar, serving: Serving) -> None:
    url, headers = "/api/deployments/digits/log", serving.caller.headers
    app.state.storage.log(replica_log_name(serving.replica_id)).write_bytes(b"a\x1b[31mb\nc\n")
    response = await client.get(url, headers=headers)
    assert response.text == "ab\nc\n"
    assert response.headers["x-replica"] == serving.replica_id
    offset = int(response.headers["x-next-offset"])
    assert (await client.get(url, headers=headers, params={"offset": offset})).text == ""


async def test_settings_make_a_new_revision(
    client: httpx.AsyncClient, app: Litestar, serving: Serving
) -> None:
    notices: list[str] = []
    app.state.broadcast.publish = notices.append
    url, headers = "/api/deployments/digits", serving.caller.headers
    assert (await client.get(url, headers=headers)).json()["serving"] == {}
    await client.post(f"{url}/stop", headers=headers)
    body = {"num_replicas": 3, "latency_target_ms": 20.5, "max_batch_rows": 64}
    changed = await client.patch(url, headers=headers, json=body)
    assert changed.status_code == 200, changed.text
    state = changed.json()
    assert (state["revision"], state["num_replicas"], state["version"]) == (2, 3, 1)
    assert state["serving"] == {"latency_target_ms": 20.5, "max_batch_rows": 64}
    assert state["is_stopped"]  # only a start starts
    assert notices == [service.CHANGED] * 2
    # What is not given stays; null goes back to the default.
    changed = await client.patch(url, headers=headers, json={"latency_target_ms": None})
    assert changed.json()["serving"] == {"max_batch_rows": 64}
    assert changed.json()["num_replicas"] == 3
    revisions = (await client.get(f"{url}/revisions", headers=headers)).json()["revisions"]
    assert [(each["number"], each["serving"]) for each in revisions] == [
        (3, {"max_batch_rows": 64}),
        (2, {"latency_target_ms": 20.5, "max_batch_rows": 64}),
        (1, {}),
    ]


async def test_settings_that_cannot_be(client: httpx.AsyncClient, serving: Serving) -> None:
    url, headers = "/api/deployments/digits", serving.caller.headers
    for body, param in (
        ({}, None),
        ({"num_replicas": 0}, "num_replicas"),
        ({"num_replicas": 65}, "num_replicas"),
        ({"max_batch_rows": 0}, "serving.max_batch_rows"),
        ({"latency_target_ms": -1}, "serving.latency_target_ms"),
        ({"max_batch_rows": "many"}, None),
        ({"device": "cuda"}, None),
    ):
        response = await client.patch(url, headers=headers, json=body)
        assert response.status_code == 400, body
        if param:
            assert response.json()["error"]["param"] == param
    assert (await client.get(url, headers=headers)).json()["revision"] == 1
