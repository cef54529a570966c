"""From a built version to its faster form: queue, process, result, and what is left of failures."""

import asyncio
import re
import signal
from typing import Any

import msgspec
import pytest
from sqlalchemy import delete, select, update

from app.core.errors import Conflict
from app.deployments import optimisation_rows
from app.deployments.logs import build_log_name, read_log
from app.deployments.optimisation_view import OptimisationView, read_optimisations
from app.registry.service import delete_model, remove_files
from app.registry.tables import Artifact, Model, ModelVersion, Optimisation
from app.registry.uploads import UploadStore
from tests.app.deployments.box import Box
from tests.app.deployments.conftest import Script, until, until_async
from tests.app.deployments.fake_process import TENSOR


@pytest.fixture
def box(box: Box, script: Script) -> Box:
    """A box that optimises tensor models."""
    script["kind"] = "tensor"
    box.settings = msgspec.structs.replace(box.settings, optimise=True)
    box.builder, box.fleet = box.new_builder(), box.new_fleet()
    box.optimiser = box.new_optimiser()
    return box


async def start(box: Box) -> None:
    await box.fleet.start()
    await box.builder.start()
    await box.optimiser.start()


async def attempts(box: Box, version: ModelVersion) -> list[Optimisation]:
    """Oldest first."""
    async with box.database.read() as session:
        rows = await session.scalars(
            select(Optimisation)
            .where(Optimisation.version_id == version.id)
            .order_by(Optimisation.created_at, Optimisation.id)
        )
        return list(rows)


async def optimised(box: Box, version: ModelVersion, number: int = 1) -> Optimisation:
    """Its attempt of this number, once it is over."""

    async def is_over() -> bool:
        rows = await attempts(box, version)
        return len(rows) >= number and rows[number - 1].status not in ("queued", "running")

    await until_async(is_over)
    row = (await attempts(box, version))[number - 1]
    await until(lambda: not box.storage.build(row.id).exists())
    return row


async def view_of(box: Box, version: ModelVersion) -> OptimisationView:
    async with box.database.read() as session:
        row = await session.get_one(ModelVersion, version.id)
        return (await read_optimisations(session, [row]))[version.id]


def log_of(box: Box, version: ModelVersion) -> str:
    return read_log(box.storage.log(build_log_name(version.id))).text


@pytest.mark.parametrize("kind", ["tensor", "embedder"])
async def test_what_was_built_serves_and_is_optimised_then(
    box: Box, script: Script, kind: str
) -> None:
    script["kind"] = kind
    version = await box.version()
    await start(box)
    row = await optimised(box, version)
    assert (row.status, row.cause, row.error_message) == ("done", "built", None)
    assert row.started_at is not None
    version = await box.read(version)
    assert version.artifact_id == row.artifact_id
    assert version.manifest is not None
    assert version.receipt is not None
    assert version.manifest["kind"] == kind
    assert (version.manifest["form"], version.manifest["environment"]) == ("quick", "here")
    assert [each["name"] for each in version.receipt["candidates"]] == ["eager", "quick"]
    assert version.status == "ready"
    view = await view_of(box, version)
    assert (view.status, view.progress, view.form) == ("done", 1.0, "quick")
    assert view.speed_up == pytest.approx(2.0)
    # It ran on the artifact of the build, which went before it.
    log = log_of(box, version)
    assert re.search(r"building.*\[ready:.*optimising.*\[optimised: quick serves\]", log, re.DOTALL)
    assert not list((box.storage.data_dir / "builds").iterdir())


async def test_decoders_are_left_alone(box: Box, script: Script) -> None:
    script["kind"] = "decoder"
    version = await box.version()
    await start(box)
    await until_async(lambda: is_ready(box, version))
    assert await attempts(box, version) == []
    with pytest.raises(Conflict, match="tensor"):
        await box.optimiser.ask(version.id)


async def is_ready(box: Box, version: ModelVersion) -> bool:
    return (await box.read(version)).status == "ready"


async def test_a_box_that_does_not_optimise(box: Box) -> None:
    box.settings = msgspec.structs.replace(box.settings, optimise=False)
    box.builder, box.optimiser = box.new_builder(), box.new_optimiser()
    version = await box.version()
    await start(box)
    await until_async(lambda: is_ready(box, version))
    assert await attempts(box, version) == []
    with pytest.raises(Conflict, match="TAPEOUT_OPTIMISE"):
        await box.optimiser.ask(version.id)


async def test_it_waits_until_the_endpoint_answers(box: Box, script: Script) -> None:
    script["worker"] = {"never_ready": True}
    version = await box.version()
    await start(box)
    await until_async(lambda: is_ready(box, version))
    await asyncio.sleep(1.5)  # longer than the queue's own pause
    (row,) = await attempts(box, version)
    assert row.status == "queued"
    # Who asks does not wait for that.
    await box.optimiser.cancel(version.id)
    await box.optimiser.ask(version.id)
    assert (await optimised(box, version, 2)).status == "done"


