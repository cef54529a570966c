"""The tables of `docs/clients.md` are true: every parameter of the installed clients' methods is in
them, and does what they say when it is sent through the client."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import openai
import pytest
from pydantic import BaseModel

from runtime.protocol import Embed, Generate
from tests.app.api.conftest import ORGANIZATION, Box
from tests.app.api.scripted_worker import EMBEDDER

DOCUMENT = Path(__file__).parents[3] / "docs" / "clients.md"
SECTION = re.compile(r"^## POST (\S+)$(.*?)(?=^## )", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)` \| (honoured|ignored|refused) \|", re.MULTILINE)
TABLES = {route: dict(ROW.findall(text)) for route, text in SECTION.findall(DOCUMENT.read_text())}
# Of the client, not of the API.
OPTIONS = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
# Of an answer, what is another one each time.
CHANGING = re.compile(rb'"(id|item_id|created|created_at)": ?("[^"]*"|\d+)')

HELLO: Any = [{"role": "user", "content": "hello there"}]
OTHERS: Any = [{"role": "user", "content": "others"}]
SCHEMA: Any = {"type": "object", "properties": {}}
CHAT_TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
FLAT_TOOLS: Any = [{"type": "function", "name": "f", "parameters": SCHEMA}]
CLAUDE_TOOLS: Any = [{"name": "f", "input_schema": SCHEMA}]
BLOCK: Any = {"model": "m", "policy": {"input": {"mode": "block"}}}
FORMAT: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}


class Place(BaseModel):
    x: int


class Given(msgspec.Struct):
    """A value of a parameter, and what else must be sent for it to have a meaning."""

    value: Any
    beside: dict[str, Any] = {}


SAMPLING: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 3},
    "max_tokens": 3,
    "model": "absent",
    "n": 2,
    "presence_penalty": 0.5,
    "seed": 7,
    "stop": ["w3"],
    "stream": True,
    "stream_options": Given({"include_usage": True}, {"stream": True}),
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "u",
}
OPENAI_HINTS: dict[str, Any] = {
    "metadata": {"run": "7"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "flex",
    "store": True,
    "moderation": BLOCK,
    "parallel_tool_calls": False,
}
CLAUDE: dict[str, Any] = {
    "messages": OTHERS,
    "model": "absent",
    "cache_control": {"type": "ephemeral"},
    "output_config": FORMAT,
    "speed": "fast",
    "system": "be brief",
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "tool_choice": Given({"type": "any"}, {"tools": CLAUDE_TOOLS}),
    "tools": CLAUDE_TOOLS,
    "user_profile_id": "u",
    "workspace_id": "wrkspc_1",
}
VALUES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": SAMPLING
    | OPENAI_HINTS
    | {
        "messages": OTHERS,
        "audio": {"voice": "alloy", "format": "wav"},
        "function_call": {"name": "f"},
        "functions": [{"name": "f"}],
        "logprobs": True,
        "max_completion_tokens": 3,
        "modalities": ["text", "audio"],
        "prediction": {"type": "content", "content": "w0"},
        "reasoning_effort": "low",
        "response_format": {"type": "json_object"},
        "tool_choice": Given("required", {"tools": CHAT_TOOLS}),
        "tools": CHAT_TOOLS,
        "top_logprobs": Given(2, {"logprobs": True}),
        "verbosity": "low",
        "web_search_options": {},
    },
    "/v1/completions": SAMPLING
    | {"prompt": "others", "best_of": 3, "echo": True, "logprobs": 1, "suffix": "end"},
    "/v1/embeddings": {
        "input": "others",
        "model": "absent",
        "dimensions": 2,
        "encoding_format": "base64",
        "user": "u",
    },
    "/v1/responses": SAMPLING
    | OPENAI_HINTS
    | {
        "access_programs": {"x": "y"},
        "background": True,
        "background_options": {"completion_window": "2h"},
        "context_management": [{"type": "compaction"}],
        "conversation": "conv_1",
        "image": {"quality": "high"},
        "include": ["message.output_text.logprobs"],
        "input": "others",
        "instructions": "be brief",
        "max_output_tokens": 3,
        "max_tool_calls": 3,
        "previous_response_id": "resp_1",
        "prompt": {"id": "pmpt_1"},
        "reasoning": {"effort": "low"},
        "stream_options": Given({"include_obfuscation": False}, {"stream": True}),
        "text": {"format": {"type": "json_object"}},
        "tool_choice": Given("required", {"tools": FLAT_TOOLS}),
        "tools": FLAT_TOOLS,
        "top_logprobs": 2,
        "truncation": "auto",
    },
    "/v1/messages": CLAUDE
    | {
        "max_tokens": 3,
        "container": "c",
        "diagnostics": {"previous_message_id": None},
        "inference_geo": "eu",
        "metadata": {"user_id": "u"},
        "service_tier": "priority",
        "stop_sequences": ["w3"],
        "stream": True,
    },
    "/v1/messages/count_tokens": CLAUDE | {"output_format": Place},
}
BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": HELLO},
    "/v1/completions": {"model": "tiny", "prompt": "hello there"},
    "/v1/embeddings": {"model": "embedder", "input": "hello there", "encoding_format": "float"},
    "/v1/responses": {"model": "tiny", "input": "hello there"},
    "/v1/messages": {"model": "tiny", "messages": HELLO, "max_tokens": 99},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": HELLO},
}


def methods(
    openai_client: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic
) -> dict[str, Callable[..., Any]]:
    """The clients' own methods, which give the bare answer."""
    raw = openai_client.with_raw_response
    return {
        "/v1/chat/completions": raw.chat.completions.create,
        "/v1/completions": raw.completions.create,
        "/v1/embeddings": raw.embeddings.create,
        "/v1/responses": raw.responses.create,
        "/v1/messages": claude.with_raw_response.messages.create,
        "/v1/messages/count_tokens": claude.with_raw_response.messages.count_tokens,
    }


