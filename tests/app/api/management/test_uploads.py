"""tus over HTTP: the protocol's headers and statuses, and real cuts under a real server."""

import asyncio
import base64
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator

import httpx
import pytest
from litestar import Litestar
from sqlalchemy import update

from app.core import clock
from app.core.database import Database
from app.organizations.keys import revoke_key
from app.registry.tables import Upload
from app.registry.uploads import UploadStore
from app.settings import Settings
from tests.app.api.management.callers import Caller, make_caller

TUS = {"Tus-Resumable": "1.0.0"}
BYTES = {"Content-Type": "application/offset+octet-stream"}
DATA = os.urandom(2 * 1024**2 + 5)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def begin(client: httpx.AsyncClient, caller: Caller, length: int = len(DATA)) -> str:
    headers = {
        "Upload-Length": str(length),
        "Upload-Metadata": f"filename {b64(b'model.pt2')},is_confidential",
    }
    response = await client.post("/api/uploads", headers=caller.headers | TUS | headers)
    assert response.status_code == 201, response.text
    assert response.headers["tus-resumable"] == "1.0.0"
    assert response.headers["upload-offset"] == "0"
    assert response.headers["upload-expires"].endswith("GMT")
    return response.headers["location"]


async def append(
    client: httpx.AsyncClient,
    caller: Caller,
    location: str,
    offset: int,
    data: bytes,
    **headers: str,
) -> httpx.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.patch(
        location,
        headers=caller.headers | TUS | BYTES | {"Upload-Offset": str(offset)} | sent,
        content=data,
    )


async def offset_of(client: httpx.AsyncClient, caller: Caller, location: str) -> int:
    response = await client.head(location, headers=caller.headers | TUS)
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["upload-length"] == str(len(DATA))
    return int(response.headers["upload-offset"])


async def test_abilities(client: httpx.AsyncClient, settings: Settings) -> None:
    response = await client.options("/api/uploads")
    assert response.status_code == 204
    assert response.headers["tus-version"] == "1.0.0"
    assert response.headers["tus-max-size"] == str(settings.max_upload_bytes)
    assert set(response.headers["tus-extension"].split(",")) == {
        "creation", "creation-with-upload", "expiration", "checksum", "termination",
    }  # fmt: skip
    assert response.headers["tus-checksum-algorithm"] == "sha1,sha256"
    assert (await client.options("/api/uploads/x")).headers["tus-version"] == "1.0.0"


async def test_in_pieces(client: httpx.AsyncClient, app: Litestar, caller: Caller) -> None:
    location = await begin(client, caller)
    assert await offset_of(client, caller, location) == 0
    for at in range(0, len(DATA), 1_000_000):
        response = await append(client, caller, location, at, DATA[at : at + 1_000_000])
        assert response.status_code == 204
        assert int(response.headers["upload-offset"]) == min(at + 1_000_000, len(DATA))
        # As long as it may expire, every answer says when.
        assert ("upload-expires" in response.headers) == (at + 1_000_000 < len(DATA))
    store: UploadStore = app.state.uploads
    upload = await store.get(location.rsplit("/", 1)[-1], caller.organization_id)
    assert (upload.status, upload.filename) == ("complete", "model.pt2")
    assert upload.sha256 == hashlib.sha256(DATA).hexdigest()


async def test_creation_with_upload(client: httpx.AsyncClient, caller: Caller) -> None:
    response = await client.post(
        "/api/uploads",
        headers=caller.headers | TUS | BYTES | {"Upload-Length": str(len(DATA))},
        content=DATA[:1000],
    )
    assert response.status_code == 201
    assert response.headers["upload-offset"] == "1000"
    assert await offset_of(client, caller, response.headers["location"]) == 1000


