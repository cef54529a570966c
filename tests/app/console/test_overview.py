"""The pages Overview and Box."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update

from app.console import overview_view
from app.core import clock
from app.core.database import Database
from app.deployments.devices import Device, Devices, read_gpus
from app.deployments.tables import Endpoint, Replica
from app.organizations.service import create_organization
from app.settings import Settings
from tests.app.console.conftest import Console
from tests.app.console.samples import add_model, add_usage, organization_id
from tests.app.console.test_billing_pages import Desk
from tests.app.whole_app import add_tenant, client, running

HERE, BOX = "/console/overview", "/console/box"


async def test_the_empty_overview_teaches_the_first_upload(owned: Console) -> None:
    page = (await owned.client.get(HERE)).text
    assert "tapeout push ./model.pt2 --name my-model" in page
    assert "Spent today" not in page
    home = await owned.client.get("/")
    assert home.headers["location"] == HERE


async def test_the_overview_adds_up_today_and_the_month(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = clock.now()
    moment = moment.replace(day=max(moment.day, 4), hour=12)  # three days before, in its month
    monkeypatch.setattr(clock, "now", lambda: moment)
    async with owned.database.write() as session:
        await add_model(session, "digits")
        await add_model(session, "waiting", "queued")
        theirs = await create_organization(session, "theirs")
        await add_model(session, "secret", owner="theirs")
        await add_usage(session, model="digits")
        before = moment - timedelta(days=3)
        monkeypatch.setattr(clock, "now", lambda: before)
        await add_usage(session, model="digits")
        monkeypatch.setattr(clock, "now", lambda: moment)
        mine = await organization_id(session)
    async with owned.database.read() as session:
        view = await overview_view.read_overview(session, mine, "usd")
        other = await overview_view.read_overview(session, theirs.id, "usd")
    assert view.today.spent_nano > 0
    assert view.month.spent_nano == 2 * view.today.spent_nano
    assert view.month.num_tokens == 2 * view.today.num_tokens > 0
    assert [build.model for build in view.builds] == ["waiting", "digits"]
    assert {line.endpoint_name for line in view.running} == {"digits"}
    assert (other.today.spent_nano, other.num_models) == (0, 1)
    page = (await owned.client.get(HERE)).text
    assert "secret" not in page
    for said in ("Spent today", "waiting to build", "What runs on cpu", "All models (2)"):
        assert said in page, said


async def test_the_overview_says_what_is_recommended_and_why(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "digits")
        await session.execute(
            update(Endpoint).values(is_default=True, default_note="reads <digits> best")
        )
    page = (await owned.client.get(HERE)).text
    assert "Why: reads &lt;digits&gt; best" in page


@pytest.fixture
async def operator(settings: Settings) -> AsyncIterator[Desk]:
    async with running(settings, has_clerk=False) as application, client(application) as http:
        tenant = await add_tenant(application, "operators", is_operator=True)
        http.cookies.update(tenant.cookies)
        yield Desk(application, http, tenant)


async def add_endpoint(database: Database, name: str, owner: str, *, is_public: bool) -> None:
    async with database.write() as session:
        await add_model(session, name, owner=owner)
        endpoint = await session.scalar(select(Endpoint).where(Endpoint.name == name))
        assert endpoint is not None
        endpoint.is_public = is_public


async def test_the_operator_recommends_a_model(operator: Desk) -> None:
    database = operator.database
    await add_tenant(operator.application, "acme")
    await add_endpoint(database, "mine", "operators", is_public=False)
    await add_endpoint(database, "open", "acme", is_public=True)
    await add_endpoint(database, "hidden", "acme", is_public=False)
    page = await operator.page(BOX)
    assert "gets 404, until you choose" in page
    assert '<option value="mine">mine (not published)</option>' in page
    assert '<option value="hidden"' not in page
    done = await operator.done(f"{BOX}/default-model", model="mine", note="the best")
    assert done == f"{BOX}?notice=default"
    page = await operator.page(BOX)
    assert "Why: the best" in page
    assert "It is not published: only operators can call it." in page
    assert await operator.done(f"{BOX}/default-model", model="open", note="") == (
        f"{BOX}?notice=default"
    )
    assert "It is not published" not in await operator.page(BOX)
    assert await operator.done(f"{BOX}/default-model", model="", note="") == (
        f"{BOX}?notice=default-gone"
    )
    async with database.read() as session:
        assert (await session.scalars(select(Endpoint).where(Endpoint.is_default))).all() == []


async def test_the_box_shows_what_all_organizations_run(operator: Desk) -> None:
    await add_tenant(operator.application, "acme")
    await add_endpoint(operator.database, "theirs", "acme", is_public=False)
    async with operator.database.write() as session:
        await session.execute(update(Replica).values(status="ready", memory_bytes=123_000_000))
    page = await operator.page(BOX)
    for said in ("theirs", "acme", "123 MB", "Memory in use, by everything"):
        assert said in page, said


async def test_a_processor_has_the_machines_memory() -> None:
    (device,) = await Devices("cpu").read()
    assert 0 < device.used_bytes < device.total_bytes
    assert device.name.endswith("cores")


async def test_without_a_driver_nothing_is_said_of_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await Devices("cuda").read() == []


async def test_the_driver_is_asked_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    asked = tmp_path / "asked"
    program.write_text(f"#!/bin/sh\necho x >> {asked}\necho 'NVIDIA H200, 143771, 1024'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    devices = Devices("cuda")
    expected = [Device(name="NVIDIA H200", total_bytes=143771 * 1024**2, used_bytes=1024 * 1024**2)]
    assert await devices.read() == await devices.read() == expected
    assert asked.read_text() == "x\n"


def test_lines_that_are_no_gpus_are_left_out() -> None:
    text = "NVIDIA A100, PCIe, 40960, 3\nbroken\nGPU, [N/A], [N/A]\n"
    assert [device.name for device in read_gpus(text)] == ["NVIDIA A100, PCIe"]
