"""API keys: made, listed, revoked, and recognised on every request.

Owns the in-memory ring that keeps the hot path free of queries. A key that is revoked or
expires stops working within a second, in every process of the box.
"""

import asyncio
import logging
from datetime import datetime
from itertools import islice

import msgspec
from sqlalchemy import bindparam, delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthenticated
from app.core.ids import new_id
from app.core.security import new_api_key, token_hash
from app.organizations.confirmation import lock_people, reconfirm
from app.organizations.principal import SCOPES, Principal
from app.organizations.tables import ApiKey, Invitation, Organization

MAX_AGE_NS = 1_000_000_000  # nothing older is believed
REFRESH_AGE_NS = 600_000_000  # read again in the background from here, so that nobody waits
FORGET_AGE_NS = 60_000_000_000
MAX_BATCH = 200  # hashes per query
MAX_SECRET_CHARS = 512
FLUSH_SECONDS = 15.0

MAX_NAME_CHARS = 80
PREFIX_CHARS = 10
# The row behind TAPEOUT_ADMIN_KEY; it follows the variable and cannot be revoked otherwise.
ENVIRONMENT_KEY_ID = "key_environment"

logger = logging.getLogger(__name__)


# --- rows -------------------------------------------------------------------------------


async def create_key(
    session: AsyncSession,
    organization_id: str,
    name: str,
    scopes: frozenset[str],
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """A new key and its secret, which is shown this once and stored only as a hash."""
    name = name.strip()
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequest(
            f"A key needs a name of 1 to {MAX_NAME_CHARS} printable characters.", param="name"
        )
    if not scopes or scopes - SCOPES:
        raise InvalidRequest(
            f"Choose one or more scopes of: {', '.join(sorted(SCOPES))}.", param="scopes"
        )
    try:
        expires_at = expires_at and clock.in_utc(expires_at)
    except ValueError as error:
        raise InvalidRequest(f"expires_at {error}.", param="expires_at") from None
    if expires_at is not None and expires_at <= clock.now():
        raise InvalidRequest("expires_at lies in the past.", param="expires_at")
    secret = new_api_key()
    key = ApiKey(
        id=new_id("key"),
        organization_id=organization_id,
        name=name,
        prefix=secret[:PREFIX_CHARS],
        secret_hash=token_hash(secret),
        scopes=sorted(scopes),
        created_at=clock.now(),
        expires_at=expires_at,
        revoked_at=None,
        last_used_at=None,
    )
    session.add(key)
    await session.flush()
    return key, secret


async def create_key_by(
    session: AsyncSession,
    principal: Principal,
    name: str,
    scopes: frozenset[str],
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Like `create_key`, for a caller who may do so still, and gives a key no scope that they
    lack. What a key makes expires with it. Raises `Forbidden`, `InvalidRequest` and
    `Unauthenticated`."""
    principal = await reconfirm(session, principal)
    principal.require("admin")
    return await create_key_in(
        session, principal.organization_id, name, scopes, expires_at, by=principal
    )


async def create_key_in(
    session: AsyncSession,
    organization_id: str,
    name: str,
    scopes: frozenset[str],
    expires_at: datetime | None = None,
    *,
    by: Principal,
) -> tuple[ApiKey, str]:
    """Like `create_key_by`, for a caller whose power is known: the operator's, over every
    organization."""
    if lacking := scopes & SCOPES - by.scopes:
        raise Forbidden(
            f"You cannot give a key the scope {min(lacking)!r}, which you lack.",
            code="missing_scope",
            param="scopes",
        )
    ends_at = by.expires_at
    made, secret = await create_key(session, organization_id, name, scopes, expires_at or ends_at)
    if ends_at is not None and made.expires_at is not None and made.expires_at > ends_at:
        raise InvalidRequest(
            f"Your own key expires at {ends_at:%Y-%m-%d %H:%M} UTC, and what it makes no later.",
            param="expires_at",
        )
    return made, secret


async def list_keys(session: AsyncSession, organization_id: str) -> list[ApiKey]:
    """Every key, revoked ones included, newest first."""
    rows = await session.scalars(
        select(ApiKey)
        .where(ApiKey.organization_id == organization_id)
        .order_by(ApiKey.created_at.desc(), ApiKey.id.desc())
    )
    return list(rows)


async def get_key(session: AsyncSession, organization_id: str, key_id: str) -> ApiKey:
    """Raises `NotFound`."""
    key = await session.scalar(
        select(ApiKey).where(ApiKey.organization_id == organization_id, ApiKey.id == key_id)
    )
    if key is None:
        raise NotFound(f"There is no API key {key_id!r}.")
    return key


async def revoke_key(session: AsyncSession, organization_id: str, key_id: str) -> ApiKey:
    """Makes a key useless for good, and the invitations that it made; doing it twice does no
    harm."""
    await lock_people(session, organization_id)
    key = await get_key(session, organization_id, key_id)
    if key.id == ENVIRONMENT_KEY_ID:
        raise Conflict(
            "This key is set by TAPEOUT_ADMIN_KEY. Unset the variable and restart to remove it.",
            code="environment_key",
        )
    if key.revoked_at is None:
        key.revoked_at = clock.now()
    await end_invitations(session, key_id)
    return key


async def end_invitations(session: AsyncSession, key_id: str) -> None:
    """Those that the key made, for keys that may let nobody in any more: a link that its holder
    kept would make them a person, who may do more."""
    await session.execute(delete(Invitation).where(Invitation.creator_id == key_id))


async def put_environment_key(session: AsyncSession, organization_id: str, secret: str) -> None:
    """Makes the box's environment key have this value; an empty one revokes it."""
    await lock_people(session, organization_id)
    key = await session.get(ApiKey, ENVIRONMENT_KEY_ID)
    if not secret:
        if key is not None and key.revoked_at is None:
            key.revoked_at = clock.now()
            await end_invitations(session, key.id)
        return
    if key is None:
        key = ApiKey(
            id=ENVIRONMENT_KEY_ID,
            organization_id=organization_id,
            name="TAPEOUT_ADMIN_KEY",
            created_at=clock.now(),
            expires_at=None,
            last_used_at=None,
        )
        session.add(key)
    elif key.secret_hash != token_hash(secret):
        await end_invitations(session, key.id)
    # A quarter at most, so that a short value is not given away by what people recognise it by.
    key.prefix = secret[: min(PREFIX_CHARS, len(secret) // 4)]
    key.secret_hash = token_hash(secret)
    key.scopes = sorted(SCOPES)
    key.revoked_at = None


# --- recognition ------------------------------------------------------------------------


class _Entry(msgspec.Struct, frozen=True):
    principal: Principal
    expires_at: datetime | None
    read_at_ns: int


class KeyRing:
    """Recognises secrets. What was read is believed for a second at most; whoever then needs
    the database joins one query at a time, together with everyone else who waits. A flood of
    unknown keys therefore costs one small query at a time and no memory."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._entries: dict[str, _Entry] = {}
        self._waiting: dict[str, asyncio.Future[_Entry | None]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._used: dict[str, datetime] = {}
        self._flusher: asyncio.Task[None] | None = None

    async def authenticate(self, secret: str) -> Principal:
        """Raises `Unauthenticated` if the secret is unknown, revoked or expired."""
        if not 0 < len(secret) <= MAX_SECRET_CHARS:
            raise _unknown_key()
        secret_hash = token_hash(secret)
        entry = self._entries.get(secret_hash)
        age_ns = clock.monotonic_ns() - entry.read_at_ns if entry else MAX_AGE_NS
        if age_ns >= MAX_AGE_NS:
            entry = await asyncio.shield(self._look_up(secret_hash))
        elif age_ns >= REFRESH_AGE_NS:
            self._look_up(secret_hash)
        if entry is None:
            raise _unknown_key()
        moment = clock.now()
        if entry.expires_at is not None and entry.expires_at <= moment:
            raise Unauthenticated(
                f"This API key expired at {entry.expires_at:%Y-%m-%d %H:%M} UTC. The console's "
                "page Keys makes another one.",
                code="expired_api_key",
            )
        self._note_use(entry.principal.api_key_id, moment)
        return entry.principal

    async def close(self) -> None:
        """Writes what is still to be written."""
        for task in (self._reader, self._flusher):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self.flush()

    async def flush(self) -> None:
        """Writes when each key was last used."""
        used, self._used = self._used, {}
        if not used:
            return
        statement = (
            update(ApiKey.__table__)  # type: ignore[arg-type]
            .where(ApiKey.__table__.c.id == bindparam("key_id"))
            .values(last_used_at=bindparam("used_at"))
        )
        rows = [{"key_id": key_id, "used_at": used[key_id]} for key_id in sorted(used)]
        async with self._database.write() as session:
            await (await session.connection()).execute(statement, rows)

    # --- reading ------------------------------------------------------------------------

    def _look_up(self, secret_hash: str) -> asyncio.Future[_Entry | None]:
        """What the database says from now on; joins a query that has not begun yet."""
        future = self._waiting.get(secret_hash)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            # A background refresh has nobody to tell; the next request meets the error itself.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._waiting[secret_hash] = future
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read_waiting())
        return future

    async def _read_waiting(self) -> None:
        while self._waiting:
            batch = dict(islice(self._waiting.items(), MAX_BATCH))
            for secret_hash in batch:
                del self._waiting[secret_hash]
            try:
                self._answer(batch, await self._read(list(batch)))
            except Exception as error:  # noqa: BLE001 - whoever waits is told, nobody is let in
                for future in batch.values():
                    future.set_exception(error)
            finally:
                for future in batch.values():
                    future.cancel()  # no effect unless this task was cancelled
        self._forget_unused()

    def _answer(
        self, batch: dict[str, asyncio.Future[_Entry | None]], found: dict[str, _Entry]
    ) -> None:
        for secret_hash, future in batch.items():
            entry = found.get(secret_hash)
            if entry is None:
                self._entries.pop(secret_hash, None)
            else:
                self._entries[secret_hash] = entry
            future.set_result(entry)

    async def _read(self, hashes: list[str]) -> dict[str, _Entry]:
        read_at_ns = clock.monotonic_ns()
        statement = (
            select(
                ApiKey.secret_hash, ApiKey.id, ApiKey.name, ApiKey.scopes, ApiKey.expires_at,
                Organization.id, Organization.name, Organization.cache_salt,
                Organization.is_operator,
            )
            .join(Organization, Organization.id == ApiKey.organization_id)
            .where(ApiKey.secret_hash.in_(hashes), ApiKey.revoked_at.is_(None))
        )  # fmt: skip
        async with self._database.read() as session:
            rows = (await session.execute(statement)).all()
        found: dict[str, _Entry] = {}
        for row in rows:
            secret_hash, key_id, key_name, scopes, expires_at, org_id, org_name, salt, is_op = row
            principal = Principal(
                organization_id=org_id,
                organization_name=org_name,
                cache_salt=salt,
                is_operator=is_op,
                scopes=frozenset(scopes),
                api_key_id=key_id,
                api_key_name=key_name,
                expires_at=expires_at,
            )
            found[secret_hash] = _Entry(principal, expires_at, read_at_ns)
        return found

    def _forget_unused(self) -> None:
        oldest_ns = clock.monotonic_ns() - FORGET_AGE_NS
        for secret_hash in [h for h, e in self._entries.items() if e.read_at_ns < oldest_ns]:
            del self._entries[secret_hash]

    # --- last use -----------------------------------------------------------------------

    def _note_use(self, key_id: str, moment: datetime) -> None:
        self._used[key_id] = moment
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush_later())

    async def _flush_later(self) -> None:
        await asyncio.sleep(FLUSH_SECONDS)
        try:
            await self.flush()
        except Exception:
            # Only the display of "last used" suffers, and the next use writes it.
            logger.exception("could not write when API keys were last used")


def _unknown_key() -> Unauthenticated:
    return Unauthenticated("This API key is not known, or was revoked.")
