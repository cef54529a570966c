"""How a template writes calls is found by evaluating it, and what it writes is read back."""

import json
import random

import pytest

from runtime.protocol import ChatMessage, Tool, ToolCall
from runtime.text.chat import ChatTemplate, ChatTemplateError
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_calls import ToolCallReader
from runtime.text.tool_format import PLAIN_FORMAT, ToolFormat, common_prefix
from tests.runtime.text.conftest import CHATML, byte_level
from tests.runtime.text.tool_templates import TEMPLATES

SPECIAL_TEXTS = ["<|im_start|>", "[TOOL_CALLS]", "<calls>"]
TAGGED = ToolFormat(
    first='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    last="}\n</tool_call>",
)
FORMATS = {
    "hermes": (TAGGED, "<tool_call>"),
    "thinking": (TAGGED, "<tool_call>"),
    "bare": (ToolFormat(first='{"name": "', middle='", "parameters": ', last="}"), ""),
    "listed": (
        ToolFormat(
            first='[TOOL_CALLS] [{"name": "',
            middle='", "arguments": ',
            between=', "id": "\0"}, {"name": "',
            last=', "id": "\0"}]',
        ),
        "[TOOL_CALLS]",
    ),
    "fenced": (
        ToolFormat(
            first="<calls><call>function<sep>",
            middle="\n```json\n",
            between="\n```</call>\n<call>function<sep>",
            last="\n```</call></calls>",
        ),
        "<calls>",
    ),
}
WEATHER = Tool(
    name="get_weather",
    description="Tells the weather.",
    parameters='{"type": "object", "properties": {"city": {"type": "string"}}}',
)
ASKED = ChatMessage(role="user", content="How is it?")
CALLS = [
    ToolCall(id="call_aB3dE6gH9", name="get_weather", arguments='{"city": "K\\u00f6ln {\\"}"}'),
    ToolCall(id="a rather long id", name="get_time", arguments='{"in": [1, {"a": {}}]}'),
]


def template_of(name: str) -> ChatTemplate:
    source = {**TEMPLATES, "plain": CHATML}[name]
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found(name: str) -> None:
    support = template_of(name).tool_support
    form, trigger = FORMATS[name]
    assert support.is_native
    assert support.form == form
    assert support.form.trigger(SPECIAL_TEXTS) == trigger
    assert support.is_argument_text == (name == "fenced")


def test_a_template_that_ignores_tools_gets_an_instruction() -> None:
    template = template_of("plain")
    assert not template.tool_support.is_native
    assert template.tool_support.form == PLAIN_FORMAT
    text = template.render([ChatMessage(role="system", content="Be brief."), ASKED], [WEATHER])
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou may call functions.")
    assert '{"name": "get_weather", "description": "Tells the weather.", "parameters"' in text
    assert text.endswith("<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\n")


def test_the_instruction_goes_to_the_user_where_there_is_no_system() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    text = ChatTemplate(source, {}).render([ASKED], [WEATHER])
    assert text.startswith("[user]You may call functions.")
    assert text.endswith("\n\nHow is it?")


@pytest.mark.parametrize("name", [*FORMATS, "plain"])
def test_calls_and_results_are_told_to_the_model(name: str) -> None:
    template = template_of(name)
    calls = CALLS[:1] if name == "bare" else CALLS
    messages = [
        ASKED,
        ChatMessage(role="assistant", content="", tool_calls=calls),
        *(
            ChatMessage(role="tool", content=f"result {at}", tool_call_id=call.id)
            for at, call in enumerate(calls)
        ),
    ]
    text = template.render(messages, [WEATHER])
    for at, call in enumerate(calls):
        assert call.name in text
        assert f"result {at}" in text
        assert json.dumps(json.loads(call.arguments), ensure_ascii=False) in text or (
            name == "plain" and call.arguments in text
        )
    if name == "listed":  # the same nine letters in the call and in its result
        assert text.count("aB3dE6gH9") == 2


def written(form: ToolFormat, calls: list[ToolCall]) -> str:
    between = (form.between or "").replace("\0", "aB3dE6gH9")
    parts = [f"{call.name}{form.middle}{call.arguments}" for call in calls]
    return form.first + between.join(parts) + form.last.replace("\0", "aB3dE6gH9")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(8))
