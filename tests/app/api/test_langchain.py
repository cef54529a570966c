"""LangChain's OpenAI classes, unmodified, against the box."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from runtime.protocol import ChatMessage, Generate, ToolCall
from tests.app.api.conftest import ORGANIZATION, Box
from tests.app.api.scripted_worker import EMBEDDER

EIGHT_WORDS = "w0 w1 w2 w3 w4 w5 w6 w7 "


class LookUp(BaseModel):
    """Looks a word up."""

    word: str


@pytest.fixture
async def http() -> AsyncIterator[Any]:
    """LangChain's own would outlive the test's event loop."""
    async with openai.DefaultAsyncHttpxClient() as http:
        yield http


def chat_of(box: Box, http: Any, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        http_async_client=http,
        base_url=f"{box.url}/v1",
        api_key=SecretStr(box.keys[ORGANIZATION]),
        model="tiny",
        max_retries=0,
        **options,
    )


def last_generate(box: Box) -> Generate:
    return [each for each in box.workers["tiny"].received if isinstance(each, Generate)][-1]


@pytest.mark.parametrize("use_responses_api", [False, True])
async def test_an_answer_and_a_stream(box: Box, http: Any, use_responses_api: bool) -> None:
    chat = chat_of(
        box, http, use_responses_api=use_responses_api, temperature=0.5, stream_usage=True
    )
    asked = [SystemMessage("be brief"), HumanMessage("hello there")]
    answer = await chat.ainvoke(asked)
    assert answer.text == EIGHT_WORDS
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == 6
    assert answer.usage_metadata["output_tokens"] == 8
    assert last_generate(box).sampling.temperature == 0.5
    chunks = [chunk async for chunk in chat.astream(asked)]
    assert "".join(chunk.text for chunk in chunks) == EIGHT_WORDS
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["input_token_details"]["cache_read"] == 5


@pytest.mark.parametrize("use_responses_api", [False, True])
async def test_tools_and_their_results(box: Box, http: Any, use_responses_api: bool) -> None:
    chat = chat_of(box, http, use_responses_api=use_responses_api)
    with_tools = chat.bind_tools([LookUp], tool_choice="required")
    answer = await with_tools.ainvoke("where?")
    assert isinstance(answer, AIMessage)
    assert [(call["name"], call["args"], call["id"]) for call in answer.tool_calls] == [
        ("LookUp", {"at": 1}, "call_1"),
        ("LookUp", {"at": 2}, "call_2"),
    ]
    results = [ToolMessage("42", tool_call_id=f"call_{at}") for at in (1, 2)]
    await chat.ainvoke([HumanMessage("where?"), answer, *results])
    said = last_generate(box).messages or []
    assert [message.role for message in said] == ["user", "assistant", "tool", "tool"]
    assert said[1].tool_calls[0] == ToolCall(id="call_1", name="LookUp", arguments='{"at": 1}')
    assert said[3] == ChatMessage(role="tool", content="42", tool_call_id="call_2")


async def test_a_structured_answer_is_asked_for(box: Box, http: Any) -> None:
    wanted = chat_of(box, http).with_structured_output(LookUp, method="json_schema")
    with pytest.raises(ValueError, match="LookUp"):  # the scripted worker answers no JSON
        await wanted.ainvoke("where?")
    assert '"word":{' in (last_generate(box).json_schema or "")


async def test_embeddings(box: Box, http: Any) -> None:
    await box.connect("embedder", EMBEDDER)
    embeddings = OpenAIEmbeddings(
        http_async_client=http,
        base_url=f"{box.url}/v1",
        api_key=SecretStr(box.keys[ORGANIZATION]),
        model="embedder",
        check_embedding_ctx_length=False,
    )
    assert await embeddings.aembed_documents(["a", "b c"]) == [[3, 4, 0, 0], [3, 4, 1, 0]]
    assert await embeddings.aembed_query("a") == [3, 4, 0, 0]


async def test_errors_are_the_client_s(box: Box, http: Any) -> None:
    chat = chat_of(box, http)
    with pytest.raises(openai.NotFoundError):
        await chat.ainvoke("a", model="absent")
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        await chat.ainvoke("a", logit_bias={"1": 101})
