"""Whatever a model prefers, what its grammar lets through is what the schema allows; and no schema
takes the process with it."""

import contextlib
import json
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.protocol import Tool
from runtime.text import grammars
from runtime.text.detokenizer import make_detokenizer
from runtime.text.grammars import (
    Grammar,
    GrammarBusyError,
    GrammarCompiler,
    GrammarError,
    GrammarUnavailableError,
    schema_source,
)
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_calls import ToolCallReader
from runtime.text.tool_grammar import check_tools, parameters_of, tools_source
from tests.runtime.text.conftest import BACKENDS
from tests.runtime.text.metaspace import EOS_ID, metaspace
from tests.runtime.text.test_tool_format import FORMATS

EOS = {"byte_level": 1, "sentencepiece": 2, "spaced": EOS_ID}
MAX_TOKENS = 400


@pytest.fixture(scope="module")
def compilers() -> dict[str, tuple[Tokenizer, GrammarCompiler]]:
    made: dict[str, tuple[Tokenizer, GrammarCompiler]] = {}
    for kind, eos in EOS.items():
        spaced = kind == "spaced"
        backend = metaspace("never", has_bytes=True) if spaced else BACKENDS[kind]()
        backend.add_special_tokens(["[TOOL_CALLS]", "<calls>"])
        tokenizer = Tokenizer(backend)
        made[kind] = (tokenizer, GrammarCompiler(tokenizer, [eos]))
    return made


def mask_of(state: grammars.GrammarState, vocab_size: int) -> "np.ndarray[Any, Any]":
    words = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    state.fill_mask(words.ctypes.data, words.nbytes)
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab_size]


def babble(
    tokenizer: Tokenizer,
    grammar: Grammar,
    eos: int,
    seed: int,
    prefer: Callable[[int], float] = lambda token_id: 1.0,
    beginning: str = "",
) -> tuple[list[int], bool]:
    """Random allowed tokens after some that are given, and whether the grammar came to its
    end."""
    choose, state = random.Random(seed), grammar.start()  # noqa: S311
    ids = tokenizer.encode(beginning, is_templated=True) if beginning else []
    state.follow(ids)
    while len(ids) < MAX_TOKENS:
        allowed = np.flatnonzero(mask_of(state, tokenizer.vocab_size)).tolist()
        assert allowed
        assert not state.is_failed
        if eos in allowed and choose.random() < 0.5:
            return ids, True
        ids += choose.choices(allowed, [prefer(each) for each in allowed])
        state.follow(ids)
        if state.is_complete:
            return ids, True
    return ids, False


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """JSON schema as far as these tests use it."""
    if "enum" in schema:
        return value in schema["enum"]
    if "anyOf" in schema:
        return any(is_valid(value, each) for each in schema["anyOf"])
    kind = schema.get("type")
    if kind == "object":
        properties = schema["properties"]
        return (
            isinstance(value, dict)
            and value.keys() <= properties.keys()
            and set(schema["required"]) <= value.keys()
            and all(is_valid(member, properties[key]) for key, member in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
            and all(is_valid(member, schema["items"]) for member in value)
        )
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return value is None if kind == "null" else isinstance(value, bool)


LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-1000, 1000),
        st.integers(0, 10_000),
    ),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 8)),
    st.builds(lambda values: {"enum": values}, st.lists(st.text(max_size=5), min_size=1)),
)
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4)


def object_schema(properties: dict[str, Any], num_required: int) -> dict[str, Any]:
    required = list(properties)[:num_required]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most},
            inner,
            st.integers(0, 3),
        ),
        st.builds(object_schema, st.dictionaries(KEYS, inner, max_size=3), st.integers(0, 3)),
        st.builds(lambda each: {"anyOf": each}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", EOS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 10))
def test_any_answer_is_valid(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]],
    kind: str,
    schema: dict[str, Any],
    seed: int,
) -> None:
    tokenizer, compiler = compilers[kind]
    grammar = compiler.compile(schema_source(json.dumps(schema)))
    ids, is_ended = babble(tokenizer, grammar, EOS[kind], seed)
    if is_ended:
        assert is_valid(json.loads(tokenizer.decode(ids)), schema), tokenizer.decode(ids)


