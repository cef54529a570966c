import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import delete, select, update

from app.core.errors import AppError, InvalidRequest, NotFound, RuntimeFailure, Unavailable
from app.core.ids import new_id
from app.deployments import service
from app.deployments.fleet import Fleet, Target
from app.deployments.logs import read_log, replica_log_name
from app.deployments.replica import Timing
from app.deployments.tables import Replica
from app.organizations.principal import Principal
from app.registry.tables import Model, ModelVersion
from runtime.protocol import Generate, Predict, SamplingParams, SequenceOutput, Tensor
from tests.app.deployments.box import Box
from tests.app.deployments.conftest import Script, until, until_async
from tests.app.deployments.fake_process import TENSOR


@pytest.fixture
async def owner(box: Box) -> Principal:
    return await box.organization()


@pytest.fixture
async def fleet(box: Box) -> AsyncIterator[Fleet]:
    await box.fleet.start()
    return box.fleet


def is_serving(box: Box, owner: Principal, name: str = "tiny@1") -> bool:
    try:
        box.fleet.resolve(owner, name)
    except AppError:
        return False
    return True


async def serving(box: Box, owner: Principal, name: str = "tiny@1") -> Target:
    await until(lambda: is_serving(box, owner, name))
    return box.fleet.resolve(owner, name)


async def detail(box: Box, words: str) -> Replica:
    """The newest replica, once its detail says `words`."""

    async def says() -> bool:
        return any(words in replica.detail for replica in (await box.replicas())[:1])

    await until_async(says)
    return (await box.replicas())[0]


async def generate(target: Target, text: str = "hi", max_tokens: int = 4) -> list[SequenceOutput]:
    request = Generate(
        request_id=new_id("req"),
        sampling=SamplingParams(max_tokens=max_tokens),
        cache_salt=b"s",
        text=text,
    )
    await target.link.prepare(request)
    target.link.start(request.request_id)
    steps = [step async for step in target.link.outputs(request.request_id)]
    return [output for step in steps for output in step]


async def predict(target: Target) -> None:
    tensor = Tensor(name="x", dtype="float32", shape=[1, 2], data=b"\0" * 8)
    await target.link.predict(Predict(request_id=new_id("req"), inputs=[tensor]))


# --- serving ----------------------------------------------------------------------------


async def test_what_is_deployed_is_served(box: Box, owner: Principal, fleet: Fleet) -> None:
    with pytest.raises(NotFound):
        fleet.resolve(owner, "tiny")
    version = await box.deployed()
    target = await serving(box, owner)
    assert (target.endpoint_name, target.version_number) == ("tiny", 1)
    assert target.version_id == version.id
    assert target.receipt.verdict == "equal"
    outputs = await generate(target)
    assert [output.token_ids for output in outputs] == [[0], [1], [2], [3]]
    assert box.committed == outputs
    (replica,) = await box.replicas()

    async def is_ready() -> bool:
        return (await box.replicas())[0].status == "ready"

    await until_async(is_ready)
    (replica,) = await box.replicas()
    assert (replica.memory_bytes, replica.version_id) == (1234, version.id)
    assert replica.ready_at is not None
    assert "serving" in read_log(box.storage.log(replica_log_name(replica.id))).text
    state = fleet.visible_endpoints(owner)[0]
    assert state.is_ready
    (live,) = fleet.live(state.desired.deployment_id)
    assert (live.replica_id, live.status, live.num_outstanding) == (replica.id, "ready", 0)
    assert [view.name for view, _ in fleet.all_live()] == ["tiny"]


