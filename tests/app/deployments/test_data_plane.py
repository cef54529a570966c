"""The real data plane behind the real launcher: upload to answer, for both kinds of program."""

import asyncio
import signal
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from app.core.database import Database
from app.core.errors import RuntimeFailure
from app.core.storage import Storage
from app.deployments.fleet import Target
from app.deployments.launchers.local import LocalLauncher
from app.deployments.logs import build_log_name, read_log
from app.settings import Settings
from runtime.protocol import ChatMessage, Generate, Predict, SamplingParams, SequenceOutput, Tensor
from tests.app.deployments.box import Box
from tests.app.deployments.conftest import until, until_async
from tests.runtime.importing.programs import export_digits
from tests.runtime.peer import make_decoder_artifact

pytestmark = pytest.mark.slow


@pytest.fixture
async def box(database: Database, storage: Storage, settings: Settings) -> AsyncIterator[Box]:
    launcher = LocalLauncher(storage)
    box = Box(database, storage, settings, launcher)
    await box.fleet.start()
    await box.builder.start()
    yield box
    await box.builder.close()
    await box.fleet.close(5)
    await launcher.close()
    assert not list(storage.run_dir.iterdir())


async def pushed(box: Box, upload: Path) -> Target:
    """What serves the upload once it is built and loaded."""
    version = await box.version(content=upload.read_bytes())  # noqa: ASYNC240

    async def is_built() -> bool:
        return (await box.read(version)).status not in ("queued", "building")

    await until_async(is_built, 120)
    version = await box.read(version)
    log = read_log(box.storage.log(build_log_name(version.id))).text
    assert version.status == "ready", f"{version.error_message}\n{log}"
    owner = await box.organization()

    def is_ready() -> bool:
        return any(view.is_ready for view in box.fleet.visible_endpoints(owner))

    try:
        await until(is_ready, 60)
    except TimeoutError:
        pytest.fail(str([replica.detail for replica in await box.replicas()]))
    return box.fleet.resolve(owner, "tiny")


async def test_a_tensor_program(box: Box, tmp_path: Path) -> None:
    target = await pushed(box, export_digits(tmp_path / "digits.pt2"))
    assert target.manifest.schema is not None
    (spec,) = target.manifest.schema.inputs
    shape = [size or 1 for size in spec.shape]
    image = np.ones(shape, spec.dtype)

    async def predict(number: int) -> bytes:
        tensor = Tensor(name=spec.name, dtype=spec.dtype, shape=shape, data=image.tobytes())
        predicted = await target.link.predict(Predict(request_id=f"req_{number}", inputs=[tensor]))
        return predicted.outputs[0].data

    answers = await asyncio.gather(*(predict(number) for number in range(100)))
    first = np.frombuffer(answers[0], "float32")
    for answer in answers:
        np.testing.assert_allclose(np.frombuffer(answer, "float32"), first, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeFailure) as refusal:
        await target.link.predict(Predict(request_id="wrong", inputs=[]))
    assert refusal.value.status == 400
    assert not target.link.closed


async def test_a_decoder(box: Box, tmp_path: Path) -> None:
    upload = tmp_path / "llama.tar"
    with tarfile.open(upload, "w") as tar:
        tar.add(make_decoder_artifact(tmp_path / "model"), "llama")
    target = await pushed(box, upload)
    link = target.link

    async def generate(request_id: str, **values: object) -> list[SequenceOutput]:
        sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        request = Generate(request_id=request_id, sampling=sampling, cache_salt=b"s", **values)  # type: ignore[arg-type]
        await link.prepare(request)
        link.start(request_id)
        steps = [step async for step in link.outputs(request_id)]
        return [output for step in steps for output in step]

    messages = [ChatMessage(role="user", content="Tell me of the sea. " * 20)]
    chat = await generate("chat", messages=messages)
    assert sum(len(output.token_ids) for output in chat) == 20
    assert chat[-1].finish_reason == "length"
    again = await generate("again", messages=messages)
    assert [o.token_ids for o in again] == [o.token_ids for o in chat]
    assert again[-1].num_cached_tokens > 0
    texts = [f"hello {number}" for number in range(8)]
    outputs = await asyncio.gather(*(generate(text, text=text) for text in texts))
    assert all(sum(len(o.token_ids) for o in one) == 20 for one in outputs)
    assert len(box.committed) == len(chat) + len(again) + sum(map(len, outputs))

    # It is stopped dead in the middle of an answer, and comes back.
    (replica,) = box.fleet._reconciler.replicas(_deployment_id(box, target))
    process = replica._process
    assert process is not None
    request = Generate(
        request_id="long",
        sampling=SamplingParams(max_tokens=3000, ignore_eos=True),
        cache_salt=b"s",
        text="x",
    )
    await link.prepare(request)
    link.start("long")
    stream = link.outputs("long")
    await anext(stream)
    process._signal(signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeFailure) as failure:
        async for _ in stream:
            pass
    assert failure.value.code == "worker_lost"
    await until(lambda: replica.target is not None and replica.target is not target, 60)


def _deployment_id(box: Box, target: Target) -> str:
    for view, _ in box.fleet.all_live():
        if view.name == target.endpoint_name:
            return view.desired.deployment_id
    raise AssertionError