@pytest.mark.parametrize("kind", EOS)
def test_an_empty_schema_is_any_object(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]], kind: str
) -> None:
    tokenizer, compiler = compilers[kind]
    grammar = compiler.compile(schema_source("{}"))
    closing = [id_ for id_ in range(tokenizer.vocab_size) if tokenizer.token_text(id_) in '}]"{']

    def prefers_to_close(token_id: int) -> float:
        return 200.0 if token_id in closing else 1.0

    ended = 0
    for seed in range(10):
        ids, is_ended = babble(tokenizer, grammar, EOS[kind], seed, prefers_to_close)
        ended += is_ended
        assert not is_ended or isinstance(json.loads(tokenizer.decode(ids)), dict)
    assert ended


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_required", [False, True])
@pytest.mark.parametrize("kind", ["byte_level", "spaced"])
def test_tools_are_called_with_valid_arguments(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]],
    name: str,
    is_required: bool,
    kind: str,
) -> None:
    tokenizer, compiler = compilers[kind]
    form, trigger = FORMATS[name]
    schemas = {
        "get": object_schema({"n": {"type": "integer", "minimum": 0, "maximum": 99}}, 1),
        "get_x": object_schema({"x": {"enum": ["a", "}</calls>"]}}, 0),
    }
    tools = [Tool(name=each, parameters=json.dumps(schemas[each])) for each in schemas]
    check_tools(tools)
    source = tools_source(form, tokenizer, tools, is_required=is_required, allows_several=True)
    grammar = compiler.compile(source)
    special_ids = map(tokenizer.special_id, ("[TOOL_CALLS]", "<calls>"))
    shown = tokenizer.showing([each for each in special_ids if each is not None])
    beginning = "" if is_required else trigger or form.first[0]

    num_called = 0
    for seed in range(12):
        ids, is_ended = babble(tokenizer, grammar, EOS[kind], seed, beginning=beginning)
        if not is_ended:
            continue
        reader = ToolCallReader(form, trigger)
        detokenizer = make_detokenizer(shown, [])
        said = detokenizer.add(ids) + detokenizer.flush()
        text, calls = reader.add(said)
        num_called += len(calls)
        assert not is_required or (calls and not text), said
        assert calls or text + reader.flush() == said
        for call in calls:
            assert is_valid(json.loads(call.arguments), schemas[call.name]), said
    assert num_called


def test_one_call_where_one_is_allowed(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]],
) -> None:
    tokenizer, compiler = compilers["byte_level"]
    form, trigger = FORMATS["hermes"]
    tools = [Tool(name="f", parameters='{"properties": {}, "additionalProperties": false}')]
    for allows_several in (False, True):
        source = tools_source(
            form, tokenizer, tools, is_required=True, allows_several=allows_several
        )
        grammar = compiler.compile(source)
        counts = set[int]()
        for seed in range(30):
            ids, _ = babble(tokenizer, grammar, EOS["byte_level"], seed)
            _, calls = ToolCallReader(form, trigger).add(tokenizer.decode(ids))
            counts.add(len(calls))
        assert counts == {1} if not allows_several else len(counts) > 1