async def test_a_queued_build_goes_first(box: Box, script: Script) -> None:
    first = await box.deployed("first", manifest=TENSOR)
    waiting = await box.version("second")
    await box.fleet.start()
    await box.optimiser.start()
    await box.optimiser.ask(first.id)
    await asyncio.sleep(1.5)
    assert [row.status for row in await attempts(box, first)] == ["queued"]
    await box.builder.start()
    row = await optimised(box, first)
    ready = await box.read(waiting)
    assert ready.finished_at is not None
    assert row.started_at is not None
    assert ready.finished_at < row.started_at


async def test_where_eager_wins_only_the_receipt_is_new(box: Box, script: Script) -> None:
    script["build"] = {"optimise": {"form": "eager"}}
    version = await box.deployed(manifest=TENSOR)
    await start(box)
    before = version.artifact_id
    await box.optimiser.ask(version.id)
    row = await optimised(box, version)
    assert (row.status, row.artifact_id, row.base_artifact_id) == ("done", None, None)
    version = await box.read(version)
    assert version.artifact_id == before
    assert version.receipt is not None
    assert len(version.receipt["candidates"]) == 2
    assert (await view_of(box, version)).speed_up == pytest.approx(1.0)
    assert [path.name for path in (box.storage.data_dir / "artifacts").iterdir()] == [before]


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        ({"refuse": True}, "none", "Nothing could be measured."),
        ({"signal": int(signal.SIGKILL)}, "optimise_out_of_memory", "What was built serves on"),
        ({"signal": int(signal.SIGSEGV)}, "optimise_crashed", "segmentation fault"),
        ({"bad_manifest": True}, "optimise_not_acceptable", "another program"),
        ({"form": "../x"}, "optimise_not_acceptable", "no name"),
        ({"form": "slow"}, "optimise_not_acceptable", "does not say that its form was chosen"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
async def test_a_failure_says_why_and_touches_nothing_that_serves(
    box: Box, script: Script, behaviour: dict[str, Any], code: str, words: str
) -> None:
    script["build"] = {"optimise": behaviour}
    version = await box.deployed(manifest=TENSOR)
    await start(box)
    await box.optimiser.ask(version.id)
    row = await optimised(box, version)
    assert (row.status, row.error_code) == ("failed", code), row.error_message
    assert words in (row.error_message or "")
    after = await box.read(version)
    assert (after.status, after.artifact_id) == ("ready", version.artifact_id)
    assert (after.manifest, after.receipt) == (version.manifest, version.receipt)
    assert len(list((box.storage.data_dir / "artifacts").iterdir())) == 1
    assert f"[failed: {row.error_message}]" in log_of(box, version)
    error = (await view_of(box, version)).error
    assert error is not None
    assert error.code == code
    # And again, once it can succeed.
    script["build"] = {}
    await box.optimiser.ask(version.id)
    assert (await optimised(box, version, 2)).status == "done"


async def test_one_that_takes_too_long(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    box.settings = msgspec.structs.replace(box.settings, optimise_timeout_seconds=1)
    box.optimiser = box.new_optimiser()
    version = await box.deployed(manifest=TENSOR)
    await start(box)
    await box.optimiser.ask(version.id)
    row = await optimised(box, version)
    assert (row.status, row.error_code) == ("failed", "optimise_timeout")
    assert "TAPEOUT_OPTIMISE_TIMEOUT_SECONDS" in (row.error_message or "")


async def test_progress_cancel_and_again(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    version = await box.deployed(manifest=TENSOR)
    await start(box)
    with pytest.raises(Conflict):
        await box.optimiser.cancel(version.id)
    await box.optimiser.ask(version.id)
    with pytest.raises(Conflict):
        await box.optimiser.ask(version.id)

    async def is_measuring() -> bool:
        return (await view_of(box, version)).phase == "measure"

    await until_async(is_measuring)
    view = await view_of(box, version)
    assert (view.status, view.phase_detail, view.progress) == ("running", "quick", 0.5)
    assert view.is_active
    await box.optimiser.cancel(version.id)
    row = await optimised(box, version)
    assert (row.status, row.error_code) == ("cancelled", "cancelled")
    await until(lambda: not box.optimiser._running)
    assert (await box.read(version)).artifact_id == version.artifact_id
    script["build"] = {}
    await box.optimiser.ask(version.id)
    assert (await optimised(box, version, 2)).status == "done"


async def test_a_restart_begins_it_anew(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    version = await box.deployed(manifest=TENSOR)
    await start(box)
    await box.optimiser.ask(version.id)
    await until(lambda: "optimising" in log_of(box, version))
    await box.optimiser.close()
    assert [row.status for row in await attempts(box, version)] == ["queued"]
    # And after an app that could not say goodbye:
    async with box.database.write() as session:
        await session.execute(update(Optimisation).values(status="running", phase="measure"))
    script["build"] = {}
    box.optimiser = box.new_optimiser()
    await box.optimiser.start()
    assert (await optimised(box, version)).status == "done"


async def test_one_that_takes_the_box_down_is_not_tried_for_ever(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    version = await box.deployed(manifest=TENSOR)
    await start(box)
    await box.optimiser.ask(version.id)
    for _ in range(3):  # stopping the app is no interruption
        await until(lambda: bool(box.optimiser._running))
        await box.optimiser.close()
        box.optimiser = box.new_optimiser()
        await box.optimiser.start()
    for status in ("queued", "failed"):
        await box.optimiser.close()
        async with box.database.write() as session:
            await session.execute(update(Optimisation).values(status="running"))
        async with box.database.write() as session:  # as the start of an app does
            await optimisation_rows.requeue_interrupted(session)
        assert [row.status for row in await attempts(box, version)] == [status]
    (row,) = await attempts(box, version)
    assert (row.error_code, row.finished_at is not None) == ("interrupted", True)
    assert (await view_of(box, version)).error is not None
    assert (await box.read(version)).status == "ready"
    # And again, for who asks.
    script["build"] = {}
    box.optimiser = box.new_optimiser()
    await box.optimiser.start()
    await box.optimiser.ask(version.id)
    assert (await optimised(box, version, 2)).status == "done"


async def test_the_same_file_again_is_not_measured_again(box: Box) -> None:
    first = await box.version("first", content=b"one")
    await start(box)
    made = await optimised(box, first)
    same = await box.version("second", content=b"one")
    reused = await optimised(box, same)
    assert (reused.status, reused.cache_key) == ("done", made.cache_key)
    assert "Reused" in reused.phase_detail
    assert (await box.read(same)).artifact_id == made.artifact_id
    assert "optimising" not in log_of(box, same)
    # Unless somebody asks, or the file is another one.
    await box.optimiser.ask(same.id)
    await optimised(box, same, 2)
    assert "optimising" in log_of(box, same)
    third = await box.version("third")
    async with box.database.write() as session:
        other = await session.get_one(ModelVersion, third.id)
        other.sha256 = "1" * 64
    row = await optimised(box, other)
    assert row.cache_key != made.cache_key
    assert "optimising" in log_of(box, other)


@pytest.mark.parametrize("fate", ["failed", "out_of_time", "differs"])
@pytest.mark.parametrize("form", ["quick", "eager"])
async def test_what_another_moment_may_not_repeat_is_not_reused(
    box: Box, script: Script, form: str, fate: str
) -> None:
    script["build"] = {"optimise": {"form": form, "fate": fate}}
    first = await box.version("first", content=b"one")
    await start(box)
    made = await optimised(box, first)
    assert made.status == "done"
    is_repeatable = fate == "differs"
    assert (made.cache_key is not None) == is_repeatable
    same = await box.version("second", content=b"one")
    again = await optimised(box, same)
    assert again.status == "done"
    assert ("optimising" in log_of(box, same)) != is_repeatable


async def test_what_an_owner_accepts_is_part_of_the_key(box: Box) -> None:
    first = await box.version("first")
    await start(box)
    made = await optimised(box, first)
    second = await box.version("lossy")
    async with box.database.write() as session:
        lossy = await session.get_one(ModelVersion, second.id)
        lossy.hints = {"inputs": [], "accepts_loss": True}
    row = await optimised(box, lossy)
    assert row.cache_key != made.cache_key
    assert "True" in log_of(box, lossy)


async def test_a_model_deleted_while_it_is_optimised(box: Box, script: Script) -> None:
    script["build"] = {"seconds": 60}
    version = await box.deployed(manifest=TENSOR)
    await start(box)
    await box.optimiser.ask(version.id)
    await until(lambda: "optimising" in log_of(box, version))
    async with box.database.write() as session:
        await session.execute(delete(Model))
    await until(lambda: not box.optimiser._running)
    assert not list((box.storage.data_dir / "builds").iterdir())


async def test_deleting_a_model_removes_what_optimising_made(box: Box) -> None:
    box.optimiser = box.new_optimiser(confirm_seconds=1e9)
    version = await box.version()
    await start(box)
    row = await optimised(box, version)
    (row,) = await attempts(box, version)
    assert row.base_artifact_id is not None
    assert len(list((box.storage.data_dir / "artifacts").iterdir())) == 2
    owner = await box.organization()
    async with box.database.write() as session:
        removed = await delete_model(session, owner.organization_id, "tiny")
    uploads = UploadStore(box.database, box.storage, box.settings)
    await remove_files(box.storage, uploads, removed)
    assert not list((box.storage.data_dir / "artifacts").iterdir())
    assert await attempts(box, version) == []
    async with box.database.read() as session:
        assert list(await session.scalars(select(Artifact.id))) == []
