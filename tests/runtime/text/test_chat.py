"""Chat templates render as in transformers, and no template can hang or fill the process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from runtime.protocol import ChatMessage
from runtime.text import template_environment
from runtime.text.chat import ChatTemplate, ChatTemplateError
from runtime.text.template_allowance import measure_template_allowance
from runtime.text.tokenizer import Tokenizer

from .conftest import CHATML

CHAT = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="  Hi <b>&\n\n"),
    ChatMessage(role="assistant", content="Hello 😀"),
    ChatMessage(role="user", content="Why?", name="Ada"),
]
LLAMA_2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {%- set content = system + message['content'] if loop.first else message['content'] %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ content ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}
"""
MANY_FEATURES = """
{% macro show(message, depth=0) %}
    {{ message | tojson }}{{ '-' * 3 }}{{ message.role.upper() }}
{% endmacro %}
{% set ns = namespace(count=0, seen='') %}
{%- for message in messages if message.role != 'system' recursive %}
    {% if loop.last %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% set ns.seen = ns.seen ~ message['role'][:1] %}
    {% generation %}{{ show(message) }}{% endgeneration %}
{% endfor %}
{% set block %}{{ ns.count }}/{{ ns.seen }}{% endset %}
{{ block }} {{ dict(a=1) | tojson(indent=2) }} {{ range(3) | list }} {{ 2 ** 10 }}
{% for i in range(10) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{ tools is none }} {{ documents is none }} {{ undefined_thing is defined }} {{ unk_token }}
{{ messages[-1].name }} {{ messages[0].name is defined }}
"""


@pytest.mark.parametrize("source", [CHATML, LLAMA_2, MANY_FEATURES])
@pytest.mark.parametrize("num_messages", [1, 2, 4])
def test_renders_as_transformers(
    save_tokenizer: Callable[..., Path], source: str, num_messages: int
) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": source, **tokens}
    directory = save_tokenizer(tokenizer_config=config)
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.load(directory, tokenizer)
    assert template is not None
    messages = CHAT[-num_messages:]
    dicts = [{"role": each.role, "content": each.content} for each in messages]
    if messages[-1].name:
        dicts[-1]["name"] = messages[-1].name
    theirs = AutoTokenizer.from_pretrained(directory)
    try:
        expected = theirs.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # noqa: BLE001 - whatever it raises, ours must refuse as well
        with pytest.raises(ChatTemplateError, match=str(error)[:20]):
            template.render(messages)
    else:
        text = template.render(messages)
        assert text == expected
        ids = theirs.apply_chat_template(dicts, add_generation_prompt=True)["input_ids"]
        assert tokenizer.encode(text, is_templated=True) == ids


