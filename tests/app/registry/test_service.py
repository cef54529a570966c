"""Models and versions: numbering, names, tenants, deletion."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import select, update

from app.core import clock
from app.core.broadcast import Broadcast
from app.core.database import Database
from app.core.errors import AppError, Conflict, InvalidRequest, NotFound, Unprocessable
from app.core.storage import Storage
from app.organizations.principal import Principal
from app.registry import service
from app.registry.tables import Artifact, Model, ModelVersion, Upload
from app.registry.uploads import UploadStore
from tests.app.registry.archive_files import write_pt2
from tests.app.registry.conftest import stream


class Registry:
    """One organization's view."""

    def __init__(
        self, database: Database, uploads: UploadStore, storage: Storage, principal: Principal
    ) -> None:
        self.database, self.uploads, self.storage = database, uploads, storage
        self.principal = principal
        self.organization_id = principal.organization_id

    async def upload(self, data: bytes) -> Upload:
        upload = await self.uploads.create(self.principal, "model.pt2", len(data))
        await self.uploads.append(upload.id, self.organization_id, 0, stream(data))
        return await self.uploads.get(upload.id, self.organization_id)

    async def submit(self, name: str, upload: Upload) -> ModelVersion:
        version, _ = await service.submit(
            self.database,
            self.uploads,
            self.storage,
            Broadcast(),
            self.organization_id,
            name,
            upload.id,
        )
        return version


@pytest.fixture
def program(tmp_path: Path) -> bytes:
    return write_pt2(tmp_path / "model.pt2").read_bytes()


@pytest.fixture
def registry(
    database: Database, uploads: UploadStore, storage: Storage, principal: Principal
) -> Registry:
    return Registry(database, uploads, storage, principal)


@pytest.fixture
def strangers(
    database: Database, uploads: UploadStore, storage: Storage, stranger: Principal
) -> Registry:
    return Registry(database, uploads, storage, stranger)


async def test_versions_count_up(registry: Registry, program: bytes) -> None:
    upload = await registry.upload(program)
    first = await registry.submit("digits", upload)
    second = await registry.submit("digits", upload)
    assert (first.number, second.number) == (1, 2)
    assert (first.status, first.sha256, first.upload_bytes) == (
        "queued",
        upload.sha256,
        len(program),
    )
    async with registry.database.read() as session:
        versions = await service.list_versions(session, registry.organization_id, "digits")
        found = await service.get_version(session, registry.organization_id, "digits", 1)
        summaries = await service.list_models(session, registry.organization_id)
    assert [version.number for version in versions] == [2, 1]
    assert found.id == first.id
    assert [(s.model.name, s.latest_version and s.latest_version.number) for s in summaries] == [
        ("digits", 2)
    ]


async def test_versions_made_at_once_get_numbers_of_their_own(
    registry: Registry, program: bytes
) -> None:
    upload = await registry.upload(program)
    versions = await asyncio.gather(*(registry.submit("digits", upload) for _ in range(6)))
    assert sorted(version.number for version in versions) == [1, 2, 3, 4, 5, 6]
    assert len({version.model_id for version in versions}) == 1


