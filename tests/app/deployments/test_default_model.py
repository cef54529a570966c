"""The operator's recommended model: chosen, with a reason, for everybody who can call it."""

import pytest

from app.core.errors import InvalidRequest, NotFound
from app.deployments import service
from app.deployments.default_model import choose_default, default_candidates, end_default
from app.deployments.default_model import find_default as find
from app.organizations.principal import Principal
from tests.app.deployments.box import Box


@pytest.fixture
async def owner(box: Box) -> Principal:
    return await box.organization()


async def test_there_is_one_with_its_reason(box: Box, owner: Principal) -> None:
    await box.deployed("one")
    await box.deployed("two")
    organization_id = owner.organization_id
    async with box.database.write() as session:
        assert await find(session) is None
        await choose_default(session, organization_id, "one", "the fastest here")
        first = await choose_default(session, organization_id, "one", "  the best here ")
        assert (first.name, first.note, first.is_public) == ("one", "the best here", False)
    async with box.database.write() as session:
        await choose_default(session, organization_id, "two")
    async with box.database.read() as session:
        found = await find(session)
        assert found is not None
        assert found.since is not None
        assert (found.name, found.note) == ("two", "")
        states = await service.list_endpoints(session, organization_id)
        assert [state.endpoint.is_default for state in states] == [False, True]
    async with box.database.write() as session:
        await end_default(session)
        assert await find(session) is None


async def test_another_organization_sees_it_once_published(box: Box, owner: Principal) -> None:
    await box.deployed("one")
    rival = await box.organization("rival")
    async with box.database.write() as session:
        await choose_default(session, owner.organization_id, "one", "why")
        assert await find(session, rival.organization_id) is None
        assert await find(session, owner.organization_id) is not None
        with pytest.raises(NotFound):
            await choose_default(session, rival.organization_id, "one")
        assert await default_candidates(session, rival.organization_id) == []
        await service.set_endpoint_public(session, owner.organization_id, "one", True)
        found = await find(session, rival.organization_id)
        assert found is not None
        assert found.note == "why"


async def test_a_reason_is_short_and_printable(box: Box, owner: Principal) -> None:
    await box.deployed("one")
    for note in ("x" * 301, "two\nlines"):
        async with box.database.read() as session:
            with pytest.raises(InvalidRequest, match="at most 300"):
                await choose_default(session, owner.organization_id, "one", note)
