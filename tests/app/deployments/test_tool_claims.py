"""What a worker counts for tools stays within what the gateway believes, whatever the template."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.deployments.claims import max_prompt_tokens
from runtime.protocol import (
    ChatMessage,
    DecoderInfo,
    Generate,
    SamplingParams,
    Tool,
    ToolCall,
)
from runtime.text.chat import ChatTemplate, ChatTemplateError
from runtime.text.template_allowance import measure_template_allowance
from tests.runtime.engine_bench import TOKENIZER
from tests.runtime.text.conftest import CHATML
from tests.runtime.text.tool_templates import TEMPLATES

SOURCES = {**TEMPLATES, "plain": CHATML}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
VALUES = st.recursive(
    st.one_of(TEXTS, st.integers(-99, 99), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)


@cache
def served(name: str) -> tuple[ChatTemplate, DecoderInfo]:
    template = ChatTemplate(SOURCES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    allowance = measure_template_allowance(template, TOKENIZER)
    return template, DecoderInfo(
        architecture="",
        vocab_size=TOKENIZER.vocab_size,
        max_context_tokens=10**6,
        num_layers=1,
        kv_bytes_per_token=1,
        dtype="float32",
        has_tokenizer=True,
        has_chat_template=True,
        template_tokens=allowance.per_request,
        template_tokens_per_message=allowance.per_message,
        template_tokens_per_tool_use=allowance.per_tool_use,
        template_tool_factor=allowance.tool_factor,
    )


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tools=st.lists(st.tuples(NAMES, TEXTS, OBJECTS), max_size=4),
    arguments=st.lists(OBJECTS, max_size=2),
    is_compact=st.booleans(),
)
def test_the_bound_holds(
    name: str,
    tools: list[tuple[str, str, dict[str, Any]]],
    arguments: list[dict[str, Any]],
    is_compact: bool,
) -> None:
    template, info = served(name)
    separators = (",", ":") if is_compact else None
    offered = [
        Tool(
            name=tool,
            description=description,
            parameters=json.dumps(schema, ensure_ascii=False, separators=separators),
        )
        for tool, description, schema in tools
    ]
    calls = [
        ToolCall(
            id=f"call_number{at:03}",
            name="f",
            arguments=json.dumps(each, ensure_ascii=False, separators=separators),
        )
        for at, each in enumerate(arguments)
    ]
    messages = [ChatMessage(role="user", content="Hä?")]
    if calls:
        messages.append(ChatMessage(role="assistant", content="", tool_calls=calls))
        messages += [ChatMessage(role="tool", content="ok", tool_call_id=call.id) for call in calls]
    try:
        text = template.render(messages, offered)
    except ChatTemplateError:
        return  # a format with one call at most
    request = Generate(
        request_id="r", sampling=SamplingParams(), cache_salt=b"", messages=messages, tools=offered
    )
    num_tokens = len(TOKENIZER.encode(text, is_templated=True))  # one per byte
    assert num_tokens <= max_prompt_tokens(request, info)
    assert info.template_tool_factor <= 4, "a bound is no use if it bounds nothing"
    assert info.template_tokens_per_tool_use <= 1_000
