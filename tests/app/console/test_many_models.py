"""Lists too long for one page: models are found by name and shown page after page, and versions
are listed around the one that is looked at."""

import re
from datetime import timedelta

from app.console.model_view import NUM_VERSIONS, version_window
from app.console.models_view import PAGE_MODELS
from app.core import clock
from app.core.ids import new_id
from app.registry.tables import Model, ModelVersion
from tests.app.console.conftest import Console
from tests.app.console.samples import add_model, organization_id


async def _add_models(console: Console, count: int) -> None:
    async with console.database.write() as session:
        owner = await organization_id(session)
        for number in range(count):
            model = Model(
                id=new_id("model"),
                organization_id=owner,
                name=f"model-{number}",
                created_at=clock.now() + timedelta(seconds=number),
            )
            session.add(model)
            await session.flush()
            session.add(_version(model.id, 1))


def _version(model_id: str, number: int) -> ModelVersion:
    return ModelVersion(
        id=new_id("version"),
        model_id=model_id,
        number=number,
        upload_id=new_id("upload"),
        filename="a.pt2",
        upload_bytes=1,
        sha256="0" * 64,
        status="failed",
        created_at=clock.now(),
    )


def _names(page: str) -> list[str]:
    return re.findall(r"<strong>(model-\d+)</strong>", page)


async def test_models_are_shown_page_after_page_and_each_once(owned: Console) -> None:
    count = PAGE_MODELS + 7
    await _add_models(owned, count)
    first = (await owned.client.get("/console/models")).text
    assert f"1 to {PAGE_MODELS} of {count}" in first
    assert _names(first)[0] == f"model-{count - 1}", "newest first"
    following = re.search(r'href="([^"]+)" rel="next"', first)
    assert following
    second = (await owned.client.get(following[1])).text
    assert 'rel="next"' not in second
    assert sorted(_names(first) + _names(second)) == sorted(f"model-{n}" for n in range(count))
    beyond = (await owned.client.get("/console/models?page=99")).text
    assert _names(beyond) == _names(second)


async def test_models_are_found_by_a_part_of_their_name(owned: Console) -> None:
    await _add_models(owned, 12)
    page = (await owned.client.get("/console/models?q=EL-1")).text
    assert _names(page) == ["model-11", "model-10", "model-1"]
    assert 'value="EL-1"' in page
    for nothing in ("%25", "_", "elsewhere"):  # a pattern's own characters find only themselves
        page = (await owned.client.get(f"/console/models?q={nothing}")).text
        assert "No model is named like that" in page


async def test_the_list_of_versions_goes_on_from_the_one_that_is_shown(owned: Console) -> None:
    count = 2 * NUM_VERSIONS + 3
    async with owned.database.write() as session:
        made = await add_model(session, "digits")
        session.add_all(_version(made.model_id, number) for number in range(2, count + 1))
    seen: set[int] = set()
    address = "/console/models/digits"
    while address:
        page = (await owned.client.get(address)).text
        listed = page[page.index(">Versions<") :]
        seen |= {int(n) for n in re.findall(r"/versions/(\d+)\">\d|/versions/(\d+)\" aria", listed)
                 for n in n if n}  # fmt: skip
        older = re.search(r'href="([^"]+)">Older<', listed)
        address = older[1] if older else ""
    assert seen == set(range(1, count + 1))


def test_the_window_of_versions_is_the_newest_or_begins_with_the_shown_one() -> None:
    numbers = list(range(100, 0, -1))
    newest = version_window(numbers, 95)
    assert (newest.numbers[0], newest.newer, newest.older) == (100, None, 100 - NUM_VERSIONS)
    middle = version_window(numbers, 50)
    assert (middle.numbers[0], middle.newer, middle.older) == (
        50,
        50 + NUM_VERSIONS,
        50 - NUM_VERSIONS,
    )
    oldest = version_window(numbers, 1)
    assert (oldest.numbers, oldest.older) == ([1], None)
