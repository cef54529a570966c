"""From one form of a version to the next while requests come, and back where the next does not
answer."""

import asyncio
from typing import Any

import msgspec
import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.clock import now
from app.core.ids import new_id
from app.deployments import optimisation_rows
from app.organizations.principal import Principal
from app.registry.tables import Artifact, ModelVersion, Optimisation
from runtime.protocol import Embed, Predict, Tensor
from tests.app.deployments.box import Box
from tests.app.deployments.conftest import Script, until, until_async
from tests.app.deployments.fake_process import EMBEDDER, TENSOR


@pytest.fixture
async def owner(box: Box) -> Principal:
    return await box.organization()


@pytest.fixture
async def box(box: Box, script: Script) -> Box:
    """A box with a tensor model that answers in its eager form."""
    script["kind"] = "tensor"
    box.settings = msgspec.structs.replace(box.settings, optimise=True)
    box.fleet = box.new_fleet()
    box.optimiser = box.new_optimiser(confirm_seconds=0.3)
    return box


@pytest.fixture
async def version(box: Box, owner: Principal) -> ModelVersion:
    version = await box.deployed(manifest=TENSOR)
    await box.fleet.start()
    await until(lambda: forms(box) == ["eager"])
    await box.optimiser.start()
    return version


def forms(box: Box) -> list[str]:
    """Of the replicas that answer and stay."""
    replicas = box.fleet.running()
    return [replica.form for replica in replicas if replica.is_ready and not replica.is_retired]


def stored(box: Box) -> set[str]:
    return {path.name for path in (box.storage.data_dir / "artifacts").iterdir()}


async def attempts(box: Box) -> list[Optimisation]:
    async with box.database.read() as session:
        rows = await session.scalars(
            select(Optimisation).order_by(Optimisation.created_at, Optimisation.id)
        )
        return list(rows)


async def status_is(box: Box, number: int, status: str) -> bool:
    rows = await attempts(box)
    return len(rows) > number and rows[number].status == status


async def end(box: Box) -> None:
    """As an app that stops."""
    await box.optimiser.close()
    await box.fleet.close(1)
    box.fleet = box.new_fleet()


async def begin(box: Box) -> None:
    """As the app that comes after it."""
    box.optimiser = box.new_optimiser(confirm_seconds=0.3)
    await box.optimiser.start()


async def test_the_faster_form_takes_over_without_losing_a_request(
    box: Box, owner: Principal, version: ModelVersion
) -> None:
    answered: dict[str, list[str]] = {}
    by_form: list[str] = []
    is_over = False

    async def call() -> None:
        while not is_over:
            target = box.fleet.resolve(owner, "tiny")
            await asyncio.sleep(0)  # as between resolving and sending
            request_id = new_id("req")
            tensor = Tensor(name="x", dtype="float32", shape=[1, 2], data=b"\0" * 8)
            request = Predict(request_id=request_id, inputs=[tensor])
            done = await target.link.predict(request)
            answered.setdefault(request_id, []).append(done.request_id)
            by_form.append(target.manifest.form)

    callers = [asyncio.create_task(call()) for _ in range(8)]
    await until(lambda: len(by_form) > 50)
    await box.optimiser.ask(version.id)
    await until(lambda: "quick" in by_form)
    await until(lambda: forms(box) == ["quick"])
    count = len(by_form)
    await until(lambda: len(by_form) > count + 50)
    is_over = True
    await asyncio.gather(*callers)  # raises if one request was lost
    assert set(by_form) == {"eager", "quick"}
    assert set(by_form[-50:]) == {"quick"}
    assert len(answered) == len(by_form)
    assert all(answers == [request_id] for request_id, answers in answered.items())


async def test_an_embedder_moves_to_its_faster_form_without_losing_a_request(
    box: Box, owner: Principal, script: Script
) -> None:
    script["kind"] = "embedder"
    version = await box.deployed("vectors", manifest=EMBEDDER)
    await box.fleet.start()
    await until(lambda: forms(box) == ["eager"])
    await box.optimiser.start()
    by_form: list[str] = []

    async def call() -> None:
        target = box.fleet.resolve(owner, "vectors")
        request = Embed(request_id=new_id("req"), token_ids=[[1, 2, 3]])
        await target.link.prepare(request)
        target.link.start(request.request_id)
        answer = await target.link.embedded(request.request_id)
        assert answer.num_tokens == [3]
        by_form.append(target.manifest.form)

    await box.optimiser.ask(version.id)
    while "quick" not in by_form:  # raises if a request was lost
        await call()
    assert by_form[0] == "eager"
    await until(lambda: forms(box) == ["quick"])
    assert (await box.read(version)).status == "ready"
    # And back, where the next form does not start.
    script["build"] = {"optimise": {"broken": True}}
    await box.optimiser.ask(version.id)
    await until_async(lambda: status_is(box, 1, "failed"))
    assert forms(box) == ["quick"]