async def test_a_creation_whose_first_bytes_fail_leaves_nothing(
    client: httpx.AsyncClient, app: Litestar, caller: Caller
) -> None:
    headers = caller.headers | TUS | BYTES | {"Upload-Length": "4"}

    async def cut() -> AsyncIterator[bytes]:
        yield b"ab"
        raise ConnectionError

    wrong = {"Upload-Checksum": f"sha256 {b64(bytes(32))}"}
    damaged = await client.post("/api/uploads", headers=headers | wrong, content=b"abcd")
    assert (damaged.status_code, "location" in damaged.headers) == (460, False)
    too_much = await client.post("/api/uploads", headers=headers, content=b"abcde")
    assert too_much.status_code == 413
    with contextlib.suppress(ConnectionError):
        await client.post("/api/uploads", headers=headers, content=cut())
    assert (await client.get("/api/uploads", headers=caller.headers)).json() == {"data": []}
    assert list(app.state.storage.upload("any").parent.iterdir()) == []


async def test_checksum(client: httpx.AsyncClient, caller: Caller) -> None:
    location = await begin(client, caller)
    wrong = await append(
        client, caller, location, 0, DATA, Upload_Checksum=f"sha256 {b64(bytes(32))}"
    )
    assert wrong.status_code == 460
    assert wrong.json()["error"]["code"] == "checksum_mismatch"
    assert await offset_of(client, caller, location) == 0
    checksum = f"sha256 {b64(hashlib.sha256(DATA).digest())}"
    right = await append(client, caller, location, 0, DATA, Upload_Checksum=checksum)
    assert right.status_code == 204


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
async def test_each_checksum(client: httpx.AsyncClient, caller: Caller, algorithm: str) -> None:
    location = await begin(client, caller)
    digest = hashlib.new(algorithm, DATA).digest()
    wrong = await append(
        client, caller, location, 0, DATA[1:], Upload_Checksum=f"{algorithm} {b64(digest)}"
    )
    assert wrong.status_code == 460
    right = await append(
        client, caller, location, 0, DATA, Upload_Checksum=f"{algorithm} {b64(digest)}"
    )
    assert right.status_code == 204


async def test_metadata_comes_back_as_it_was_sent(
    client: httpx.AsyncClient, caller: Caller, app: Litestar
) -> None:
    location = await begin(client, caller)
    head = await client.head(location, headers=caller.headers | TUS)
    assert head.headers["upload-metadata"] == f"filename {b64(b'model.pt2')},is_confidential"
    folder = app.state.storage.upload("any").parent
    assert len(list(folder.iterdir())) == 2
    await app.state.uploads.expire()
    assert len(list(folder.iterdir())) == 2
    await client.delete(location, headers=caller.headers | TUS)
    assert list(folder.iterdir()) == []


async def test_unfinished_uploads_are_listed(
    client: httpx.AsyncClient, caller: Caller, stranger: Caller
) -> None:
    location = await begin(client, caller)
    await append(client, caller, location, 0, DATA[:1000])
    done = await begin(client, caller)
    await append(client, caller, done, 0, DATA)
    (listed,) = (await client.get("/api/uploads", headers=caller.headers)).json()["data"]
    assert location == f"/api/uploads/{listed['id']}"
    assert (listed["filename"], listed["received_bytes"], listed["length_bytes"]) == (
        "model.pt2",
        1000,
        len(DATA),
    )
    assert (await client.get("/api/uploads", headers=stranger.headers)).json() == {"data": []}


async def test_where_only_post_passes(client: httpx.AsyncClient, caller: Caller) -> None:
    location = await begin(client, caller)

    async def post(method: str, **more: str) -> httpx.Response:
        headers = caller.headers | TUS | {"X-HTTP-Method-Override": method} | more
        return await client.post(location, headers=headers, content=DATA if more else b"")

    sent = await post("PATCH", **BYTES, **{"Upload-Offset": "0"})
    assert (sent.status_code, sent.headers["upload-offset"]) == (204, str(len(DATA)))
    assert (await post("head")).headers["upload-offset"] == str(len(DATA))
    assert (await post("DELETE")).status_code == 204
    assert (await post("HEAD")).status_code == 404
    assert (await post("PUT")).status_code == 400


