"""The playground of decoders: conversations and texts, at once and streamed, and its meter, which
ends at the receipt's amount."""

import asyncio
import html
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from litestar import Litestar

from app.deployments.link import ReplicaLink
from app.settings import Settings
from runtime.protocol import Generate, Manifest, Serve
from tests.app.api.conftest import FakeFleet, FakeTarget
from tests.app.api.scripted_worker import DECODER, TENSOR, ScriptedWorker
from tests.app.whole_app import URL, Tenant, add_tenant, client, running

HERE = "/console/models/tiny/playground"
assert DECODER.decoder is not None
BASE = msgspec.structs.replace(
    DECODER, decoder=msgspec.structs.replace(DECODER.decoder, has_chat_template=False)
)


class Playground:
    """Somebody signed in, before a scripted model."""

    def __init__(self, application: Litestar, http: httpx.AsyncClient, tenant: Tenant) -> None:
        self.application = application
        self.http = http
        self.tenant = tenant
        self.workers: dict[str, ScriptedWorker] = {}

    async def connect(self, name: str, manifest: Manifest) -> None:
        state = self.application.state
        worker = self.workers[name] = ScriptedWorker(manifest)
        path = state.storage.run_dir / f"{name}.sock"
        await worker.listen(path)
        link = ReplicaLink(state.journal.commit_step)
        await asyncio.get_running_loop().create_unix_connection(lambda: link.stream, str(path))
        await link.serve(Serve(artifact_dir=""), 5.0)
        state.fleet.targets[name] = FakeTarget(name, manifest, link)

    async def post(self, path: str, **fields: str) -> httpx.Response:
        data = {"csrf_token": self.tenant.csrf_token, "temperature": "1", "max_tokens": "64"}
        return await self.http.post(path, data=data | fields, headers={"Origin": URL})

    async def stream(self, text: str, **fields: str) -> list[dict[str, Any]]:
        response = await self.post(f"{HERE}/stream", text=text, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["content-security-policy"]
        lines = response.text.split("\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]

    async def receipt(self, request_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/v1/receipts/{request_id}", headers=self.tenant.bearer)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
async def playground(settings: Settings) -> AsyncIterator[Playground]:
    async with running(settings, has_clerk=False) as application, client(application) as http:
        tenant = await add_tenant(application, "ada")
        http.cookies.update(tenant.cookies)
        fleet, application.state.fleet = application.state.fleet, FakeFleet()
        made = Playground(application, http, tenant)
        await made.connect("tiny", DECODER)
        yield made
        for name, worker in made.workers.items():
            application.state.fleet.targets[name].link.close("stopped by the test")
            await worker.close()
        application.state.fleet = fleet


def nano_of(amount: str) -> int:
    """Of an amount with nine decimals."""
    return int(amount.removeprefix("$").replace(".", ""))


async def test_a_stream_counts_up_to_what_the_receipt_says(playground: Playground) -> None:
    events = await playground.stream("tell me something")
    meters = [event["meter"] for event in events if "meter" in event]
    assert "".join(event.get("text", "") for event in events) == "".join(
        f"w{index} " for index in range(8)
    )
    outputs = [meter["num_output"] for meter in meters]
    assert outputs == sorted(outputs)
    amounts = [nano_of(meter["amount"]) for meter in meters]
    assert amounts == sorted(amounts)
    assert meters[-1]["num_output"] == 8
    end = events[-1]["end"]
    receipt = await playground.receipt(end["request_id"])
    assert nano_of(end["amount"]) == receipt["amount_nano"] == amounts[-1] > 0
    assert (end["outcome"], receipt["route"]) == ("completed", "/console/playground")
    assert receipt["api_key_name"] == "console"


async def test_what_was_sent_before_is_shown_as_cached(playground: Playground) -> None:
    await playground.stream("the same again")
    end = (await playground.stream("the same again"))[-1]["end"]
    assert end["num_cached"] == end["num_input"] - 1 > 0


async def test_without_script_the_answer_comes_with_the_page(playground: Playground) -> None:
    page = await playground.http.get(HERE)
    assert page.status_code == 200
    assert "Message" in page.text
    answer = await playground.post(HERE, text="tell <me>", system="be brief")
    assert answer.status_code == 200
    assert "w0 w1 w2" in answer.text
    assert "tell &lt;me&gt;" in answer.text
    request_id = re.findall(r"/console/receipts/(req_\w+)", answer.text)[0]
    receipt = await playground.receipt(request_id)
    shown = re.findall(r'data-meter="amount">([^<]+)<', answer.text)[0]
    assert nano_of(shown) == receipt["amount_nano"]

    # The next turn sends the conversation.
    turns = html.unescape(re.findall(r'name="turns" value="([^"]*)"', answer.text)[0])
    assert [turn["role"] for turn in json.loads(turns)] == ["user", "assistant"]
    await playground.post(HERE, text="and then?", turns=turns, system="be brief")
    sent = [m for m in playground.workers["tiny"].received if isinstance(m, Generate)][-1]
    assert sent.messages is not None
    roles = [message.role for message in sent.messages]
    assert roles == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"text": " "}, "Write a message first"),
        ({"text": "hi", "temperature": "hot"}, "&#39;hot&#39; is not a number"),
        ({"text": "hi", "temperature": "nan"}, "is not a number"),
        ({"text": "hi", "temperature": "3"}, "temperature"),
        ({"text": "hi", "max_tokens": "0"}, "max_tokens"),
        ({"text": "hi", "max_tokens": "9" * 5000}, "is not a whole number"),
        ({"text": "hi", "turns": "[1"}, "Start over"),
        ({"text": "hi", "turns": '[{"role": "root", "content": ""}]'}, "Start over"),
    ],
)
async def test_what_cannot_run_is_refused_in_words(
    playground: Playground, fields: dict[str, str], complaint: str
) -> None:
    for path in (HERE, f"{HERE}/stream"):
        answer = await playground.post(path, **fields)
        assert answer.status_code == 400, answer.text
        assert complaint in answer.text
    assert not any(isinstance(m, Generate) for m in playground.workers["tiny"].received)