async def test_names_are_private_until_published(box: Box, owner: Principal, fleet: Fleet) -> None:
    rival = await box.organization("rival")
    await box.deployed()
    await serving(box, owner)
    for name in ("tiny", "tiny@1", "default", "nothing", "", "@", "tiny" * 100):
        with pytest.raises(NotFound) as refusal:
            fleet.resolve(rival, name)
        assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
    assert fleet.visible_endpoints(rival) == []
    async with box.database.write() as session:
        await service.set_endpoint_public(session, owner.organization_id, "tiny", True)
        await service.set_endpoint_default(session, owner.organization_id, "tiny", True)
    await until(lambda: is_serving(box, rival, "tiny"))
    for name in ("tiny", "tiny@1", "default", "default@1"):
        assert fleet.resolve(rival, name).endpoint_name == "tiny"
    with pytest.raises(NotFound, match="version 1 is"):
        fleet.resolve(rival, "tiny@2")
    for name in ("tiny@", "tiny@x", "tiny@-1", "tiny@1@2", "tiny@" + "9" * 5000):
        with pytest.raises(InvalidRequest):
            fleet.resolve(rival, name)


async def test_stop_and_start(box: Box, owner: Principal, fleet: Fleet) -> None:
    await box.deployed()
    target = await serving(box, owner)
    async with box.database.write() as session:
        await service.stop_deployment(session, owner.organization_id, "tiny")
    box.broadcast.publish(service.CHANGED)
    await until(lambda: target.link.closed)
    with pytest.raises(Unavailable) as refusal:
        fleet.resolve(owner, "tiny")
    assert refusal.value.code == "endpoint_stopped"
    assert refusal.value.retry_after_seconds

    async def is_stopped() -> bool:
        return (await box.replicas())[0].status == "stopped"

    await until_async(is_stopped)
    async with box.database.write() as session:
        await service.start_deployment(session, owner.organization_id, "tiny")
    await serving(box, owner)  # found by the poll, without a notice


async def test_a_deleted_model_is_gone(box: Box, owner: Principal, fleet: Fleet) -> None:
    await box.deployed()
    target = await serving(box, owner)
    async with box.database.write() as session:
        await session.execute(delete(Model))
    await until(lambda: target.link.closed)
    with pytest.raises(NotFound):
        fleet.resolve(owner, "tiny")


async def test_requests_go_to_the_replica_with_the_fewest(
    box: Box, owner: Principal, fleet: Fleet, script: Script
) -> None:
    script["worker"] = {"seconds": 0.05}
    await box.deployed(num_replicas=2)
    await until(lambda: is_serving(box, owner) and len(_targets(fleet, owner)) == 2)
    first = fleet.resolve(owner, "tiny")
    running = asyncio.create_task(generate(first))
    await asyncio.sleep(0)
    assert fleet.resolve(owner, "tiny") is not first
    await running


def _targets(fleet: Fleet, owner: Principal) -> list[Target]:
    return fleet.visible_endpoints(owner)[0].targets


# --- workers that die -------------------------------------------------------------------


async def test_a_dead_worker_fails_its_requests_and_comes_back(
    box: Box, owner: Principal, fleet: Fleet
) -> None:
    await box.deployed()
    target = await serving(box, owner)
    with pytest.raises(RuntimeFailure) as failure:
        await asyncio.wait_for(generate(target, "die"), 2)
    assert (failure.value.status, failure.value.code) == (503, "worker_lost")
    replica = await detail(box, "ran out of memory")
    assert "starts again in 0 s (failure 1)" in replica.detail
    with pytest.raises(Unavailable):
        fleet.resolve(owner, "tiny")
    again = await serving(box, owner)
    assert again.link is not target.link
    assert len(await generate(again)) == 4
    assert len(await box.replicas()) == 1  # the same replica, restarted


async def test_an_idle_worker_that_dies_is_noticed(
    box: Box, owner: Principal, fleet: Fleet
) -> None:
    await box.deployed()
    target = await serving(box, owner)
    process = fleet._reconciler.replicas(_deployment_id(fleet, owner))[0]._process
    assert process is not None
    os.kill(int(process.name.removeprefix("pid ")), signal.SIGKILL)
    await asyncio.wait_for(target.link.wait_closed(), 1)
    assert (await serving(box, owner)).link is not target.link


def _deployment_id(fleet: Fleet, owner: Principal) -> str:
    return fleet.visible_endpoints(owner)[0].desired.deployment_id


