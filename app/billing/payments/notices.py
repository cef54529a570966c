"""Notices: what an organization should know about its money, once for as long as it is so.

Owns their rows. What brings them about is `watches.py` and whoever calls `notify`; sending them to
an address of the organization's is `notice_delivery.py`'s.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.tables import Notice
from app.billing.tables import AccountBalance
from app.core import clock
from app.core.errors import NotFound
from app.core.ids import new_id
from app.organizations.service import default_organization_id

MAX_MESSAGE_CHARS = 400
MAX_LISTED = 200

log = logging.getLogger(__name__)


async def notify(
    session: AsyncSession,
    organization_id: str,
    kind: str,
    message: str,
    data: Mapping[str, Any],
    subject: str = "",
) -> str | None:
    """Tells the organization something, unless it has an open notice of this kind about this
    subject: that one then gets the new words. Returns the id of a new notice.

    Locks the organization's account, so that two at once make one notice: a transaction that
    moves money holds it already, any other calls this before it locks other rows.
    """
    await _lock(session, organization_id)
    return await _put(session, organization_id, kind, message, data, subject)


async def alarm(
    session: AsyncSession, kind: str, message: str, data: Mapping[str, Any], subject: str
) -> None:
    """Tells who operates the box of something that a person must look at. `subject` belongs to an
    organization whose account the caller has locked: a second account is not, since transactions
    that lock two in no set order wait for each other."""
    operator_id = await default_organization_id(session)
    if await _put(session, operator_id, kind, message, data, subject) is not None:
        log.error("%s", message)


async def end_alarm(session: AsyncSession, kind: str, subject: str) -> None:
    """A person has looked at it, or it came right by itself."""
    await _end(session, await default_organization_id(session), kind, subject)


async def _put(
    session: AsyncSession,
    organization_id: str,
    kind: str,
    message: str,
    data: Mapping[str, Any],
    subject: str,
) -> str | None:
    message = message[:MAX_MESSAGE_CHARS]
    told = {**data, "subject": subject} if subject else dict(data)
    for notice in await open_notices(session, organization_id, kind):
        if _subject(notice) == subject:
            notice.message, notice.data = message, told
            return None
    now = clock.now()
    notice = Notice(
        id=new_id("ntc"),
        organization_id=organization_id,
        kind=kind,
        message=message,
        data=told,
        created_at=now,
        next_at=now,
    )
    session.add(notice)
    await session.flush()
    return notice.id


async def end(session: AsyncSession, organization_id: str, kind: str, subject: str = "") -> bool:
    """What the notice said is so no longer. Whether there was one."""
    await _lock(session, organization_id)
    return await _end(session, organization_id, kind, subject)


async def _end(session: AsyncSession, organization_id: str, kind: str, subject: str) -> bool:
    ended = False
    for notice in await open_notices(session, organization_id, kind):
        if _subject(notice) == subject:
            notice.ended_at = clock.now()
            ended = True
    await session.flush()
    return ended


async def dismiss(session: AsyncSession, organization_id: str, notice_id: str) -> None:
    """No longer shown, though it may still be so. Raises `NotFound`."""
    notice = await session.get(Notice, notice_id)
    if notice is None or notice.organization_id != organization_id:
        raise NotFound(f"There is no notice {notice_id!r}.", code="notice_not_found")
    if notice.dismissed_at is None:
        notice.dismissed_at = clock.now()


async def open_notices(
    session: AsyncSession, organization_id: str, kind: str | None = None
) -> Sequence[Notice]:
    """Those that are so still, dismissed or not, newest first."""
    query = select(Notice).where(
        Notice.organization_id == organization_id, Notice.ended_at.is_(None)
    )
    if kind is not None:
        query = query.where(Notice.kind == kind)
    rows = await session.scalars(query.order_by(Notice.created_at.desc(), Notice.id.desc()))
    return rows.all()


async def shown_notices(session: AsyncSession, organization_id: str) -> list[Notice]:
    """What a person should see: open and not dismissed, newest first."""
    return [
        notice
        for notice in await open_notices(session, organization_id)
        if notice.dismissed_at is None
    ]


async def all_notices(session: AsyncSession, organization_id: str) -> Sequence[Notice]:
    """The newest, whether open or over."""
    rows = await session.scalars(
        select(Notice)
        .where(Notice.organization_id == organization_id)
        .order_by(Notice.created_at.desc(), Notice.id.desc())
        .limit(MAX_LISTED)
    )
    return rows.all()


def _subject(notice: Notice) -> str:
    return str(notice.data.get("subject", ""))


async def _lock(session: AsyncSession, organization_id: str) -> None:
    await session.execute(
        select(AccountBalance.organization_id)
        .where(AccountBalance.organization_id == organization_id)
        .with_for_update()
    )
