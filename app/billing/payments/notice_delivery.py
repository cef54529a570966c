"""Delivery of notices to the address that an organization chose, as a signed POST.

Owns when one is sent, how it is signed and where it may go. At least once: an attempt is recorded
before it is made, and repeated with longer and longer pauses until it is answered with 2xx or
three days are over.

The address is the organization's, the request is ours, from within our network. So only globally
routable addresses are connected to, those that were looked at (not looked up a second time), no
redirect is followed and nothing of the answer is kept but its status. The operator's own
organization may be told at any address, over http too.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import socket
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import httpx
import msgspec
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.periods import EPOCH
from app.billing.payments.tables import BillingProfile, Notice
from app.core import clock
from app.core.database import Database
from app.core.errors import InvalidRequest
from app.core.failpoints import failpoint
from app.organizations.tables import Organization

SIGNATURE_HEADER = "Tapeout-Signature"
TIMEOUT_SECONDS = 10
GIVE_UP_AFTER = timedelta(days=3)
FIRST_PAUSE_SECONDS = 15
LONGEST_PAUSE_SECONDS = 4 * 3600
MAX_BATCH = 100  # notices in one turn
MAX_OF_ONE = 4  # organization in one turn: whose address does not answer delays nobody else
MAX_AT_ONCE = 50
MAX_URL_CHARS = 500
# Routes into the IPv4 internet, and with it to addresses that are not to be reached.
_TUNNELS = (ipaddress.ip_network("2002::/16"), ipaddress.ip_network("64:ff9b::/96"))
# Global to Python, but given up: IPv6 addresses of one site, and relays into such tunnels.
_OUT_OF_USE = (ipaddress.ip_network("fec0::/10"), ipaddress.ip_network("192.88.99.0/24"))

log = logging.getLogger(__name__)


class _Refused(Exception):
    """The address may not be connected to, or cannot be found."""


class _Delivery(NamedTuple):
    notice_id: str
    url: str
    secret: str
    is_operator: bool
    body: bytes
    num_attempts: int
    is_last: bool


async def deliver_notices(database: Database) -> int:
    """Sends what is due. Returns how many were taken."""
    async with database.write() as session:
        deliveries = await _take(session)
        failpoint("notice_delivery.before_take_commit")
    failpoint("notice_delivery.after_take_commit")
    at_once = asyncio.Semaphore(MAX_AT_ONCE)

    async def deliver(delivery: _Delivery) -> None:
        async with at_once:
            error = await _send(delivery)
        async with database.write() as session:
            await _record(session, delivery, error)

    await asyncio.gather(*(deliver(delivery) for delivery in deliveries))
    return len(deliveries)


def check_notify_url(url: str, *, is_operator: bool) -> str:
    """The address as it is stored; empty for none. Where its name leads is looked at with each
    delivery. Raises `InvalidRequest`."""
    url = url.strip()
    if not url:
        return ""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if (
        len(url) > MAX_URL_CHARS
        or not url.isprintable()
        or parsed.scheme not in (("http", "https") if is_operator else ("https",))
        or not parsed.host
        or parsed.userinfo
        or parsed.fragment
    ):
        raise InvalidRequest(
            "Enter an https address such as https://example.com/notices, without a user name and "
            f"of at most {MAX_URL_CHARS} characters.",
            param="notify_url",
        )
    return url


def sign(secret: str, body: bytes, at_seconds: int) -> str:
    """The header's value. Whoever gets it computes the same of `t`, a dot and the bytes of the
    body, and refuses what is older than a few minutes."""
    signed = f"{at_seconds}.".encode() + body
    return f"t={at_seconds},v1={hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()}"


async def _take(session: AsyncSession) -> list[_Delivery]:
    """Counts the attempt and puts the next one off; ends those that nobody wants to have."""
    now = clock.now()
    place = func.row_number().over(
        partition_by=Notice.organization_id, order_by=(Notice.next_at, Notice.id)
    )
    due = select(Notice.id, place.label("place")).where(Notice.next_at <= now).subquery()
    rows = await session.execute(
        select(Notice, BillingProfile, Organization.is_operator)
        .join(due, due.c.id == Notice.id)
        .outerjoin(BillingProfile, BillingProfile.organization_id == Notice.organization_id)
        .outerjoin(Organization, Organization.id == Notice.organization_id)
        .where(Notice.next_at <= now, due.c.place <= MAX_OF_ONE)
        .order_by(due.c.place, Notice.next_at)
        .limit(MAX_BATCH)
        .with_for_update(of=Notice, skip_locked=True)
    )
    taken = [_attempt(*row, now=now) for row in rows]
    return [delivery for delivery in taken if delivery is not None]


def _attempt(
    notice: Notice, profile: BillingProfile | None, is_operator: bool | None, *, now: datetime
) -> _Delivery | None:
    if profile is None or not profile.notify_url or not profile.notify_secret:
        notice.next_at = None
        return None
    notice.num_attempts += 1
    again_at = now + timedelta(seconds=_pause_seconds(notice.num_attempts))
    notice.next_at = again_at
    return _Delivery(
        notice_id=notice.id,
        url=profile.notify_url,
        secret=profile.notify_secret,
        is_operator=bool(is_operator),
        body=_body(notice),
        num_attempts=notice.num_attempts,
        is_last=again_at > notice.created_at + GIVE_UP_AFTER,
    )


def _pause_seconds(num_attempts: int) -> int:
    return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 4 ** min(num_attempts - 1, 20))


def _body(notice: Notice) -> bytes:
    return msgspec.json.encode(
        {
            "id": notice.id,
            "object": "notice",
            "organization_id": notice.organization_id,
            "kind": notice.kind,
            "message": notice.message,
            "data": notice.data,
            "created_at": notice.created_at,
            "ended_at": notice.ended_at,
        }
    )


async def _record(session: AsyncSession, delivery: _Delivery, error: str) -> None:
    values: dict[str, object] = {"delivery_error": error[:300]}
    if not error:
        values |= {"delivered_at": clock.now(), "next_at": None}
    elif delivery.is_last:
        values |= {"next_at": None}
        log.warning("notice %s is given up: %s", delivery.notice_id, error)
    # An attempt that this one did not end in time has been followed by another, which decides.
    await session.execute(
        update(Notice)
        .where(Notice.id == delivery.notice_id, Notice.num_attempts == delivery.num_attempts)
        .values(values)
    )


async def _send(delivery: _Delivery) -> str:
    """Why it did not arrive; empty if it did."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            status = await _post(delivery)
    except (_Refused, httpx.HTTPError) as error:
        return str(error) or type(error).__name__
    except TimeoutError:
        return f"no answer within {TIMEOUT_SECONDS} seconds"
    return "" if httpx.codes.is_success(status) else f"answered with status {status}"