async def test_a_worker_that_lies_is_replaced(
    box: Box, owner: Principal, fleet: Fleet, script: Script
) -> None:
    script["worker"] = {"lie": "vocabulary"}
    await box.deployed()
    target = await serving(box, owner)
    with pytest.raises(RuntimeFailure) as failure:
        await generate(target)
    assert failure.value.code == "worker_untrusted"
    script["worker"] = {}
    assert len(await generate(await serving(box, owner))) == 4


async def test_back_off_doubles_and_says_so(box: Box, fleet: Fleet, script: Script) -> None:
    script["worker"] = {"exit": 5}
    await box.deployed()
    replica = await detail(box, "failure 3")
    assert "exit code 5. It last said: about to fail" in replica.detail
    assert replica.status == "failed"
    rows = await box.replicas()
    assert len(rows) == 1


async def test_back_off_is_forgotten_after_a_healthy_time(
    box: Box, owner: Principal, script: Script
) -> None:
    box.timing = Timing(connect=20, start=20, first_back_off=0.05, healthy=0.0, stop=1)
    box.fleet = box.new_fleet()
    await box.fleet.start()
    await box.deployed()
    for _ in range(3):
        target = await serving(box, owner)
        with pytest.raises(RuntimeFailure):
            await generate(target, "die")
        assert "(failure 1)" in (await detail(box, "failure")).detail


async def test_a_worker_that_never_gets_ready_is_given_up(
    box: Box, owner: Principal, script: Script
) -> None:
    script["worker"] = {"never_ready": True}
    box.timing = Timing(connect=20, start=0.2, first_back_off=0.05, stop=1)
    box.fleet = box.new_fleet()
    await box.fleet.start()
    await box.deployed()
    await detail(box, "did not get ready within 0 seconds")
    with pytest.raises(Unavailable, match="did not get ready") as refusal:
        box.fleet.resolve(owner, "tiny")
    assert refusal.value.retry_after_seconds
    async with box.database.write() as session:
        await service.set_endpoint_public(session, owner.organization_id, "tiny", True)
    rival = await box.organization("rival")

    def is_public() -> bool:
        return bool(box.fleet.visible_endpoints(rival))

    await until(is_public)
    with pytest.raises(Unavailable) as refusal:  # whose business the reason is not
        box.fleet.resolve(rival, "tiny")
    assert "did not" not in refusal.value.message


# --- versions that follow each other ----------------------------------------------------


async def test_a_new_version_takes_over_without_losing_a_request(
    box: Box, owner: Principal, fleet: Fleet, script: Script
) -> None:
    script["worker"] = {"kind": "tensor"}
    await box.deployed(manifest=TENSOR)
    old = await serving(box, owner)
    answered: list[int] = []
    is_over = False

    async def call() -> None:
        while not is_over:
            target = fleet.resolve(owner, "tiny")
            await asyncio.sleep(0)  # as between resolving and sending
            await predict(target)
            answered.append(target.version_number)

    callers = [asyncio.create_task(call()) for _ in range(16)]
    await until(lambda: len(answered) > 100)
    await box.deployed(manifest=TENSOR)
    await until(lambda: 2 in answered)
    await until(lambda: old.link.closed)
    count = len(answered)
    await until(lambda: len(answered) > count + 100)
    is_over = True
    await asyncio.gather(*callers)  # raises if one request was lost
    assert set(answered) == {1, 2}
    assert set(answered[-50:]) == {2}
    statuses = [replica.status for replica in await box.replicas()]
    assert statuses[0] == "ready"


async def test_a_version_that_does_not_load_leaves_the_old_one(
    box: Box, owner: Principal, fleet: Fleet
) -> None:
    await box.deployed()
    first = await serving(box, owner)
    await box.deployed(is_broken=True)
    replica = await detail(box, "Version 1 keeps serving.")
    assert "The weights are damaged. Version 2 starts again" in replica.detail
    assert fleet.resolve(owner, "tiny") is first
    assert fleet.resolve(owner, "tiny@1") is first
    with pytest.raises(Unavailable, match="weights are damaged"):
        fleet.resolve(owner, "tiny@2")
    async with box.database.write() as session:
        await service.roll_back(session, owner.organization_id, "tiny")
    box.broadcast.publish(service.CHANGED)

    async def is_over() -> bool:
        return (await box.replicas())[0].status == "stopped"

    await until_async(is_over)
    assert fleet.resolve(owner, "tiny") is first  # not even restarted
    await box.deployed()
    assert (await serving(box, owner, "tiny@3")).version_number == 3