async def test_what_served_before_goes_once_the_new_form_has_answered(
    box: Box, version: ModelVersion
) -> None:
    await box.optimiser.ask(version.id)
    await until(lambda: forms(box) == ["quick"])
    new = await box.read(version)
    assert new.artifact_id is not None
    assert version.artifact_id is not None
    await until(lambda: stored(box) == {new.artifact_id})
    (row,) = await attempts(box)
    assert (row.status, row.base_artifact_id, row.base_receipt) == ("done", None, None)
    async with box.database.read() as session:
        assert list(await session.scalars(select(Artifact.id))) == [new.artifact_id]
    # And once more: the earlier result goes likewise.
    await box.optimiser.ask(version.id)
    await until(lambda: len(stored(box)) == 1 and stored(box) != {new.artifact_id})


async def test_files_stay_while_a_replica_drains(
    box: Box, owner: Principal, version: ModelVersion, script: Script
) -> None:
    """A request of the old replica takes until long after the new one was confirmed."""
    script["worker"] = {"seconds": 3}
    await box.deployed(manifest=TENSOR)  # a second version, whose worker is slow
    await until(lambda: box.fleet.resolve(owner, "tiny").version_number == 2)
    target = box.fleet.resolve(owner, "tiny")
    (second,) = [v for v in await versions(box) if v.number == 2]
    tensor = Tensor(name="x", dtype="float32", shape=[1, 2], data=b"\0" * 8)
    request = Predict(request_id=new_id("req"), inputs=[tensor])
    predicting = asyncio.create_task(target.link.predict(request))
    script["worker"] = {}
    await box.optimiser.ask(second.id)

    async def is_confirmed() -> bool:
        rows = await attempts(box)
        return bool(rows) and rows[0].status == "done" and rows[0].base_artifact_id is None

    await until_async(is_confirmed)
    if not predicting.done():
        assert second.artifact_id in stored(box)
    await predicting
    await until(lambda: second.artifact_id not in stored(box))


async def versions(box: Box) -> list[ModelVersion]:
    async with box.database.read() as session:
        return list(await session.scalars(select(ModelVersion)))


async def test_a_form_that_does_not_start_is_taken_back(
    box: Box, owner: Principal, version: ModelVersion, script: Script
) -> None:
    script["build"] = {"optimise": {"broken": True}}
    await box.optimiser.ask(version.id)
    await until_async(lambda: status_is(box, 0, "failed"))
    assert forms(box) == ["eager"]  # it never stopped
    (row,) = await attempts(box)
    assert row.error_code == "form_cannot_be_served"
    assert "The weights are damaged" in (row.error_message or "")
    after = await box.read(version)
    assert (after.artifact_id, after.manifest) == (version.artifact_id, version.manifest)
    assert after.receipt is not None
    eager, quick = after.receipt["candidates"]
    assert (eager["is_chosen"], quick["is_chosen"]) == (True, False)
    assert quick["fate"] == "failed"
    assert quick["p50_ms"] == {"1": 0.5, "8": 4.0}
    assert "damaged" in quick["reason"]
    assert after.receipt["notes"] == [quick["reason"]]
    await until(lambda: stored(box) == {version.artifact_id})
    await until(lambda: len(box.fleet.running()) == 1)
    # It is not reused for another upload of the same file.
    script["build"] = {}
    await box.optimiser.ask(version.id)
    await until(lambda: forms(box) == ["quick"])


async def test_a_form_that_does_not_start_after_a_restart_is_taken_back(
    box: Box, owner: Principal, version: ModelVersion, script: Script
) -> None:
    """The app ended between the swap and the first start."""
    script["build"] = {"optimise": {"broken": True}}
    script["worker"] = {"never_ready": True}  # of the new replica
    await box.optimiser.ask(version.id)
    await until_async(lambda: status_is(box, 0, "done"))
    script["worker"] = {}
    await end(box)
    await box.fleet.start()
    await begin(box)
    await until_async(lambda: status_is(box, 0, "failed"))
    await until(lambda: forms(box) == ["eager"])
    assert (await box.read(version)).artifact_id == version.artifact_id