async def test_what_has_expired_is_gone(
    client: httpx.AsyncClient, caller: Caller, stranger: Caller, app: Litestar, database: Database
) -> None:
    location = await begin(client, caller)
    async with database.write() as session:
        await session.execute(update(Upload).values(expires_at=clock.now()))
    await app.state.uploads.expire()
    for response in (
        await client.head(location, headers=caller.headers | TUS),
        await append(client, caller, location, 0, DATA),
    ):
        assert response.status_code == 410
        assert "upload-offset" not in response.headers
    assert "Begin it anew" in response.json()["error"]["message"]
    foreign = await client.head(location, headers=stranger.headers | TUS)
    assert foreign.status_code == 404


async def test_every_answer_names_the_version(client: httpx.AsyncClient, caller: Caller) -> None:
    location = await begin(client, caller)
    answers = [
        await client.head(location, headers=TUS),
        await client.head(f"{location}x", headers=caller.headers | TUS),
        await append(client, caller, location, 5, b"x"),
        await append(client, caller, location, 0, b"x", Tus_Resumable="2.0.0"),
        await client.delete(location, headers=caller.headers | TUS),
    ]
    assert [answer.status_code for answer in answers] == [401, 404, 409, 412, 204]
    for answer in answers:
        assert answer.headers["tus-resumable"] == "1.0.0"
        assert answer.headers["cache-control"] == "no-store"
    assert answers[3].headers["tus-version"] == "1.0.0"


async def test_terminate(client: httpx.AsyncClient, caller: Caller) -> None:
    location = await begin(client, caller)
    assert (await client.delete(location, headers=caller.headers | TUS)).status_code == 204
    assert (await client.head(location, headers=caller.headers | TUS)).status_code == 404


async def test_refusals(client: httpx.AsyncClient, caller: Caller, settings: Settings) -> None:
    location = await begin(client, caller)
    good = caller.headers | TUS
    length = {"Upload-Length": "10"}
    cases: list[tuple[httpx.Response, int, str]] = [
        (await append(client, caller, location, 7, b"x"), 409, "wrong_offset"),
        (await append(client, caller, location, 0, b"x" * (len(DATA) + 1)), 413, "too_large"),
        (await append(client, caller, location, 0, b"x", Upload_Offset="-1"), 400, "invalid_value"),
        (await append(client, caller, location, 0, b"x", Upload_Checksum="md5 eA=="), 400,
         "invalid_value"),
        (await append(client, caller, location, 0, b"x", Content_Type="text/plain"), 415,
         "unsupported_media_type"),
        (await append(client, caller, location, 0, b"x", Tus_Resumable="0.2.2"), 412,
         "unsupported_tus_version"),
        (await client.post("/api/uploads", headers=caller.headers | length), 412,
         "unsupported_tus_version"),
        (await client.post("/api/uploads", headers=good), 400, "invalid_value"),
        (await client.post("/api/uploads", headers=good | {"Upload-Defer-Length": "1"}), 400,
         "invalid_value"),
        (await client.post("/api/uploads", headers=good | length | {"Upload-Metadata": "a,a"}),
         400, "invalid_value"),
        (await append(client, caller, location, 0, b"x", Upload_Checksum="sha1 eA=="), 400,
         "invalid_value"),
        (await client.post("/api/uploads", headers=good | {"Upload-Length": "0"}), 400, "empty"),
        (await client.post("/api/uploads", headers=good | {"Upload-Length": "9" * 30}), 400,
         "invalid_value"),
        (await client.post("/api/uploads", headers=good | {"Upload-Length": "1_0"}), 400,
         "invalid_value"),
        (await client.post("/api/uploads", headers=good | length | {"Upload-Metadata": "a ???"}),
         400, "invalid_value"),
        (await client.post("/api/uploads", headers=good | {
            "Upload-Length": str(settings.max_upload_bytes + 1)}), 413, "too_large"),
    ]  # fmt: skip
    for number, (response, status, code) in enumerate(cases):
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), number


