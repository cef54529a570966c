"""A backup taken beside a box that writes is whole; what is damaged is never restored."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import func, select

from app.backup.backup import MANIFEST, read_manifest, take_backup
from app.backup.restore import restore_backup
from app.billing.accounts import AccountWriter
from app.billing.payments.tables import StripeOperation
from app.billing.tables import AccountBalance, LedgerEntry
from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, InvalidRequest
from app.core.storage import Storage
from app.metering.tables import UsageEvent
from app.organizations.people import create_person, num_people
from app.organizations.tables import Invitation, Organization, SetupToken, SignIn
from app.settings import Settings
from tests.app.billing.conftest import ORGANIZATION, accounts, settlement  # noqa: F401


@pytest.fixture
def storage(settings: Settings) -> Storage:
    storage = Storage(settings.data_dir)
    (storage.data_dir / "artifacts" / "art_1").mkdir()
    (storage.data_dir / "artifacts" / "art_1" / "weights").write_bytes(b"w" * 3_000_000)
    (storage.data_dir / "keys" / "receipts.key").write_bytes(b"secret")
    (storage.data_dir / "keys" / "receipts.key").chmod(0o600)
    (storage.data_dir / "journal" / "000000000001.journal").write_bytes(b"tapeout-jnl1")
    (storage.data_dir / "journal" / "lock").touch()
    return storage


async def fill(database: Database, writer: AccountWriter, make: Callable[..., object]) -> None:
    for number in range(20):
        writer.settle(make(f"req_{number:03d}"))  # type: ignore[arg-type]
    await writer.flush()
    async with database.write() as session:
        session.add(
            StripeOperation(
                id="op_1",
                kind="charge",
                organization_id=ORGANIZATION,
                subject_id="top_1",
                params={"amount": 5, "ü": [1, None]},
                state="planned",
                next_at=clock.now(),
                created_at=clock.now(),
            )
        )


async def let_in(database: Database) -> None:
    """A session, and a link of each kind."""
    ends_at = clock.now() + timedelta(hours=1)
    async with database.write() as session:
        session.add(
            Organization(id=ORGANIZATION, name="acme", cache_salt=b"", created_at=clock.now())
        )
        await session.flush()
        ada = await create_person(session, ORGANIZATION, "ada@example.com", "-", "owner")
        session.add_all(
            (
                SetupToken(token_hash="a", created_at=clock.now()),
                Invitation(
                    id="invite_1",
                    organization_id=ORGANIZATION,
                    role="admin",
                    note="",
                    token_hash="b",
                    created_by=ada.email,
                    creator_id=ada.id,
                    created_at=clock.now(),
                    expires_at=ends_at,
                ),
                SignIn(
                    id="signin_1",
                    token_hash="c",
                    csrf_token="d",
                    user_id=ada.id,
                    organization_id=ORGANIZATION,
                    created_at=clock.now(),
                    expires_at=ends_at,
                ),
            )
        )


async def sums(database: Database) -> tuple[int, int, int]:
    async with database.read() as session:
        events = await session.scalar(select(func.count()).select_from(UsageEvent))
        revenue = await session.scalar(
            select(func.sum(LedgerEntry.amount_nano)).where(LedgerEntry.account == "revenue")
        )
        balance = await session.get(AccountBalance, ORGANIZATION)
        return int(events or 0), int(revenue or 0), balance.posted_nano if balance else 0


async def test_a_box_comes_back_as_it_was(
    settings: Settings,
    storage: Storage,
    database: Database,
    accounts: AccountWriter,  # noqa: F811
    settlement: Callable[..., object],  # noqa: F811
    tmp_path: Path,
) -> None:
    await fill(database, accounts, settlement)
    await let_in(database)
    target = tmp_path / "backup"
    manifest = await asyncio.to_thread(
        take_backup, settings.data_dir, settings.sync_database_url, target
    )
    assert manifest == read_manifest(target)
    assert manifest.tables["usage_event"].num_rows == 20
    assert "journal/lock" not in manifest.files

    # Into SQLite, whatever it was taken from.
    url, data_dir = f"sqlite:///{tmp_path / 'new.db'}", tmp_path / "new"
    await asyncio.to_thread(restore_backup, target, data_dir, url)
    assert (data_dir / "artifacts/art_1/weights").read_bytes() == b"w" * 3_000_000
    assert (data_dir / "keys/receipts.key").stat().st_mode & 0o777 == 0o600
    restored = Database(url.replace("sqlite:", "sqlite+aiosqlite:"))
    try:
        assert await sums(restored) == await sums(database)
        async with restored.read() as session:
            operation = await session.get(StripeOperation, "op_1")
            assert operation is not None
            # It may have been done since: it is looked for before it is sent again.
            assert (operation.state, operation.params) == ("unknown", {"amount": 5, "ü": [1, None]})
            assert operation.first_sent_at == manifest.taken_at
            # Links may have been used since, and sessions ended.
            assert await num_people(session) == 1
            for table in (SetupToken, Invitation, SignIn):
                assert await session.scalar(select(func.count()).select_from(table)) == 0
    finally:
        await restored.close()


async def test_a_backup_beside_settlements_is_of_one_moment(
    settings: Settings,
    storage: Storage,
    database: Database,
    accounts: AccountWriter,  # noqa: F811
    settlement: Callable[..., object],  # noqa: F811
    tmp_path: Path,
) -> None:
    is_over = asyncio.Event()

    async def keep_settling() -> None:
        number = 0
        while not is_over.is_set():
            accounts.settle(settlement(f"req_b{number:06d}"))  # type: ignore[arg-type]
            number += 1
            await asyncio.sleep(0.001)

    settling = asyncio.create_task(keep_settling())
    try:
        for attempt in range(2):
            target, url = tmp_path / f"backup{attempt}", f"sqlite:///{tmp_path / f'{attempt}.db'}"
            await asyncio.to_thread(
                take_backup, settings.data_dir, settings.sync_database_url, target
            )
            await asyncio.to_thread(restore_backup, target, tmp_path / f"box{attempt}", url)
            restored = Database(url.replace("sqlite:", "sqlite+aiosqlite:"))
            num_events, revenue, posted = await sums(restored)
            await restored.close()
            assert revenue == -posted
            assert revenue == num_events * settlement("x").amount_nano  # type: ignore[attr-defined]
            await asyncio.sleep(0.1)
    finally:
        is_over.set()
        await settling
        await accounts.flush()


def backup_of(settings: Settings, tmp_path: Path) -> Path:
    target = tmp_path / "backup"
    take_backup(settings.data_dir, settings.sync_database_url, target)
    return target


def restore(target: Path, tmp_path: Path) -> None:
    restore_backup(target, tmp_path / "new", f"sqlite:///{tmp_path / 'new.db'}")


@pytest.mark.parametrize(
    "name", ["database/organization.msgpack.z", "files/artifacts/art_1/weights"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_nothing_is_restored(
    settings: Settings, storage: Storage, tmp_path: Path, name: str, damage: str
) -> None:
    target = backup_of(settings, tmp_path)
    path = target / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(InvalidRequest, match=r"damaged|missing|cut short"):
        restore(target, tmp_path)
    assert not (tmp_path / "new.db").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["lock"]


def test_a_box_is_never_overwritten(settings: Settings, storage: Storage, tmp_path: Path) -> None:
    target = backup_of(settings, tmp_path)
    with pytest.raises(InvalidRequest, match="exists already"):
        take_backup(settings.data_dir, settings.sync_database_url, target)
    restore(target, tmp_path)
    with pytest.raises(Conflict, match="has a box already"):
        restore(target, tmp_path)


def test_another_schema_is_refused(settings: Settings, storage: Storage, tmp_path: Path) -> None:
    target = backup_of(settings, tmp_path)
    manifest = read_manifest(target)
    older = msgspec.structs.replace(manifest, revision="0001")
    (target / MANIFEST).write_bytes(msgspec.json.encode(older))
    with pytest.raises(InvalidRequest, match="with the version that made it"):
        restore(target, tmp_path)


def test_what_is_no_box_and_no_backup_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no box"):
        take_backup(tmp_path / "nothing", settings.sync_database_url, tmp_path / "backup")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match="no backup"):
        restore(tmp_path / "empty", tmp_path)


def test_an_unfinished_backup_leaves_nothing(
    settings: Settings, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("app.backup.backup._write_durably", full)
    with pytest.raises(OSError, match="disk full"):
        backup_of(settings, tmp_path)
    assert not (tmp_path / "backup").exists()
