"""The upload form without a script: what is refused of it before it is read."""

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.app.console.conftest import ORIGIN, Console
from tests.app.console.test_members_pages import joined

MULTIPART = "multipart/form-data; boundary=B"


async def refused(console: Console, content_type: str = MULTIPART, **headers: str) -> int:
    """The status of the answer to a form that nothing was read of."""

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the form was read")
        yield b""

    headers |= {
        "Origin": ORIGIN,
        "Content-Type": content_type,
        "Cookie": "; ".join(f"{name}={value}" for name, value in console.client.cookies.items()),
    }
    transport = httpx.ASGITransport(console.client.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
        answer = await client.post("/console/upload", content=body(), headers=headers)
    return answer.status_code


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
    assert owned.client.app.state.uploads._limits.forms == {}