# --- the app's own end and start --------------------------------------------------------


async def test_shutting_down_lets_requests_finish(
    box: Box, owner: Principal, fleet: Fleet, script: Script
) -> None:
    script["worker"] = {"seconds": 0.1}
    await box.deployed()
    target = await serving(box, owner)
    running = asyncio.create_task(generate(target))
    await until(lambda: box.committed)
    await fleet.close(10)
    assert len(await running) == 4
    with pytest.raises(Unavailable) as refusal:
        fleet.resolve(owner, "tiny")
    assert refusal.value.code == "shutting_down"
    assert (await box.replicas())[0].status == "stopped"


async def test_shutting_down_is_bounded(
    box: Box, owner: Principal, fleet: Fleet, script: Script
) -> None:
    script["worker"] = {"seconds": 60}
    await box.deployed()
    target = await serving(box, owner)
    running = asyncio.create_task(generate(target))
    await until(lambda: target.link.num_outstanding)
    await asyncio.wait_for(fleet.close(0.1), 15)
    with pytest.raises(RuntimeFailure):
        await running


async def test_a_worker_that_ignores_its_drain_is_killed(
    box: Box, owner: Principal, fleet: Fleet, script: Script
) -> None:
    script["worker"] = {"ignore_drain": True}
    await box.deployed()
    await serving(box, owner)
    await asyncio.wait_for(fleet.close(0.1), 15)
    assert not list(box.storage.run_dir.iterdir())


async def test_shutting_down_while_starting(box: Box, fleet: Fleet, script: Script) -> None:
    script["worker"] = {"never_ready": True}
    await box.deployed()
    await until(lambda: any(box.storage.run_dir.iterdir()))
    await asyncio.wait_for(fleet.close(5), 15)
    assert not list(box.storage.run_dir.iterdir())
    assert (await box.replicas())[0].status == "stopped"


async def test_a_restart_serves_again_and_tells_of_the_old_replicas(
    box: Box, owner: Principal, fleet: Fleet
) -> None:
    await box.deployed()
    await serving(box, owner)
    await fleet.close(1)
    async with box.database.write() as session:  # as an app that was killed leaves it
        await session.execute(update(Replica).values(status="ready"))
    (box.storage.run_dir / "0badcafe").mkdir()
    box.fleet = box.new_fleet()
    await box.fleet.start()
    assert not (box.storage.run_dir / "0badcafe").exists()
    await serving(box, owner)
    new, old = await box.replicas()
    assert (old.status, old.detail) == ("stopped", "The app was restarted.")
    assert new.status in ("starting", "ready")


async def test_what_another_release_stored_does_not_keep_the_box_down(
    box: Box, owner: Principal
) -> None:
    await box.deployed("good")
    await box.deployed("odd")
    async with box.database.write() as session:
        await session.execute(
            update(ModelVersion)
            .where(ModelVersion.model_id.in_(select(Model.id).where(Model.name == "odd")))
            .values(manifest={"kind": "decoder", "from_the_future": True})
        )
    await box.fleet.start()
    await serving(box, owner, "good")
    with pytest.raises(NotFound):
        box.fleet.resolve(owner, "odd")


async def test_ended_replicas_are_forgotten_in_time(
    box: Box, owner: Principal, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.deployments.replica_rows.NUM_KEPT", 1)
    for number in range(1, 4):
        await box.deployed()
        await serving(box, owner, f"tiny@{number}")

    async def is_pruned() -> bool:
        return len(await box.replicas()) == 2

    await until_async(is_pruned)
    async with box.database.read() as session:
        ids = set(await session.scalars(select(Replica.id)))

    def logs() -> set[str]:
        return {path.stem for path in (box.storage.data_dir / "logs").glob("replica-*")}

    await until(lambda: logs() == {replica_log_name(replica_id) for replica_id in ids})