async def test_a_run_that_is_stopped_tells_its_cost_afterwards(playground: Playground) -> None:
    task = asyncio.create_task(playground.post(f"{HERE}/stream", text="slow@20", max_tokens="200"))
    received = playground.workers["tiny"].received
    while not any(isinstance(message, Generate) for message in received):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.08)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (sent,) = (message for message in received if isinstance(message, Generate))
    answer = await playground.http.get(f"{HERE}/runs/{sent.request_id}")
    assert answer.status_code == 200, answer.text
    reading, receipt = answer.json(), await playground.receipt(sent.request_id)
    assert (reading["outcome"], receipt["outcome"]) == ("cancelled", "cancelled")
    assert nano_of(reading["amount"]) == receipt["amount_nano"]


async def test_a_model_without_a_template_continues_the_text(playground: Playground) -> None:
    await playground.connect("base", BASE)
    path = "/console/models/base/playground"
    assert "continues the text" in (await playground.http.get(path)).text
    answer = await playground.post(path, text="Once upon a time")
    assert "w0 w1" in answer.text
    sent = [m for m in playground.workers["base"].received if isinstance(m, Generate)][-1]
    assert (sent.text, sent.messages) == ("Once upon a time", None)


async def test_tensor_programs_show_the_receipts_amount(playground: Playground) -> None:
    await playground.connect("doubler", TENSOR)
    answer = await playground.post("/console/models/doubler/playground", x="[[1, 2]]", k="[1]")
    assert answer.status_code == 200, answer.text
    request_id = re.findall(r"/console/receipts/(req_\w+)", answer.text)[0]
    receipt = await playground.receipt(request_id)
    shown = re.findall(r"<dt>Cost</dt><dd>([^<]+)<", answer.text)[0]
    assert nano_of(shown) == receipt["amount_nano"] > 0