def test_a_template_file_comes_before_the_configuration(
    save_tokenizer: Callable[..., Path],
) -> None:
    named = ["odd", {"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    directory = save_tokenizer(tokenizer_config={"chat_template": named})
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.load(directory, tokenizer)
    assert template is not None
    assert template.render(CHAT) == "D"
    (directory / "chat_template.jinja").write_text("file")
    template = ChatTemplate.load(directory, tokenizer)
    assert template is not None
    assert template.render(CHAT) == "file"
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ChatTemplateError, match="not UTF-8"):
        ChatTemplate.load(directory, tokenizer)


def test_a_processors_template_file_counts(save_tokenizer: Callable[..., Path]) -> None:
    directory = save_tokenizer()
    (directory / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    template = ChatTemplate.load(directory, Tokenizer.load(directory))
    assert template is not None
    assert template.render(CHAT) == "of a processor"


def test_no_template_is_none(save_tokenizer: Callable[..., Path]) -> None:
    directory = save_tokenizer()
    assert ChatTemplate.load(directory, Tokenizer.load(directory)) is None


NESTED_LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
EXPONENTIAL_CALLS = (
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}"
)
DOUBLING = "{% set n = namespace(x='x', i=2) %}{% for i in range(99) %}BODY{% endfor %}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NESTED_LOOPS, "ran for longer"),
        (EXPONENTIAL_CALLS, "ran for longer"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "larger"),
        ("{{ 'x' * 10 ** 9 }}", "larger"),
        ("{{ [0] * 10 ** 9 }}", "larger"),
        ("{{ 10 ** (10 ** 10) }}", "larger"),
        (DOUBLING.replace("BODY", "{% set n.x = n.x ~ n.x %}"), "larger"),
        (DOUBLING.replace("BODY", "{% set n.x = n.x + n.x %}"), "larger"),
        (DOUBLING.replace("BODY", "{% set n.i = n.i * n.i %}"), "larger"),
        (
            DOUBLING.replace("BODY", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
            "larger",
        ),
        ("{{ ('a' * 1000000)|wordwrap(1) }}", "larger"),
        ("{{ ('a ' * 500000)|urlize }}", "larger"),
        ("{{ 'a'|center(10 ** 9) }}", "larger"),
        ("{{ ('\n' * 1000000)|indent(width=65) }}", "indents by more"),
        ("{{ [[1]]|tojson(indent=10 ** 6) }}", "indents by more"),
        ("{{ 'abc'|list|slice(10 ** 9)|list }}", "larger"),
        ("{{ [1]|batch(10 ** 9, 0)|list }}", "larger"),
        ("{{ '%999999999d' % 1 }}", "larger"),
        ("{{ '%.999999999f'|format(1.5) }}", "larger"),
        ("{{ '%99999999999999999999d' % 1 }}", "larger"),
        ("{{ '%*d' % (10 ** 9, 1) }}", "must be a number"),
        ("{{ ('%(a)s' * 100000) % {'a': 'x' * 1000000} }}", "larger"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ namespace(__x=1) }}", "cannot store"),
        ("{{ messages.missing.name }}", "has no attribute"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% include '/etc/passwd' %}", "loader"),
    ],
)
def test_a_bad_template_fails_typed_and_soon(
    monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    monkeypatch.setattr(template_environment, "MAX_CPU_SECONDS", 0.2)
    template = ChatTemplate(source, {})
    with pytest.raises(ChatTemplateError, match=reason):
        template.render(CHAT)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ '%s: %5.1f 100%%' % ('a', 1.25) }}", "a:   1.2 100%"),
        ("{{ '%(a)s-%(a)3d'|format(a=5) }}", "5-  5"),
        ("{{ '<%s>'|format('a') }}", "<a>"),
        ("{{ 7 % 4 }}", "3"),
        ("{{ 'a\nb'|indent(2, first=true) }}", "  a\n  b"),
        ("{{ 'ab'|center(6) }}", "  ab  "),
        ("{{ 'a b c'|wordwrap(1) }}", "a\nb\nc"),
        ("{{ [1, 2, 3]|batch(2)|list }}", "[[1, 2], [3]]"),
        ("{{ [1, 2]|slice(2)|list }}", "[[1], [2]]"),
        ("{{ 'no link'|urlize }}", "no link"),
        ("{{ [1]|tojson(indent=1) }}", "[\n 1\n]"),
    ],
)
def test_bounded_filters_do_what_jinjas_own_do(source: str, expected: str) -> None:
    assert ChatTemplate(source, {}).render(CHAT) == expected


def test_a_template_that_does_not_parse_is_refused() -> None:
    nested = "{% for i in [1] %}" * 25 + "{% endfor %}" * 25  # more than Python's own limit
    for source in ("{% for %}", nested):
        with pytest.raises(ChatTemplateError, match="does not compile"):
            ChatTemplate(source, {})


def test_what_a_template_says_can_leave_the_process() -> None:
    template = ChatTemplate(r"{{ raise_exception('\ud800') }}", {})
    with pytest.raises(ChatTemplateError, match="ud800") as caught:
        template.render(CHAT)
    str(caught.value).encode()


def test_threads_have_clocks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_environment, "MAX_CPU_SECONDS", 0.2)
    template = ChatTemplate(
        "{% if messages[0].content == 'hang' %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        {},
    )

    def render(content: str) -> str:
        try:
            return template.render([ChatMessage(role="user", content=content)])
        except ChatTemplateError:
            return "failed"

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(render, ["hang", "a", "hang", "b"])) == [
            "failed",
            "a",
            "failed",
            "b",
        ]


@pytest.mark.parametrize("source", [CHATML, LLAMA_2, "You are a helpful assistant, " * 20 + CHATML])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=st.lists(st.text(max_size=30), min_size=1, max_size=12))
def test_the_allowance_bounds_every_chat(
    all_tokenizers: dict[str, Tokenizer], source: str, contents: list[str]
) -> None:
    tokenizer = all_tokenizers["byte_level"]
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    allowance = measure_template_allowance(template, tokenizer)
    roles = ["user", "assistant"] * 6
    messages = [
        ChatMessage(role=role, content=content)
        for role, content in zip(roles, contents, strict=False)
    ]
    num_tokens = len(tokenizer.encode(template.render(messages), is_templated=True))
    num_bytes = sum(len(content.encode()) for content in contents)
    bound = num_bytes + allowance.per_request + len(messages) * allowance.per_message
    assert num_tokens <= bound
    assert allowance.per_message < 40, "a bound is no use if it bounds nothing"


def test_a_template_that_refuses_everything_has_no_allowance(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    template = ChatTemplate("{{ raise_exception('no') }}", {})
    with pytest.raises(ChatTemplateError, match="refuses every chat"):
        measure_template_allowance(template, all_tokenizers["byte_level"])
