import pytest
from sqlalchemy import func, select

from app.core.errors import Conflict, InvalidRequest, NotFound
from app.deployments import service
from app.deployments.tables import Deployment, Endpoint
from app.organizations.principal import Principal
from tests.app.deployments.box import Box


@pytest.fixture
async def owner(box: Box) -> Principal:
    return await box.organization()


async def test_each_version_is_a_revision_and_the_endpoint_stays(
    box: Box, owner: Principal
) -> None:
    first = await box.deployed()
    second = await box.deployed(num_replicas=2, serving={"max_sequences": 8})
    third = await box.deployed()
    async with box.database.read() as session:
        state = await service.get_endpoint(session, owner.organization_id, "tiny")
        revisions = await service.list_revisions(session, owner.organization_id, "tiny")
        states = await service.list_endpoints(session, owner.organization_id)
    assert [version.id for _, version in revisions] == [third.id, second.id, first.id]
    assert [revision.number for revision, _ in revisions] == [3, 2, 1]
    # Settings carry over until they are changed.
    assert (state.revision.num_replicas, state.revision.serving) == (2, {"max_sequences": 8})
    assert [other.endpoint.name for other in states] == ["tiny"]
    assert state.model.name == "tiny"


async def test_another_organizations_endpoint_is_not_found(box: Box) -> None:
    await box.deployed()
    rival = (await box.organization("rival")).organization_id
    async with box.database.write() as session:
        assert await service.list_endpoints(session, rival) == []
        for attempt in (
            service.find_endpoint(session, rival, "tiny"),
            service.get_endpoint(session, rival, "tiny"),
            service.list_revisions(session, rival, "tiny"),
            service.set_endpoint_public(session, rival, "tiny", True),
            service.set_endpoint_default(session, rival, "tiny", True),
            service.stop_deployment(session, rival, "tiny"),
            service.start_deployment(session, rival, "tiny"),
            service.roll_back(session, rival, "tiny"),
        ):
            with pytest.raises(NotFound):
                await attempt


async def test_there_is_one_default(box: Box, owner: Principal) -> None:
    await box.deployed("one")
    await box.deployed("two")
    async with box.database.write() as session:
        await service.set_endpoint_default(session, owner.organization_id, "one", True)
        await service.set_endpoint_default(session, owner.organization_id, "two", True)
        await service.set_endpoint_public(session, owner.organization_id, "two", True)
    async with box.database.read() as session:
        states = await service.list_endpoints(session, owner.organization_id)
    assert [state.endpoint.is_default for state in states] == [False, True]
    assert [state.endpoint.is_public for state in states] == [False, True]


async def test_rolling_back_and_forth(box: Box, owner: Principal) -> None:
    for _ in range(3):
        await box.deployed()
    organization_id = owner.organization_id
    async with box.database.write() as session:
        await service.stop_deployment(session, organization_id, "tiny")
        assert (await service.roll_back(session, organization_id, "tiny")).number == 2
        assert (await service.roll_back(session, organization_id, "tiny")).number == 1
        with pytest.raises(Conflict, match="no earlier revision"):
            await service.roll_back(session, organization_id, "tiny")
        assert (await service.roll_back(session, organization_id, "tiny", 3)).number == 3
        with pytest.raises(Conflict, match="no revision 9"):
            await service.roll_back(session, organization_id, "tiny", 9)
    async with box.database.read() as session:
        state = await service.get_endpoint(session, organization_id, "tiny")
    assert not state.deployment.is_stopped  # who rolls back wants it to run


async def test_a_new_version_starts_a_stopped_deployment(box: Box, owner: Principal) -> None:
    await box.deployed()
    async with box.database.write() as session:
        await service.stop_deployment(session, owner.organization_id, "tiny")
    await box.deployed()
    async with box.database.read() as session:
        state = await service.get_endpoint(session, owner.organization_id, "tiny")
    assert not state.deployment.is_stopped


async def test_only_ready_versions_are_deployed(box: Box) -> None:
    version = await box.version()
    async with box.database.write() as session:
        with pytest.raises(Conflict, match="is queued"):
            await service.deploy_version(session, version)


@pytest.mark.parametrize(
    "serving",
    [
        {"device": "cuda"},
        {"artifact_dir": "/etc"},
        {"max_sequences": 0},
        {"max_sequences": 1.5},
        {"kv_cache_bytes": -1},
    ],
    ids=str,
)
def test_serving_settings_are_checked(serving: dict[str, int | float]) -> None:
    with pytest.raises(InvalidRequest):
        service.check_serving(serving)


def test_numbers_of_replicas_are_checked() -> None:
    assert service.check_serving({"latency_target_ms": 0, "max_batch_rows": 8})
    for number in (0, 65):
        with pytest.raises(InvalidRequest):
            service.check_num_replicas(number)


async def test_a_failed_deployment_leaves_no_rows(box: Box) -> None:
    await box.deployed()
    rival = await box.organization("rival")
    version = await box.version(organization="rival", status="ready")
    async with box.database.write() as session:
        row = await session.get_one(type(version), version.id)
        with pytest.raises(Conflict, match="another name"):
            await service.deploy_version(session, row)
    async with box.database.read() as session:
        for table in (Deployment, Endpoint):
            count = await session.scalar(
                select(func.count()).where(table.organization_id == rival.organization_id)
            )
            assert count == 0
