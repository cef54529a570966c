import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.exc import OperationalError

from app.core.errors import Conflict
from app.deployments import jobs as jobs_module
from app.deployments.logs import build_log_name, read_log
from app.deployments.service import get_endpoint
from app.registry.tables import Artifact, Model, ModelVersion
from tests.app.deployments.box import Box
from tests.app.deployments.conftest import Script, until, until_async


async def finished(box: Box, version: ModelVersion) -> ModelVersion:
    async def is_over() -> bool:
        return (await box.read(version)).status not in ("queued", "building")

    await until_async(is_over)
    await until(lambda: not box.storage.build(version.id).exists())
    return await box.read(version)


async def built(box: Box, version: ModelVersion) -> ModelVersion:
    await box.builder.start()
    return await finished(box, version)


def log_of(box: Box, version: ModelVersion) -> str:
    return read_log(box.storage.log(build_log_name(version.id))).text


async def test_a_build_becomes_an_artifact_and_a_deployment(box: Box) -> None:
    version = await built(box, await box.version())
    assert version.status == "ready", version.error_message
    assert (version.phase, version.progress_permille) == ("done", 1000)
    assert version.manifest is not None
    assert version.manifest["decoder"]["architecture"] == "fake"
    assert version.receipt is not None
    assert version.receipt["verdict"] == "equal"
    assert version.finished_at is not None
    assert version.artifact_id is not None
    directory = box.storage.artifact(version.artifact_id)
    assert (directory / "sub" / "weights").read_bytes() == b"weights"
    assert not list((box.storage.data_dir / "builds").iterdir())
    owner = await box.organization()
    async with box.database.read() as session:
        state = await get_endpoint(session, owner.organization_id, "tiny")
        artifact = await session.get_one(Artifact, version.artifact_id)
    assert (state.revision.number, state.version.id) == (1, version.id)
    assert len(artifact.digest) == 64
    assert artifact.size_bytes > 7
    assert "building" in log_of(box, version)
    assert "[ready: 2 files" in log_of(box, version)


async def test_progress_is_live_clean_and_never_falls(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 3}
    version = await box.version()
    await box.builder.start()
    notices = 0

    async def listen() -> None:
        nonlocal notices
        async for _ in box.broadcast.listen(f"version:{version.id}"):
            notices += 1

    listening = asyncio.create_task(listen())

    async def is_proving() -> bool:
        return (await box.read(version)).phase == "prove"

    await until_async(is_proving)
    row = await box.read(version)
    assert (row.status, row.progress_permille) == ("building", 250)
    assert row.phase_detail == "bad� detail"
    assert "building" in log_of(box, version)
    assert notices >= 2
    listening.cancel()
    await box.builder.cancel(version.id)


async def test_builds_wait_their_turn(box: Box, script: Script) -> None:
    versions = [await box.version(f"m{number}") for number in range(3)]
    await box.builder.start()
    box.broadcast.publish("builds")
    ended = [(await finished(box, version)).finished_at for version in versions]
    assert None not in ended
    assert ended == sorted(ended, key=str)


