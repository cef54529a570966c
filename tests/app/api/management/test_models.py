"""From an upload to a version over HTTP, and what is shown of it."""

import pickle
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from litestar import Litestar

from app.api import models
from app.core.database import Database
from app.deployments.logs import build_log_name
from app.registry.uploads import UploadStore
from tests.app.api.management.callers import Caller
from tests.app.api.management.serving import Serving, set_version
from tests.app.registry.conftest import stream


async def upload(app: Litestar, caller: Caller, data: bytes) -> str:
    store: UploadStore = app.state.uploads
    principal = await app.state.key_ring.authenticate(caller.secret)
    made = await store.create(principal, "model.pt2", len(data))
    await store.append(made.id, caller.organization_id, 0, stream(data))
    return made.id


async def test_an_upload_becomes_a_queued_version(
    client: httpx.AsyncClient, app: Litestar, caller: Caller, program: bytes
) -> None:
    body = {"upload_id": await upload(app, caller, program)}
    url = "/api/models/digits/versions"
    response = await client.post(url, headers=caller.headers, json=body)
    assert response.status_code == 202
    version = response.json()
    assert (version["model"], version["number"], version["status"]) == ("digits", 1, "queued")
    assert (version["progress"], version["error"], version["is_serving"]) == (0, None, False)
    assert (await client.get(f"{url}/1", headers=caller.headers)).json() == version
    second = await client.post(url, headers=caller.headers, json=body)
    assert second.json()["number"] == 2
    listed = (await client.get("/api/models", headers=caller.headers)).json()["models"]
    assert [(model["name"], model["latest_version"]["number"]) for model in listed] == [
        ("digits", 2)
    ]
    shown = (await client.get("/api/models/digits", headers=caller.headers)).json()
    assert [version["number"] for version in shown["versions"]] == [2, 1]


async def test_a_small_file_in_a_form(
    client: httpx.AsyncClient, caller: Caller, program: bytes
) -> None:
    url = "/api/models/digits/versions"
    files = {"file": ("../digits.pt2", program)}
    response = await client.post(url, headers=caller.headers, files=files)
    assert response.status_code == 202, response.text
    assert response.json()["filename"] == "digits.pt2"
    assert response.json()["upload_bytes"] == len(program)
    response = await client.post(url, headers=caller.headers, files={"other": ("a", b"x")})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "file")


async def test_a_large_form_is_sent_to_resumable_uploads(
    client: httpx.AsyncClient, caller: Caller
) -> None:
    files = {"file": ("big.pt2", bytes(models.MAX_FORM_BYTES + 1))}
    response = await client.post("/api/models/digits/versions", headers=caller.headers, files=files)
    assert response.status_code == 413
    assert "/api/uploads" in response.json()["error"]["message"]


FORM = {"Content-Type": "multipart/form-data; boundary=B"}
BEGINNING = b'--B\r\nContent-Disposition: form-data; name="file"; filename="m.pt2"\r\n\r\n'
URL = "/api/models/digits/versions"