async def _post(delivery: _Delivery) -> int:
    url = httpx.URL(delivery.url)
    address = await _address(url, is_trusted=delivery.is_operator)
    host = f"[{url.host}]" if ":" in url.host else url.host
    headers = {
        "Host": host if url.port is None else f"{host}:{url.port}",
        "Content-Type": "application/json",
        "User-Agent": "Tapeout",
        "Tapeout-Notice": delivery.notice_id,
        SIGNATURE_HEADER: sign(delivery.secret, delivery.body, _now_seconds()),
    }
    async with httpx.AsyncClient(
        trust_env=False, follow_redirects=False, timeout=TIMEOUT_SECONDS
    ) as client:
        request = client.build_request(
            "POST",
            url.copy_with(host=address),
            content=delivery.body,
            headers=headers,
            # The certificate must be the name's, not the address's.
            extensions={"sni_hostname": url.host},
        )
        response = await client.send(request, stream=True)
        failpoint("notice_delivery.after_send")
        await response.aclose()
        return response.status_code


def _now_seconds() -> int:
    return (clock.now() - EPOCH) // timedelta(seconds=1)


async def _address(url: httpx.URL, *, is_trusted: bool) -> str:
    """An address of the host that may be connected to. Raises `_Refused`."""
    if not is_trusted and url.scheme != "https":
        raise _Refused("notices are sent to https addresses only")
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            url.host, port, type=socket.SOCK_STREAM
        )
    except (OSError, UnicodeError):
        raise _Refused(f"the name {url.host} was not found") from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    allowed = [address for address in addresses if is_trusted or is_public(address)]
    if not allowed:
        raise _Refused(f"{url.host} is not on the public internet")
    return _preferred(allowed)


def is_public(address: str) -> bool:
    """Whether an address is reachable by everybody, so that we reach nothing by it that the
    organization could not."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if any(parsed in tunnel for tunnel in _TUNNELS):
            return False
    if any(parsed in network for network in _OUT_OF_USE):
        return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _preferred(addresses: Sequence[str]) -> str:
    """IPv4 first: many boxes have no route for the other."""
    return next((address for address in addresses if ":" not in address), addresses[0])