async def test_a_changed_environment_has_it_optimised_again(
    box: Box, owner: Principal, version: ModelVersion, script: Script
) -> None:
    await box.optimiser.ask(version.id)
    await until(lambda: forms(box) == ["quick"])

    async def is_confirmed() -> bool:
        return (await attempts(box))[0].base_artifact_id is None

    await until_async(is_confirmed)
    script["worker"] = {"only_eager": True}  # the form holds no more
    await end(box)
    await box.fleet.start()
    await until(lambda: forms(box) == ["eager"])
    script["worker"] = {}
    await begin(box)
    await until_async(lambda: status_is(box, 1, "done"))
    first, second = await attempts(box)
    assert second.cause == "environment"
    assert first.cache_key is None
    await until(lambda: forms(box) == ["quick"])


async def test_each_of_the_versions_that_share_an_artifact_is_optimised_again(
    box: Box, owner: Principal, version: ModelVersion, script: Script
) -> None:
    await box.optimiser.ask(version.id)
    await until(lambda: forms(box) == ["quick"])
    made = await box.read(version)
    twin = await box.deployed("twin", manifest=TENSOR)
    async with box.database.write() as session:
        row = await session.get_one(ModelVersion, twin.id)
        row.artifact_id, row.manifest = made.artifact_id, made.manifest
    await until(lambda: forms(box) == ["quick", "quick"])
    script["worker"] = {"only_eager": True}
    await end(box)
    await box.fleet.start()
    await until(lambda: forms(box) == ["eager", "eager"])
    script["worker"] = {}
    await begin(box)
    await until(lambda: forms(box) == ["quick", "quick"])
    again = [row.version_id for row in await attempts(box) if row.cause == "environment"]
    assert sorted(again) == sorted([version.id, twin.id])


async def test_what_could_not_be_written_about_a_foreign_form_is_tried_again(
    box: Box, owner: Principal, version: ModelVersion, script: Script, monkeypatch: Any
) -> None:
    await box.optimiser.ask(version.id)
    await until(lambda: forms(box) == ["quick"])
    script["worker"] = {"only_eager": True}
    await end(box)
    await box.fleet.start()
    await until(lambda: forms(box) == ["eager"])
    distrust, num_calls = optimisation_rows.distrust, 0

    async def fail_once(session: AsyncSession, artifact_id: str) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise OperationalError("UPDATE", None, Exception("database is locked"))
        await distrust(session, artifact_id)

    monkeypatch.setattr(optimisation_rows, "distrust", fail_once)
    script["worker"] = {}
    await begin(box)
    await until(lambda: forms(box) == ["quick"])
    assert num_calls == 2


async def test_a_new_form_that_does_not_hold_in_a_worker_is_taken_back(
    box: Box, owner: Principal, version: ModelVersion, script: Script
) -> None:
    """Optimising again would find the same: it is not queued."""
    script["worker"] = {"only_eager": True}
    await box.optimiser.ask(version.id)
    await until_async(lambda: status_is(box, 0, "failed"))
    after = await box.read(version)
    assert after.artifact_id == version.artifact_id
    assert "does not hold there" in ((await attempts(box))[0].error_message or "")
    await asyncio.sleep(1.2)
    assert len(await attempts(box)) == 1


async def test_a_reused_form_that_does_not_hold_is_measured_after_all(
    box: Box, owner: Principal, version: ModelVersion, script: Script
) -> None:
    """What the app sees of the box did not change, but the environment did."""
    await box.optimiser.ask(version.id)
    await until(lambda: forms(box) == ["quick"])
    async with box.database.write() as session:
        await session.execute(update(Optimisation).values(finished_at=now()))
    same = await box.deployed("same", manifest=TENSOR)
    script["worker"] = {"only_eager": True}
    async with box.database.write() as session:
        session.add(
            Optimisation(
                id=new_id("opt"),
                version_id=same.id,
                cause="built",
                status="queued",
                created_at=now(),
            )
        )

    async def is_measured() -> bool:  # what was found does not hold either, and is taken back
        rows = await attempts(box)
        return len(rows) > 2 and rows[2].receipt is not None

    await until_async(is_measured)
    rows = [row for row in await attempts(box) if row.version_id == same.id]
    assert [row.cause for row in rows] == ["built", "environment"]
    assert "Reused" in rows[0].phase_detail