async def test_a_full_box(
    client: httpx.AsyncClient, app: Litestar, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.state.storage, "free_bytes", lambda: 1000)
    response = await client.post(
        "/api/uploads", headers=caller.headers | TUS | {"Upload-Length": "10"}
    )
    assert response.status_code == 507
    assert response.json()["error"]["code"] == "storage_full"


# --- under a real server ----------------------------------------------------------------


async def test_a_key_that_is_revoked_sends_no_more(
    client: httpx.AsyncClient,
    app: Litestar,
    database: Database,
    caller: Caller,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thief = await make_caller(database, caller.organization_id)
    key_id = (await app.state.key_ring.authenticate(thief.secret)).api_key_id
    location = await begin(client, thief)
    now_ns = clock.monotonic_ns
    num_taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_taken
        for at in range(0, len(DATA), 100_000):
            num_taken += 1
            yield DATA[at : at + 100_000]
            if at == 400_000:
                async with database.write() as session:
                    await revoke_key(session, caller.organization_id, key_id)
                monkeypatch.setattr(clock, "monotonic_ns", lambda: now_ns() + 1_500_000_000)

    headers = thief.headers | TUS | BYTES | {"Upload-Offset": "0"}
    answer = await client.patch(location, headers=headers, content=endless())
    assert (answer.status_code, num_taken) == (401, 6)
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert await offset_of(client, caller, location) == 500_000
    assert (await append(client, caller, location, 500_000, DATA[500_000:])).status_code == 204


async def test_a_creation_by_a_key_that_is_revoked_leaves_nothing(
    client: httpx.AsyncClient,
    app: Litestar,
    database: Database,
    caller: Caller,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thief = await make_caller(database, caller.organization_id)
    key_id = (await app.state.key_ring.authenticate(thief.secret)).api_key_id
    now_ns = clock.monotonic_ns

    async def endless() -> AsyncIterator[bytes]:
        yield DATA[:1000]
        async with database.write() as session:
            await revoke_key(session, caller.organization_id, key_id)
        monkeypatch.setattr(clock, "monotonic_ns", lambda: now_ns() + 1_500_000_000)
        yield DATA[1000:]

    headers = thief.headers | TUS | BYTES | {"Upload-Length": str(len(DATA))}
    assert (
        await client.post("/api/uploads", headers=headers, content=endless())
    ).status_code == 401
    assert (await client.get("/api/uploads", headers=caller.headers)).json() == {"data": []}


async def test_a_cut_connection_is_resumed(server: str, app: Litestar, caller: Caller) -> None:
    async with httpx.AsyncClient(base_url=f"http://{server}") as client:
        location = await begin(client, caller)
        host, port = server.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        lines = {
            **caller.headers, **TUS, **BYTES,
            "Host": "box", "Upload-Offset": "0", "Content-Length": str(len(DATA)),
        }  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"PATCH {location} HTTP/1.1\r\n{head}\r\n".encode() + DATA[:1_500_000])
        await writer.drain()
        while not await offset_of(client, caller, location):  # noqa: ASYNC110 - across a socket
            await asyncio.sleep(0.01)
        writer.transport.abort()  # a pulled cable, not a polite end
        offset = 0
        while True:
            offset = await offset_of(client, caller, location)
            response = await append(client, caller, location, offset, DATA[offset:])
            if response.status_code == 204:
                break
            assert response.status_code == 409  # more of the cut piece had arrived meanwhile
        assert 1_000_000 < offset <= 1_500_000
    store: UploadStore = app.state.uploads
    upload = await store.get(location.rsplit("/", 1)[-1], caller.organization_id)
    assert upload.sha256 == hashlib.sha256(DATA).hexdigest()