def test_text_may_not_go_on_after_what_begins_a_call(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]],
) -> None:
    tokenizer, compiler = compilers["byte_level"]
    tools = [Tool(name="f")]
    for name, said, is_allowed in [
        ("hermes", "hello <tool_cal l>", True),
        ("hermes", "hello <tool_call>x", False),
        ("hermes", 'hello <tool_call>\n{"name": "f"', True),
        ("hermes", 'hello <tool_call>\n{"name": "g"', False),
        ("listed", "hello [TOOL_CALLS]x", False),
        ("listed", 'hello [TOOL_CALLS] [{"name": "f", "arguments": {', True),
        ("bare", 'hello {"', True),
        ("bare", '{"name": "f", "parameters": {"a"', True),
        ("bare", '{"other', False),
    ]:
        source = tools_source(
            FORMATS[name][0], tokenizer, tools, is_required=False, allows_several=True
        )
        state = compiler.compile(source).start()
        ids = tokenizer.encode(said, is_templated=True)
        num_allowed = 0
        while num_allowed < len(ids) and mask_of(state, tokenizer.vocab_size)[ids[num_allowed]]:
            num_allowed += 1
            state.follow(ids[:num_allowed])
        assert (num_allowed == len(ids)) == is_allowed, said


def test_tools_and_a_format_in_one_answer(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]],
) -> None:
    tokenizer, compiler = compilers["byte_level"]
    tools = [Tool(name="f")]
    arguments = {"is_required": False, "allows_several": False, "json_schema": '{"enum": [7]}'}
    source = tools_source(FORMATS["hermes"][0], tokenizer, tools, **arguments)
    state = compiler.compile(source).start()
    allowed = np.flatnonzero(mask_of(state, tokenizer.vocab_size)).tolist()
    assert {tokenizer.decode([each])[0] for each in allowed} == {"7", "<"}
    with pytest.raises(GrammarError, match="cannot choose between"):
        tools_source(FORMATS["bare"][0], tokenizer, tools, **arguments)


def test_following_again_changes_nothing(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]],
) -> None:
    tokenizer, compiler = compilers["byte_level"]
    grammar = compiler.compile(schema_source('{"enum": ["abc"]}'))
    state, other = grammar.start(), grammar.start()
    ids = tokenizer.encode('"abc"', is_templated=True)
    for length in (1, 1, 2, 2, len(ids), len(ids)):
        state.follow(ids[:length])
    assert state.is_complete
    assert not other.is_complete, "choices are independent"
    assert not mask_of(other, tokenizer.vocab_size)[ids[-2]]


def chain(length: int) -> str:
    """References that each lead to the next."""
    members = {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}]} for at in range(length)}
    return json.dumps({"$defs": members | {f"d{length}": {}}, "$ref": "#/$defs/d0"})


def patterns(count: int) -> str:
    each = [{"pattern": f".*[{chr(97 + at)}].{{{10 + at}}}$"} for at in range(count)]
    return json.dumps({"type": "string", "allOf": each})


BAD_SCHEMAS: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "no object": ("[]", "must be a JSON object"),
    "too large": ('{"const": "' + "x" * 70_000 + '"}', "larger than"),
    "too deep": ('{"items": ' * 1_600 + "{}" + "}" * 1_600, "too deeply|not valid JSON"),
    "unknown type": ('{"type": "objec"}', "Invalid type"),
    "unsupported": ('{"not": {}}', "Unimplemented"),
    "impossible": ('{"allOf": [{"type": "string"}, {"type": "null"}]}', "Unsatisfiable"),
    "remote": ('{"$ref": "http://127.0.0.1/schema"}', "does not fetch"),
    "a file": ('{"$ref": "file:///etc/passwd"}', "does not fetch"),
    "bad pattern": ('{"type": "string", "pattern": "("}', "regex parse error"),
    "nested pattern": (json.dumps({"pattern": "(" * 5000 + ")" * 5000}), "regex parse error"),
    "references": (chain(1_200), "too deeply"),
    "many patterns": (patterns(20), "at most 4"),
    "a bomb of patterns": (patterns(4), "Unable to determine"),
    "a large multiple": ('{"type": "integer", "multipleOf": 99999937}', "multipleOf"),
    "multiples": ('{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}', "multipleOf"),
    "many alternatives": (
        json.dumps({"anyOf": [{"pattern": f"^(.*{at}.{{{at}}})+$"} for at in range(400)]}),
        "enforced",
    ),
    "many properties": (
        json.dumps({"type": "object", "properties": {f"p{at}": {} for at in range(3000)}}),
        "enforced",
    ),
}


