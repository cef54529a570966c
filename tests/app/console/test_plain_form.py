"""The upload form without a script: what is refused of it before it is read."""

import asyncio
import errno
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import pytest
from litestar.datastructures import UploadFile

from app.api import bodies
from app.api.bodies import FIELDS_BYTES
from app.api.forms import read_parts
from app.registry.transfers import LEAST_BYTES
from tests.app.console.conftest import ORIGIN, Console
from tests.app.console.test_members_pages import joined

MULTIPART = "multipart/form-data; boundary=B"
BEGINNING = b'--B\r\nContent-Disposition: form-data; name="file"; filename="m.pt2"\r\n\r\n'


async def refused(console: Console, content_type: str = MULTIPART, **headers: str) -> int:
    """The status of the answer to a form that nothing was read of."""

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the form was read")
        yield b""

    return (await sent(console, body(), content_type, **headers)).status_code


async def sent(
    console: Console, body: AsyncIterator[bytes], content_type: str = MULTIPART, **headers: str
) -> httpx.Response:
    """The answer to a form that comes in pieces."""
    headers |= {
        "Origin": ORIGIN,
        "Content-Type": content_type,
        "Cookie": "; ".join(f"{name}={value}" for name, value in console.client.cookies.items()),
    }
    transport = httpx.ASGITransport(console.client.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
        return await client.post("/console/upload", content=body, headers=headers)


async def test_a_viewers_form_is_not_read(owned: Console) -> None:
    viewer = await joined(owned, "viewer")
    assert await refused(viewer, **{"Content-Length": "500000000"}) == 403


async def test_a_form_without_room_or_length_is_not_read(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = {"Content-Length": "500000000"}
    assert await refused(owned) == 400
    assert await refused(owned, "application/x-www-form-urlencoded", **length) == 400
    monkeypatch.setattr(owned.storage, "free_bytes", lambda: 500_000_000)
    assert await refused(owned, **length) == 507
    monkeypatch.undo()
    limits = owned.client.app.state.uploads._limits
    monkeypatch.setattr(limits, "quota_bytes", 400_000_000)
    assert await refused(owned, **length) == 413
    monkeypatch.setattr(limits, "max_open", 0)
    assert await refused(owned, **length) == 409


async def test_a_form_that_is_refused_leaves_its_room_to_others(owned: Console) -> None:
    token = await owned.csrf_token("/console/upload")
    for csrf_token, status in ((token, 400), ("other", 403)):
        answer = await owned.client.post(
            "/console/upload",
            data={"csrf_token": csrf_token, "name": "default"},
            files={"file": ("model.pt2", b"x" * 100_000)},
            headers={"Origin": ORIGIN},
        )
        assert answer.status_code == status, answer.text
    assert owned.client.app.state.uploads._limits._forms == set()


@pytest.mark.parametrize("has_trickle", [False, True])
async def test_a_form_that_nothing_comes_of_ends_and_leaves_its_room_to_others(
    owned: Console, monkeypatch: pytest.MonkeyPatch, has_trickle: bool
) -> None:
    monkeypatch.setattr(bodies, "STALL_SECONDS", 0.05)
    limits = owned.client.app.state.uploads._limits

    async def idle() -> AsyncIterator[bytes]:
        yield BEGINNING
        assert len(limits._forms) == 1
        while has_trickle:
            await asyncio.sleep(0.01)
            yield b"x"
        await asyncio.Event().wait()

    answer = await sent(owned, idle(), **{"Content-Length": "500000000"})
    assert answer.status_code == 408
    assert "Less than 16 KiB of this body came" in answer.text
    assert limits._forms == set()


async def test_a_form_that_finds_the_disk_full_on_its_way_ends(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = 0

    async def file() -> AsyncIterator[bytes]:
        nonlocal num_read
        yield BEGINNING
        monkeypatch.setattr(owned.storage, "free_bytes", lambda: 1000)  # others took it
        while num_read < 50:
            num_read += 1
            yield bytes(1024**2)

    answer = await sent(owned, file(), **{"Content-Length": "500000000"})
    assert (answer.status_code, num_read) == (507, 1)
    assert "no room for the temporary file" in answer.text


async def test_a_form_whose_temporary_file_does_not_fit_ends_in_plain_words(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write(file: UploadFile, data: bytes) -> int:
        await file.close()  # which the framework leaves to the collector
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(UploadFile, "write", write)

    async def file() -> AsyncIterator[bytes]:
        yield BEGINNING
        yield bytes(1024**2)

    answer = await sent(owned, file(), **{"Content-Length": "500000000"})
    assert answer.status_code == 507
    assert "no room for the temporary file" in answer.text


async def test_a_slow_form_arrives(owned: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.5)
    token = await owned.csrf_token("/console/upload")

    async def slow() -> AsyncIterator[bytes]:
        yield BEGINNING
        for _ in range(10):
            await asyncio.sleep(0.1)
            yield bytes(LEAST_BYTES // 2)
        yield b"\r\n--B--\r\n"

    headers = {"Content-Length": "500000000", "X-CSRF-Token": token}
    answer = await sent(owned, slow(), **headers)
    assert (answer.status_code, "be a model&#39;s name" in answer.text) == (400, True)


async def test_only_the_file_of_a_form_may_be_large(owned: Console) -> None:
    token = await owned.csrf_token("/console/upload")

    async def text(num_bytes: int) -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="name"\r\n\r\n'
        yield b"x" * num_bytes
        yield b"\r\n--B--\r\n"

    headers = {"Content-Length": "500000000", "X-CSRF-Token": token}
    for num_bytes, status, words in (
        (FIELDS_BYTES, 400, "Choose a file first"),
        (FIELDS_BYTES + 1, 413, "give a part that is a file its file name"),
    ):
        answer = await sent(owned, text(num_bytes), **headers)
        assert (answer.status_code, words in answer.text) == (status, True), answer.text
    assert owned.client.app.state.uploads._limits._forms == set()


async def test_a_form_for_a_file_takes_one(owned: Console) -> None:
    token = await owned.csrf_token("/console/upload")
    file = b'--B\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\nx\r\n'

    async def files(*names: bytes) -> AsyncIterator[bytes]:
        for name in names:
            yield file % name
        yield b"--B--\r\n"

    headers = {"Content-Length": "500000000", "X-CSRF-Token": token}
    # A browser sends a field without a file as one without a name.
    one, two = [
        await sent(owned, files(*names), **headers) for names in ((b"a", b""), (b"a", b"b"))
    ]
    assert (one.status_code, "be a model&#39;s name" in one.text) == (400, True)
    assert (two.status_code, "takes one file" in two.text) == (413, True)
    assert owned.client.app.state.uploads._limits._forms == set()


async def test_what_latin_1_cannot_say_is_still_a_text() -> None:
    async def body() -> AsyncGenerator[bytes]:
        for charset in ("iso-8859-1", "utf-8"):
            yield b'--B\r\nContent-Disposition: form-data; name="a"\r\n'
            yield f"Content-Type: text/plain; charset={charset}\r\n\r\n".encode()
            yield b"\xe9\r\n" if charset != "utf-8" else "\u00e9\r\n".encode()
        yield b"--B--\r\n"

    texts = [text for _, text in await read_parts(body(), b"B", None)]
    assert texts == ["\u00e9".encode()] * 2