def test_what_is_written_is_read_however_it_is_cut(name: str, seed: int) -> None:
    form, trigger = FORMATS[name]
    calls = CALLS[:1] if form.between is None else CALLS
    said = "" if name == "bare" else "Let me <tool see [TOOL.\n"
    text = said + written(form, calls)
    choose = random.Random(seed)  # noqa: S311
    reader = ToolCallReader(form, trigger)
    texts, read = "", []
    at = 0
    while at < len(text):
        size = choose.choice([1, 2, 7, 40])
        more, found = reader.add(text[at : at + size])
        texts, read, at = texts + more, read + found, at + size
    assert texts + reader.flush() == said
    assert [(call.name, call.arguments) for call in read] == [
        (call.name, call.arguments) for call in calls
    ]
    assert len({call.id for call in read}) == len(read)
    assert all(len(call.id) == 14 and call.id.startswith("call_") for call in read)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text", ["", "plain", "<tool_call> is a tag", "[1, 2]", '{"name": 1}', "<tool", "a\n{b}"]
)
def test_text_that_calls_nothing_comes_out_whole(name: str, text: str) -> None:
    form, trigger = FORMATS[name]
    reader = ToolCallReader(form, trigger)
    out = "".join(reader.add(character)[0] for character in text) + reader.flush()
    assert out == text
    assert reader.num_calls == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_calls", [1, 2])
def test_a_call_that_is_cut_off_is_text_in_the_end(name: str, num_calls: int) -> None:
    form, trigger = FORMATS[name]
    if form.between is None and num_calls == 2:
        return
    whole = written(form, CALLS[:num_calls])
    closed = 0  # where what closes the call before ends: what follows is of the last call
    if num_calls == 2:
        between, last = (
            piece.replace("\0", "aB3dE6gH9") for piece in (form.between or "", form.last)
        )
        closed = whole.index(between) + len(common_prefix(between, last))
    end = whole.rindex(CALLS[num_calls - 1].arguments) + len(CALLS[num_calls - 1].arguments)
    for length in range(closed, end + 1):
        reader = ToolCallReader(form, trigger)
        outputs = [reader.add(character) for character in whole[:length]]
        held = reader.flush()
        calls = [call.arguments for _, found in outputs for call in found]
        is_complete = length == end
        assert calls == [each.arguments for each in CALLS[: num_calls - 1 + is_complete]]
        assert "".join(text for text, _ in outputs) == ""
        unfinished = "" if is_complete else whole[closed:length]
        assert held == (unfinished if unfinished.strip() or num_calls == 1 else "")
        assert reader.flush() == "", "nothing is said twice"


@pytest.mark.parametrize("name", FORMATS)
def test_what_closes_calls_is_no_text_though_cut_off(name: str) -> None:
    form, trigger = FORMATS[name]
    whole = written(form, CALLS[:1])
    for length in range(whole.rindex(CALLS[0].arguments) + len(CALLS[0].arguments), len(whole) + 1):
        reader = ToolCallReader(form, trigger)
        text, calls = reader.add(whole[:length])
        assert (text, len(calls), reader.flush()) == ("", 1, "")


def test_arguments_that_are_no_json_are_refused() -> None:
    call = ToolCall(id="x", name="f", arguments="{nonsense")
    messages = [ASKED, ChatMessage(role="assistant", content="", tool_calls=[call])]
    with pytest.raises(ChatTemplateError, match="arguments of a call of 'f' are not valid JSON"):
        template_of("hermes").render(messages)
    surrogate = ToolCall(id="x", name="f", arguments='{"a": "\\ud800"}')
    messages = [ASKED, ChatMessage(role="assistant", content="", tool_calls=[surrogate])]
    with pytest.raises(ChatTemplateError, match="lone surrogate"):
        template_of("hermes").render(messages)


def test_a_tokenizer_can_show_some_of_its_special_tokens() -> None:
    backend = byte_level()
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("a<|im_start|>b<|im_end|>c", is_templated=True)
    shown_id = tokenizer.special_id("<|im_start|>")
    assert shown_id is not None
    shown = tokenizer.showing([shown_id])
    assert b"".join(map(shown.token_bytes, ids)) == b"a<|im_start|>bc"
    assert b"".join(map(tokenizer.token_bytes, ids)) == b"abc"
    assert tokenizer.special_id("a") is None