def test_every_parameter_of_the_clients_is_in_the_tables() -> None:
    clients = openai.AsyncOpenAI(api_key="x"), anthropic.AsyncAnthropic(api_key="x")
    for route, method in methods(*clients).items():
        names = set(inspect.signature(inspect.unwrap(method)).parameters) - OPTIONS
        assert len(names) > 4
        assert TABLES[route].keys() == names, route
    assert TABLES.keys() == BASES.keys()


class Asked(msgspec.Struct):
    """What reached the worker, and what came back but for what is another each time."""

    sent: bytes
    answer: bytes


async def ask(box: Box, method: Callable[..., Any], fields: dict[str, Any]) -> Asked:
    box.workers["tiny"]._seen.clear()  # nothing is cached
    for worker in box.workers.values():
        worker.received.clear()
    raw = await method(**fields)
    answer = await raw.http_response.aread()
    (sent,) = (
        msgspec.structs.replace(message, request_id="")
        for worker in box.workers.values()
        for message in worker.received
        if isinstance(message, Generate | Embed)
    )
    return Asked(msgspec.json.encode(sent), CHANGING.sub(b"", answer))


@pytest.mark.parametrize("route", BASES)
async def test_every_parameter_does_what_its_table_says(box: Box, route: str) -> None:
    await box.connect("embedder", EMBEDDER)
    claude = anthropic.AsyncAnthropic(
        base_url=box.url, api_key=box.keys[ORGANIZATION], max_retries=0
    )
    async with box.client() as client, claude:
        method = methods(client, claude)[route]
        for name, said in TABLES[route].items():
            given = VALUES[route][name]
            if not isinstance(given, Given):
                given = Given(given)
            base = BASES[route] | given.beside
            if said == "refused" or given.value == "absent":
                status = 404 if given.value == "absent" else 400
                with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as caught:
                    await method(**base | {name: given.value})
                assert caught.value.status_code == status, name
                body: Any = caught.value.body
                error = body.get("error", body)
                assert error["param"] == name
                assert error["code"] in ("unsupported_parameter", "model_not_found", "not_found")
                continue
            without = await ask(box, method, base)
            result = await ask(box, method, base | {name: given.value})
            assert (result == without) == (said == "ignored"), name


@pytest.mark.parametrize("route", [route for route in BASES if route != "/v1/embeddings"])
async def test_what_is_beyond_the_signatures_is_honoured(box: Box, route: str) -> None:
    extras: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.5,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "seed": 7,
        "logit_bias": {"5": 3},
        "ignore_eos": True,
    }
    section = DOCUMENT.read_text().partition("## Beyond")[2]
    assert set(re.findall(r"`(\w+)`", section)) == extras.keys() | {
        "return_token_ids",
        "extra_body",
        "stop",
        "stop_sequences",
        "n",
    }
    claude = anthropic.AsyncAnthropic(base_url=box.url, api_key=box.keys[ORGANIZATION])
    async with box.client() as client, claude:
        method, base = methods(client, claude)[route], BASES[route]
        plain = await ask(box, method, base)
        for name, value in extras.items():
            result = await ask(box, method, base | {"extra_body": {name: value}})
            assert result.sent != plain.sent, name
        if route in ("/v1/responses", "/v1/messages"):
            stopped = await ask(box, method, base | {"extra_body": {"stop": ["w3"]}})
            assert b"w2 " in stopped.answer
            assert b"w4 " not in stopped.answer
            with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)):
                await method(**base, extra_body={"n": 2})
            unknown = {"stream_options": {"include_obfuscation": False}}
            ignored = await ask(box, method, base | {"extra_body": unknown})
            assert ignored == plain
        if route == "/v1/completions":
            shown = await ask(box, method, base | {"extra_body": {"return_token_ids": True}})
            assert b'"token_ids":[0,1,2' in shown.answer