@pytest.mark.parametrize(
    "name", ["", "-a", ".a", "A", "a b", "ä", "x" * 64, "a/b", "a@1", "default", "a\n"]
)
async def test_bad_names(registry: Registry, program: bytes, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await registry.submit(name, await registry.upload(program))
    assert caught.value.param == "name"


@pytest.mark.parametrize("name", ["a", "0", "llama-3.1_8b", "x" * 63])
def test_good_names(name: str) -> None:
    assert service.check_model_name(name) == name


async def test_a_refused_upload_makes_no_model(registry: Registry) -> None:
    upload = await registry.upload(b"\x80\x04K\x01.")
    with pytest.raises(Unprocessable, match=r"torch\.export\.save"):
        await registry.submit("digits", upload)
    async with registry.database.read() as session:
        assert await service.list_models(session, registry.organization_id) == []


async def test_an_unfinished_upload(registry: Registry, program: bytes) -> None:
    upload = await registry.uploads.create(registry.principal, "m.pt2", len(program))
    with pytest.raises(Conflict) as caught:
        await registry.submit("digits", upload)
    assert caught.value.code == "upload_incomplete"


async def test_a_queued_build_is_announced(registry: Registry, program: bytes) -> None:
    broadcast = Broadcast()
    notices = broadcast.listen(service.BUILDS_TOPIC)
    await anext(notices)
    upload = await registry.upload(program)
    await service.submit(
        registry.database,
        registry.uploads,
        registry.storage,
        broadcast,
        registry.organization_id,
        "digits",
        upload.id,
    )
    assert await asyncio.wait_for(anext(notices), 5) is True
    await notices.aclose()  # type: ignore[attr-defined]


async def test_another_organization(
    registry: Registry, strangers: Registry, program: bytes
) -> None:
    upload = await registry.upload(program)
    await registry.submit("digits", upload)
    other = strangers.organization_id
    async with strangers.database.write() as session:
        assert await service.list_models(session, other) == []
        for call in (
            service.get_model(session, other, "digits"),
            service.list_versions(session, other, "digits"),
            service.get_version(session, other, "digits", 1),
            service.delete_model(session, other, "digits"),
        ):
            with pytest.raises(NotFound):
                await call
    with pytest.raises(NotFound):
        await strangers.submit("mine", upload)
    with pytest.raises(Conflict) as caught:
        await strangers.submit("digits", await strangers.upload(program))
    assert caught.value.code == "name_taken"


async def test_deletion_takes_what_nobody_else_uses(registry: Registry, program: bytes) -> None:
    own, shared = await registry.upload(program), await registry.upload(program)
    first = await registry.submit("digits", own)
    await registry.submit("digits", shared)
    await registry.submit("other", shared)
    async with registry.database.write() as session:
        for artifact_id in ("artifact_1", "artifact_2"):
            session.add(
                Artifact(id=artifact_id, digest="0" * 64, size_bytes=1, created_at=clock.now())
            )
        await session.flush()
        await session.execute(
            update(ModelVersion)
            .where(ModelVersion.id == first.id)
            .values(artifact_id="artifact_1", status="building")
        )
        await session.execute(
            update(ModelVersion)
            .where(ModelVersion.id != first.id)
            .values(artifact_id="artifact_2", status="ready")
        )
    for artifact_id in ("artifact_1", "artifact_2"):
        registry.storage.artifact(artifact_id).mkdir()
        (registry.storage.artifact(artifact_id) / "program.json").touch()
    async with registry.database.write() as session:
        with pytest.raises(Conflict, match="being built"):
            await service.delete_model(session, registry.organization_id, "digits")
    async with registry.database.write() as session:
        await session.execute(update(ModelVersion).values(status="ready"))
        removed = await service.delete_model(session, registry.organization_id, "digits")
    await service.remove_files(registry.storage, registry.uploads, removed)
    assert not registry.storage.upload(own.id).exists()
    assert registry.storage.upload(shared.id).exists()
    assert not registry.storage.artifact("artifact_1").exists()
    assert registry.storage.artifact("artifact_2").exists()
    async with registry.database.read() as session:
        assert list(await session.scalars(select(Model.name))) == ["other"]
        assert list(await session.scalars(select(Upload.id))) == [shared.id]
        assert list(await session.scalars(select(Artifact.id))) == ["artifact_2"]


async def test_inspection_runs_in_a_thread(
    registry: Registry, program: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    threads: list[threading.Thread] = []

    def inspect(*_: object) -> None:
        threads.append(threading.current_thread())
        raise AppError("seen")

    monkeypatch.setattr(service, "inspect_upload", inspect)
    with pytest.raises(AppError, match="seen"):
        await registry.submit("digits", await registry.upload(program))
    assert threads != [threading.main_thread()]