async def test_a_form_without_room_is_not_read(
    client: httpx.AsyncClient, app: Litestar, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the form was read")
        yield b""

    async def status(**length: str) -> int:
        headers = caller.headers | FORM | length
        return (await client.post(URL, headers=headers, content=body())).status_code

    limits, length = app.state.uploads._limits, {"Content-Length": "40000000"}
    monkeypatch.setattr(app.state.storage, "free_bytes", lambda: 300_000_000)
    assert (await status(**length), await status()) == (507, 507)
    monkeypatch.undo()
    monkeypatch.setattr(limits, "quota_bytes", 30_000_000)
    assert (await status(**length), await status()) == (413, 413)
    monkeypatch.setattr(limits, "max_open", 0)
    assert (await status(**length), await status()) == (409, 409)


async def test_forms_count_as_uploads_while_they_arrive(
    client: httpx.AsyncClient, app: Litestar, caller: Caller, program: bytes
) -> None:
    limits = app.state.uploads._limits
    counted: list[int] = []

    async def whole() -> AsyncIterator[bytes]:
        yield BEGINNING
        counted.extend(form.num_bytes for form in limits._forms)
        yield program
        counted.extend(form.brought_bytes for form in limits._forms)
        yield b"\r\n--B--\r\n"

    sent = await client.post(URL, headers=caller.headers | FORM, content=whole())
    assert sent.status_code == 202, sent.text
    assert counted == [models.MAX_FORM_BYTES, len(BEGINNING) + len(program)]
    assert limits._forms == set()
    app.state.uploads.max_bytes = limits.max_bytes = 1_000_000  # less than a form may have
    counted.clear()
    assert (await client.post(URL, headers=caller.headers | FORM, content=whole())).is_success
    assert counted[0] == 1_000_000


@pytest.mark.parametrize("has_length", [False, True])
async def test_only_forms_may_be_large(
    client: httpx.AsyncClient, caller: Caller, has_length: bool
) -> None:
    num_read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_read
        for _ in range(100):
            num_read += 1
            yield bytes(10_000)

    headers = caller.headers | ({"Content-Length": "1000000"} if has_length else {})
    answer = await client.post(URL, headers=headers, content=body())
    assert (answer.status_code, num_read) == (413, 1 if has_length else 7)
    assert "multipart/form-data" in answer.json()["error"]["message"]


async def test_a_refused_file_says_what_to_do_and_frees_its_space(
    client: httpx.AsyncClient, app: Litestar, caller: Caller
) -> None:
    upload_id = await upload(app, caller, pickle.dumps(Path("x")))
    response = await client.post(
        "/api/models/digits/versions", headers=caller.headers, json={"upload_id": upload_id}
    )
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "pickled_module"
    assert "torch.export.save" in error["message"]
    assert not app.state.storage.upload(upload_id).exists()
    assert (await client.get("/api/models", headers=caller.headers)).json() == {"models": []}


@pytest.mark.parametrize(
    ("name", "body", "status", "code"),
    [
        ("Bad Name", b'{"upload_id": "x"}', 400, "invalid_value"),
        ("default", b'{"upload_id": "x"}', 400, "invalid_value"),
        ("digits", b'{"upload_id": "x"}', 404, "upload_not_found"),
        ("digits", b'{"upload_id": 5}', 400, "invalid_value"),
        ("digits", b"{}", 400, "invalid_value"),
        ("digits", b'{"upload_id": "x", "y": 1}', 400, "invalid_value"),
        ("digits", b"{", 400, "invalid_json"),
        ("digits", b"", 400, "invalid_json"),
    ],
)
async def test_invalid_requests(
    client: httpx.AsyncClient, caller: Caller, name: str, body: bytes, status: int, code: str
) -> None:
    response = await client.post(
        f"/api/models/{name}/versions", headers=caller.headers, content=body
    )
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_a_build_is_followed(
    client: httpx.AsyncClient, database: Database, serving: Serving
) -> None:
    url = "/api/models/digits/versions/1"
    headers = serving.caller.headers
    await set_version(
        database,
        serving.version_id,
        status="building",
        phase="proving",
        phase_detail="16 of 64 prompts",
        progress_permille=420,
    )
    version = (await client.get(url, headers=headers)).json()
    assert (version["phase"], version["progress"]) == ("proving", 0.42)
    assert version["phase_detail"] == "16 of 64 prompts"
    await set_version(
        database,
        serving.version_id,
        status="failed",
        error_code="export",
        error_message="Export it with a dynamic batch.",
    )
    version = (await client.get(url, headers=headers)).json()
    assert version["error"] == {"code": "export", "message": "Export it with a dynamic batch."}


async def test_serving_is_what_the_fleet_says(
    client: httpx.AsyncClient, app: Litestar, serving: Serving
) -> None:
    url, headers = "/api/models/digits/versions/1", serving.caller.headers
    version = (await client.get(url, headers=headers)).json()
    assert (version["endpoint"], version["is_serving"]) == ("digits", False)
    assert version["serving_detail"] == "starting: loading"
    app.state.fleet.serving.add("digits@1")
    version = (await client.get(url, headers=headers)).json()
    assert (version["is_serving"], version["serving_detail"]) == (True, "")
    assert version["manifest"] == {"kind": "tensor"}


async def test_build_log(client: httpx.AsyncClient, app: Litestar, serving: Serving) -> None:
    url, headers = "/api/models/digits/versions/1/log", serving.caller.headers
    response = await client.get(url, headers=headers)
    assert (response.text, response.headers["x-next-offset"]) == ("", "0")
    app.state.storage.log(build_log_name(serving.version_id)).write_text("one\ntwo\n")
    response = await client.get(url, headers=headers)
    assert (response.text, response.headers["x-next-offset"]) == ("one\ntwo\n", "8")
    assert response.headers["content-type"].startswith("text/plain")
    response = await client.get(url, headers=headers, params={"offset": 4})
    assert response.text == "two\n"
    response = await client.get(url, headers=headers, params={"offset": "x"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "offset")


async def test_cancel(client: httpx.AsyncClient, database: Database, serving: Serving) -> None:
    await set_version(database, serving.version_id, status="queued")
    response = await client.post(
        "/api/models/digits/versions/1/cancel", headers=serving.caller.headers
    )
    assert (response.status_code, response.json()["status"]) == (202, "cancelled")


async def test_delete(
    client: httpx.AsyncClient, app: Litestar, database: Database, serving: Serving
) -> None:
    headers = serving.caller.headers
    await set_version(database, serving.version_id, status="building")
    response = await client.delete("/api/models/digits", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (409, "build_running")
    await set_version(database, serving.version_id, status="ready")
    assert (await client.delete("/api/models/digits", headers=headers)).status_code == 204
    assert (await client.get("/api/models/digits", headers=headers)).status_code == 404
    assert (await client.get("/api/deployments", headers=headers)).json() == {"deployments": []}
    assert (await client.delete("/api/models/digits", headers=headers)).status_code == 404


async def test_a_name_taken_by_another_organization(
    client: httpx.AsyncClient, app: Litestar, serving: Serving, stranger: Caller, program: bytes
) -> None:
    response = await client.post(
        "/api/models/digits/versions",
        headers=stranger.headers,
        json={"upload_id": await upload(app, stranger, program)},
    )
    assert (response.status_code, response.json()["error"]["code"]) == (409, "name_taken")