@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_a_bad_schema_is_refused_with_its_reason(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]], name: str
) -> None:
    text, reason = BAD_SCHEMAS[name]
    _, compiler = compilers["byte_level"]
    with pytest.raises(GrammarError, match=reason) as caught:
        compiler.compile(schema_source(text))
    assert len(str(caught.value)) < 400


BOMBS = [
    '{"type": "string", "pattern": "(a{1,1000}){1,1000}"}',
    '{"type": "string", "pattern": "^[01]*1[01]{60}$"}',
    '{"type": "string", "pattern": "^(.*a.{30}|.*b.{31}|.*c.{37})*$"}',
    '{"type": "string", "pattern": "^((a|b|c|d){50}){50}$"}',
    '{"type": "string", "minLength": 1000000000}',
    '{"type": "array", "items": {"const": "%s"}, "minItems": 1000000}' % ("x" * 500),
    '{"type": "integer", "multipleOf": 1999}',
]


@pytest.mark.parametrize("schema", BOMBS)
def test_what_could_explode_stays_small(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]], schema: str
) -> None:
    """Each of these would take hours as an automaton built at once."""
    tokenizer, compiler = compilers["byte_level"]
    with contextlib.suppress(GrammarError):
        babble(tokenizer, compiler.compile(schema_source(schema)), EOS["byte_level"], 0)


def test_a_long_text_of_a_bounded_length_is_followed_to_its_end(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]],
) -> None:
    tokenizer, compiler = compilers["byte_level"]
    schema = '{"type": "string", "minLength": 4000, "maxLength": 4001}'
    state = compiler.compile(schema_source(schema)).start()
    ids = tokenizer.encode('"' + "aéb€" * 1000, is_templated=True)
    for at in range(0, len(ids), 50):
        state.follow(ids[: at + 50])
        mask_of(state, tokenizer.vocab_size)
        assert not state.is_failed
    quote = tokenizer.encode('"', is_templated=True)
    assert mask_of(state, tokenizer.vocab_size)[quote].all()
    state.follow([*ids, *quote])
    assert state.is_complete


@pytest.mark.parametrize("keyword", ["minLength", "maxLength"])
def test_a_length_that_could_not_be_followed_is_refused(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]], keyword: str
) -> None:
    texts = {f"p{at}": {"type": "string", keyword: 15_000} for at in range(9)}
    compilers["byte_level"][1].compile(schema_source(json.dumps({"properties": texts})))
    texts["q"] = {"type": "string", keyword: 5_000}
    with pytest.raises(GrammarError, match=f"{keyword} is 15000: .* 16000 together"):
        schema_source(json.dumps({"properties": texts}))


