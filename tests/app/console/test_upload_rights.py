"""A piece of an upload whose sender loses the right to it while it arrives."""

import base64
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.ids import new_id
from app.organizations.service import create_organization
from app.organizations.tables import Membership, SignIn
from app.registry.tables import Upload
from tests.app.console.conftest import ORIGIN, Console
from tests.app.console.test_members_pages import BOB, joined, user_id

NAME = base64.b64encode(b"digits").decode()
PIECE = bytes(100_000)


async def is_removed(session: AsyncSession, bob: str) -> None:
    await session.execute(delete(Membership).where(Membership.user_id == bob))


async def may_only_look(session: AsyncSession, bob: str) -> None:
    changed = update(Membership).where(Membership.user_id == bob).values(role="viewer")
    await session.execute(changed)


async def goes_elsewhere(session: AsyncSession, bob: str) -> None:
    other = await create_organization(session, "elsewhere")
    session.add(
        Membership(
            id=new_id("mem"),
            user_id=bob,
            organization_id=other.id,
            role="owner",
            created_at=clock.now(),
        )
    )
    await session.flush()
    changed = update(SignIn).where(SignIn.user_id == bob).values(organization_id=other.id)
    await session.execute(changed)


@pytest.mark.parametrize(
    ("happens", "status"), [(is_removed, 303), (may_only_look, 403), (goes_elsewhere, 404)]
)
async def test_nothing_more_is_taken_of_who_may_not_upload_any_more(
    owned: Console,
    monkeypatch: pytest.MonkeyPatch,
    happens: Callable[[AsyncSession, str], Awaitable[None]],
    status: int,
) -> None:
    member = await joined(owned, "member")
    bob = await user_id(owned, BOB)
    now_ns = clock.monotonic_ns
    num_taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_taken
        for at in range(20):
            num_taken += 1
            yield PIECE
            if at == 4:
                async with owned.database.write() as session:
                    await happens(session, bob)
                monkeypatch.setattr(clock, "monotonic_ns", lambda: now_ns() + 1_500_000_000)

    headers = {
        "Origin": ORIGIN,
        "Tus-Resumable": "1.0.0",
        "X-CSRF-Token": await member.csrf_token("/console/upload"),
        "Upload-Length": str(20 * len(PIECE)),
        "Upload-Metadata": f"name {NAME}",
        "Upload-Offset": "0",
        "Content-Type": "application/offset+octet-stream",
        "Cookie": "; ".join(f"{name}={value}" for name, value in member.client.cookies.items()),
    }
    transport = httpx.ASGITransport(owned.client.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
        begun = await client.post("/console/uploads", headers=headers)
        answer = await client.patch(begun.headers["location"], headers=headers, content=endless())
    assert (answer.status_code, num_taken) == (status, 6)
    async with owned.database.read() as session:
        upload = (await session.scalars(select(Upload))).one()
    assert upload.received_bytes == 5 * len(PIECE)
