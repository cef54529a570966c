"""Saying what a model takes: with its upload, and after its build has asked for it."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import select, update

from app.registry.input_hints import parse_inputs
from app.registry.tables import ModelVersion
from runtime.protocol import BuildHints, Schema, TensorSpec
from tests.app.console.conftest import ORIGIN, Console
from tests.app.console.samples import RECEIPT, TENSOR, add_model
from tests.app.registry.archive_files import write_pt2

ASKED = "Say what it takes, these lines:\n    ids: int64[batch, tokens] in 0..49\nand build again."
INPUTS = "ids: int64[batch, tokens<=9]"


@pytest.fixture
def program(tmp_path: Path) -> bytes:
    return write_pt2(tmp_path / "model.pt2").read_bytes()


async def upload(console: Console, program: bytes, **fields: str) -> Any:
    data = {"csrf_token": await console.csrf_token("/console/upload"), "name": "m", **fields}
    return await console.client.post(
        "/console/upload",
        data=data,
        files={"file": ("model.pt2", program)},
        headers={"Origin": ORIGIN},
    )


async def versions(console: Console) -> list[ModelVersion]:
    async with console.database.read() as session:
        return list(await session.scalars(select(ModelVersion).order_by(ModelVersion.number)))


def hints(version: ModelVersion) -> BuildHints:
    return msgspec.convert(version.hints, BuildHints)


async def test_what_is_said_with_an_upload_is_kept_and_shown_for_the_next(
    owned: Console, program: bytes
) -> None:
    done = await upload(owned, program, inputs=INPUTS, accepts_loss="on")
    assert done.status_code == 303, done.text
    (version,) = await versions(owned)
    assert hints(version) == BuildHints(inputs=parse_inputs(INPUTS), accepts_loss=True)
    page = (await owned.client.get("/console/upload?name=m")).text
    assert "ids: int64[batch, tokens&lt;=9]</textarea>" in page
    assert 'value="on" checked' in page
    await upload(owned, program, inputs=" ")
    assert hints((await versions(owned))[1]) == BuildHints(
        inputs=parse_inputs(INPUTS), accepts_loss=False, is_remembered=True
    )


async def test_an_emptied_field_forgets_what_was_remembered(owned: Console, program: bytes) -> None:
    page = (await owned.client.get("/console/upload?name=m")).text
    assert "had_inputs" not in page
    await upload(owned, program, inputs=INPUTS)
    page = (await owned.client.get("/console/upload?name=m")).text
    assert '<input type="hidden" name="had_inputs" value="on">' in page
    refused = await upload(owned, program, inputs="ids: long[batch]", had_inputs="on")
    assert '<input type="hidden" name="had_inputs" value="on">' in refused.text
    await upload(owned, program, inputs="", had_inputs="on")
    assert hints((await versions(owned))[1]) == BuildHints()
    assert "had_inputs" not in (await owned.client.get("/console/upload?name=m")).text


async def test_inputs_that_cannot_be_read_come_back_with_the_reason(
    owned: Console, program: bytes
) -> None:
    refused = await upload(owned, program, inputs="ids: long[batch]")
    assert refused.status_code == 400
    assert "did you mean int64?" in refused.text
    assert "ids: long[batch]</textarea>" in refused.text
    assert await versions(owned) == []


async def test_a_build_that_asks_for_inputs_is_built_again_with_them(
    owned: Console, program: bytes
) -> None:
    await upload(owned, program)
    async with owned.database.write() as session:
        failed = {"status": "failed", "error_code": "needs_inputs", "error_message": ASKED}
        await session.execute(update(ModelVersion).values(**failed))
    path = "/console/models/m/versions/1"
    page = (await owned.client.get(path)).text
    assert "What does version 1 take?" in page
    assert ">ids: int64[batch, tokens] in 0..49</textarea>" in page

    assert 'name="had_inputs"' in page

    refused = await owned.post(path, f"{path}/rebuild", inputs="ids int64", had_inputs="on")
    assert refused.status == 400
    assert 'name="had_inputs"' in refused.text
    assert ">ids int64</textarea>" in refused.text
    assert "is not a name, a dtype and axes" in refused.text

    done = await owned.post(path, f"{path}/rebuild", inputs=INPUTS)
    assert (done.status, done.location) == (303, "/console/models/m/versions/2")
    first, second = await versions(owned)
    assert (second.status, second.upload_id) == ("queued", first.upload_id)
    assert hints(second).inputs == parse_inputs(INPUTS)


async def test_other_failures_ask_for_nothing(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "bad", "failed", error_code="training_mode", error_message="No.")
    page = (await owned.client.get("/console/models/bad")).text
    assert "/rebuild" not in page


async def test_warnings_and_ranges_are_shown(owned: Console) -> None:
    spec = TensorSpec(
        name="ids",
        dtype="int64",
        shape=[None, None],
        min_shape=[1, 2],
        max_shape=[None, 512],
        minimum=0,
        maximum=30521,
    )
    schema = Schema(inputs=[spec], outputs=TENSOR.schema.outputs, is_batched=True)  # type: ignore[union-attr]
    receipt = msgspec.structs.replace(RECEIPT, warnings=["The output 'logits' never changed."])
    async with owned.database.write() as session:
        manifest = msgspec.structs.replace(TENSOR, schema=schema)
        await add_model(session, "m", manifest=manifest, receipt=receipt)
    page = (await owned.client.get("/console/models/m")).text
    assert "batch \N{MULTIPLICATION SIGN} 2 to 512" in page
    assert "0 to 30,521" in page
    assert "Look at this before you use it" in page
    assert "The output &#39;logits&#39; never changed." in page