async def test_the_same_content_is_stored_once(box: Box) -> None:
    first = await built(box, await box.version())
    second = await finished(box, await box.version())
    assert second.artifact_id == first.artifact_id
    assert len(list((box.storage.data_dir / "artifacts").iterdir())) == 1
    third = await finished(box, await box.version(content=b"other"))
    assert third.artifact_id != first.artifact_id


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        ({"refuse": True}, "stale", "Export it again."),
        ({"signal": int(signal.SIGKILL)}, "build_out_of_memory", "ran out of memory"),
        ({"signal": int(signal.SIGSEGV)}, "build_crashed", "segmentation fault"),
        ({"signal": int(signal.SIGSYS)}, "build_crashed", "sandbox forbids"),
        ({"exit": 3}, "build_crashed", "exit code 3.*It last said: it did not work"),
        ({"garbage": True}, "build_protocol_error", "invalid frame.*Build again"),
        ({"verdict": "different"}, "build_not_acceptable", "answers differently"),
        ({"link": True}, "build_not_acceptable", "'link', which is neither a file"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
async def test_a_build_that_fails_says_why_and_leaves_nothing(
    box: Box, script: Script, behaviour: dict[str, object], code: str, words: str
) -> None:
    script["build"] = behaviour
    version = await built(box, await box.version())
    assert (version.status, version.error_code) == ("failed", code), version.error_message
    assert version.error_message is not None
    assert re.search(words, version.error_message, re.DOTALL), version.error_message
    assert "[failed: " in log_of(box, version)
    for folder in ("builds", "artifacts", "run"):
        assert not list((box.storage.data_dir / folder).iterdir()), folder
    # The next one is not held up by it.
    script["build"] = {}
    assert (await finished(box, await box.version())).status == "ready"


async def test_a_build_that_takes_too_long(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    box.settings = msgspec.structs.replace(box.settings, build_timeout_seconds=1)
    box.builder = box.new_builder()
    version = await built(box, await box.version())
    assert (version.status, version.error_code) == ("failed", "build_timeout")
    assert "TAPEOUT_BUILD_TIMEOUT_SECONDS" in (version.error_message or "")


async def test_a_build_that_needs_too_much_memory(box: Box, script: Script) -> None:
    script["build"] = {"hog": 300 * 1024**2}
    box.settings = msgspec.structs.replace(box.settings, build_memory_bytes=150 * 1024**2)
    box.builder = box.new_builder()
    version = await built(box, await box.version())
    assert (version.status, version.error_code) == ("failed", "build_out_of_memory")
    assert "157,286,400 bytes" in (version.error_message or "")
    assert "TAPEOUT_BUILD_MEMORY" in (version.error_message or "")


async def test_no_space_is_said_before_the_build(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box.storage, "free_bytes", lambda: 0)
    version = await built(box, await box.version())
    assert version.error_code == "storage_full"


async def test_an_upload_that_is_gone(box: Box) -> None:
    version = await box.version()
    box.storage.upload(version.upload_id).unlink()
    version = await built(box, version)
    assert version.error_code == "upload_missing"


async def test_cancelling_ends_the_process_and_what_it_started(
    box: Box, script: Script, tmp_path: Path
) -> None:
    child_path = tmp_path / "child"
    script["build"] = {"seconds": 60, "child": str(child_path)}
    version = await box.version()
    await box.builder.start()
    await until(child_path.exists)
    child = int(child_path.read_text())
    await box.builder.cancel(version.id)
    version = await finished(box, version)
    assert (version.status, version.error_code) == ("cancelled", "cancelled")
    await until(lambda: _is_gone(child))
    with pytest.raises(Conflict):
        await box.builder.cancel(version.id)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return True


async def test_cancelling_in_the_queue(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    first, second = await box.version("first"), await box.version("second")
    await box.builder.start()

    async def is_building() -> bool:
        return (await box.read(first)).status == "building"

    await until_async(is_building)
    await box.builder.cancel(second.id)
    await box.builder.cancel(first.id)
    assert (await finished(box, first)).status == "cancelled"
    assert (await box.read(second)).status == "cancelled"
    assert log_of(box, second) == ""  # it never started


async def test_a_row_cancelled_by_someone_else_ends_the_build(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    version = await box.version()
    await box.builder.start()
    await until(lambda: "building" in log_of(box, version))
    async with box.database.write() as session:
        await session.execute(update(ModelVersion).values(status="cancelled"))
    await until(lambda: not box.builder._running)
    assert (await box.read(version)).status == "cancelled"


async def test_a_model_deleted_during_its_build(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    version = await box.version()
    await box.builder.start()
    await until(lambda: "building" in log_of(box, version))
    async with box.database.write() as session:
        await session.execute(delete(Model))
    await until(lambda: not box.builder._running)
    assert not list((box.storage.data_dir / "artifacts").iterdir())


async def test_a_restart_builds_anew_what_was_interrupted(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    version = await box.version()
    await box.builder.start()
    await until(lambda: "building" in log_of(box, version))
    await box.builder.close()
    assert (await box.read(version)).status == "queued"
    # And after an app that could not say goodbye:
    async with box.database.write() as session:
        await session.execute(update(ModelVersion).values(status="building", phase="prove"))
    (box.storage.build(version.id) / "out").mkdir(parents=True)
    (box.storage.data_dir / "artifacts" / "art_nobody").mkdir()
    script["build"] = {}
    box.builder = box.new_builder()
    version = await built(box, version)
    assert version.status == "ready"
    names = [path.name for path in (box.storage.data_dir / "artifacts").iterdir()]
    assert names == [version.artifact_id]


async def test_an_older_version_built_later_does_not_replace_a_newer_one(box: Box) -> None:
    older = await box.version(content=b"old")
    newer = await box.version(content=b"new")
    async with box.database.write() as session:
        row = await session.get_one(ModelVersion, newer.id)
        row.created_at = row.created_at.replace(year=2000)
    await box.builder.start()
    assert (await finished(box, newer)).status == "ready"
    assert (await finished(box, older)).status == "ready"
    owner = await box.organization()
    async with box.database.read() as session:
        state = await get_endpoint(session, owner.organization_id, "tiny")
    assert state.version.id == newer.id


async def test_a_name_that_belongs_to_someone_else(box: Box) -> None:
    await built(box, await box.version())
    other = await finished(box, await box.version(organization="rival"))
    assert (other.status, other.error_code) == ("failed", "endpoint_name_taken")
    async with box.database.read() as session:
        digests = list(await session.scalars(select(Artifact.digest)))
    assert len(digests) == len(list((box.storage.data_dir / "artifacts").iterdir())) == 1


async def test_a_busy_database_does_not_cost_a_build(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "RECORD_PAUSES_SECONDS", (0.01, 0.01))
    record, attempts = box.builder._record, 0

    async def busy(*args: Any) -> bool:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise OperationalError("INSERT", {}, Exception("database is locked"))
        return await record(*args)

    monkeypatch.setattr(box.builder, "_record", busy)
    assert (await built(box, await box.version())).status == "ready"
    assert attempts == 3


async def test_several_builds_at_once(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    box.builder = box.new_builder(num_at_once=2)
    versions = [await box.version(f"m{number}") for number in range(3)]
    await box.builder.start()
    await until(lambda: len(box.builder._running) == 2)
    assert (await box.read(versions[2])).status == "queued"