def test_only_a_schema_is_too_complex(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, compiler = compilers["byte_level"]
    wrong = compiler.compile(schema_source("{}")).start()
    wrong.follow(tokenizer.encode("x", is_templated=True))
    assert wrong.is_failed
    assert not wrong.is_too_complex
    choices = [{"properties": {"a": {"const": at}}} for at in range(300)]
    large = compiler.compile(schema_source(json.dumps({"items": {"anyOf": choices}}))).start()
    large.follow(tokenizer.encode("[{", is_templated=True))
    assert large.is_failed
    assert large.is_too_complex
    slow = compiler.compile(schema_source("{}")).start()
    mask_of(slow, tokenizer.vocab_size)
    assert not slow.is_too_complex
    monkeypatch.setattr(grammars, "MAX_MASK_SECONDS", 0.0)
    assert slow.is_too_complex


def test_a_compilation_without_end_fails_alone(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, _ = compilers["byte_level"]
    compiler = GrammarCompiler(tokenizer, [1])
    compile_now = grammars._compile

    def compile_slowly(vocabulary: Any, source: str) -> Any:
        time.sleep(3 if "slow" in source else 0)
        return compile_now(vocabulary, source)

    monkeypatch.setattr(grammars, "_compile", compile_slowly)
    compiler.compile(schema_source("{}"))  # loads the vocabulary
    monkeypatch.setattr(grammars, "MAX_COMPILE_SECONDS", 1)
    with pytest.raises(GrammarError, match="takes too long"):
        compiler.compile(schema_source('{"const": "slow"}'))
    compiler.compile(schema_source('{"const": "quick"}'))
    with pytest.raises(GrammarError, match="takes too long"):
        compiler.compile(schema_source('{"const": "slower"}'))
    with pytest.raises(GrammarBusyError, match="try again"):
        compiler.compile(schema_source('{"const": "third"}'))


def test_arguments_that_may_also_be_null_are_an_object() -> None:
    tool = Tool(name="f", parameters='{"type": ["object", "null"], "properties": {"a": {}}}')
    assert parameters_of(tool) == {"type": "object", "properties": {"a": {}}}


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([Tool(name="f"), Tool(name="f")], "same name"),
        ([Tool(name='f" x')], "name must be"),
        ([Tool(name=f"f{at}") for at in range(129)], "at most 128"),
        ([Tool(name="f", description="x" * 300_000)], "characters together"),
        ([Tool(name="f", parameters='{"type": "string"}')], "'f' must have the type"),
        ([Tool(name="f", parameters='{"type": ["null", "array"]}')], "'f' must have the type"),
        ([Tool(name="f", parameters="{")], "parameters of 'f'.*not valid JSON"),
    ],
)
def test_bad_tools_are_refused(tools: list[Tool], reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        check_tools(tools)


@pytest.mark.parametrize(("kind", "character"), [("metaspace", '"'), ("word_piece", " ")])
def test_a_tokenizer_that_cannot_spell_json_is_refused(kind: str, character: str) -> None:
    compiler = GrammarCompiler(Tokenizer(BACKENDS[kind]()), [1])
    for _ in range(2):
        with pytest.raises(GrammarUnavailableError, match=f"structured output.*'{character}'"):
            compiler.compile(schema_source("{}"))


def test_what_only_a_schema_asks_for_is_missed_too(
    compilers: dict[str, tuple[Tokenizer, GrammarCompiler]],
) -> None:
    backend = BACKENDS["byte_level"]()
    vocabulary = json.loads(backend.to_str())
    model = vocabulary["model"]
    model["vocab"] = {piece: at for piece, at in model["vocab"].items() if "z" not in piece}
    model["merges"] = [pair for pair in model["merges"] if "z" not in "".join(pair)]
    compiler = GrammarCompiler(Tokenizer(backend.from_str(json.dumps(vocabulary))), [1], 420)
    compiler.compile(schema_source('{"const": "day", "description": "not crazy"}'))
    for schema in (
        '{"enum": ["lazy"]}',
        '{"properties": {"z": {}}}',
        '{"items": {"const": ["z"]}}',
    ):
        with pytest.raises(GrammarUnavailableError, match="no token for 'z'"):
            compiler.compile(schema_source(schema))
        compilers["byte_level"][1].compile(schema_source(schema))


@pytest.mark.parametrize("vocab_size", [300, 420, 448])
def test_masks_have_the_models_size(vocab_size: int) -> None:
    """Be it padded, or short of tokens that its tokenizer has."""
    tokenizer = Tokenizer(BACKENDS["byte_level"]())
    compiler = GrammarCompiler(tokenizer, [1, 419], vocab_size)
    state = compiler.compile(schema_source('{"type": "string"}')).start()
    mask = mask_of(state, vocab_size)
    assert tokenizer.encode('"', is_templated=True)[0] in np.flatnonzero(mask)
    assert not mask[tokenizer.vocab_size :].any()
    assert not state.is_failed
