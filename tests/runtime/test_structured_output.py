"""The engine under grammars: JSON and calls from models that would rather say anything else."""

import json
import threading
from typing import Any

import msgspec
import pytest
import torch

from runtime.engine import RequestError
from runtime.execution.batch import StepBatch
from runtime.protocol import ChatMessage, SequenceOutput, Tool, ToolCall
from runtime.text import grammars
from tests.runtime.engine_bench import (
    EOS,
    TOKENIZER,
    VOCAB_SIZE,
    Bench,
    FakeRunner,
    continuation,
    pseudo_random_token,
)

ASKED = [ChatMessage(role="user", content="how is it")]
POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -99, "maximum": 99},
        "name": {"type": "string", "maxLength": 3},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["x", "name", "kind"],
    "additionalProperties": False,
}
SCHEMA = json.dumps(POINT)
TOOLS = [Tool(name="place", parameters=SCHEMA), Tool(name="stop", parameters="")]


def check_point(point: Any) -> None:
    assert point.keys() == {"x", "name", "kind"}
    assert type(point["x"]) is int
    assert -99 <= point["x"] <= 99
    assert len(point["name"]) <= 3
    assert point["kind"] in ("a", "b")


class Scatter(FakeRunner):
    """Random logits, a function of the prefix, over more ids than the tokenizer has. What is said
    of a brace is made likely, so that answers end."""

    padding = 7

    def run(self, batch: StepBatch) -> torch.Tensor:
        super().run(batch)
        rows = [torch.zeros(0, VOCAB_SIZE + self.padding)]
        for token_row in batch.sample_indices.tolist():
            row = int(torch.searchsorted(batch.query_start, token_row, right=True)) - 1
            seed = pseudo_random_token(self.prefix(batch, row))
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn(VOCAB_SIZE + self.padding, generator=generator) * 2
            logits[VOCAB_SIZE:] += 50
            logits[TOKENIZER.encode('"}', is_templated=True)] += 3
            rows.append(logits.unsqueeze(0))
        return torch.cat(rows)


@pytest.fixture
def scatter() -> Bench:
    """A bench whose model says random things."""
    bench = Bench(max_context_tokens=2_000, num_blocks=600, max_batch_tokens=512)
    runner = Scatter(600, 4, pseudo_random_token)
    bench.runner = bench.engine._runner = runner
    return bench


def calls_of(outputs: list[SequenceOutput]) -> list[ToolCall]:
    return [call for output in outputs for call in output.tool_calls]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rules", [{}, {"top_p": 0.5, "top_k": 3, "repetition_penalty": 1.1}])
def test_any_model_answers_with_valid_json(
    scatter: Bench, temperature: float, rules: dict[str, float]
) -> None:
    for seed in range(6):
        scatter.add(
            f"r{seed}",
            text=f"{seed}>",
            json_schema=SCHEMA,
            temperature=temperature,
            seed=seed,
            max_tokens=400,
            **rules,
        )
    scatter.finish()
    for seed in range(6):
        assert scatter.finish_reason(f"r{seed}") == "stop"
        check_point(json.loads(scatter.text(f"r{seed}")))


def test_choices_have_grammars_of_their_own(scatter: Bench) -> None:
    scatter.add(json_schema=SCHEMA, num_choices=4, temperature=1.0, seed=3, max_tokens=400)
    scatter.finish()
    texts = [scatter.text("r", choice) for choice in range(4)]
    for text in texts:
        check_point(json.loads(text))
    assert len(set(texts)) > 1


def test_neighbours_say_what_they_said_without() -> None:
    alone = Bench()
    alone.add("plain", text="hello>", temperature=1.0, seed=1, logprobs=2)
    alone.finish()
    beside = Bench()
    beside.add("json", text="a>", json_schema=SCHEMA, max_tokens=60)
    beside.add("plain", text="hello>", temperature=1.0, seed=1, logprobs=2)
    beside.finish()
    assert beside.token_ids("plain") == alone.token_ids("plain")
    logprobs = [each.logprobs for each in alone.outputs["plain", 0]]
    assert [each.logprobs for each in beside.outputs["plain", 0]] == logprobs


def test_an_answer_ends_with_its_grammar(scatter: Bench) -> None:
    """Without a token that says so, and whether or not such tokens are ignored."""
    for ignore_eos in (False, True):
        scatter.add(json_schema='{"enum": ["abc"]}', ignore_eos=ignore_eos, max_tokens=50)
        scatter.finish()
        assert scatter.text() == '"abc"'
        assert len(scatter.token_ids()) == 5
        assert scatter.finish_reason() == "stop"
        scatter.outputs.clear()


def test_the_end_of_sequence_waits_for_the_grammar() -> None:
    bench = Bench(lambda prefix: EOS)
    assert bench.ask(json_schema='{"const": 12}') == ("12", "stop")
    assert EOS not in bench.token_ids()


def test_the_last_token_of_the_limit_may_be_the_grammars_last() -> None:
    bench = Bench()
    assert bench.ask(json_schema='{"const": "ab"}', max_tokens=4) == ('"ab"', "stop")
    bench.outputs.clear()
    assert bench.ask(json_schema='{"const": "ab"}', max_tokens=3) == ('"ab', "length")


def test_stop_strings_still_stop() -> None:
    assert Bench().ask(json_schema='{"const": "abcdef"}', stop=["cd"]) == ('"ab', "stop")


def test_logprobs_are_of_what_may_be_said() -> None:
    bench = Bench()
    bench.add(json_schema='{"const": "ab"}', logprobs=2)
    bench.finish()
    for output in bench.outputs["r", 0]:
        assert output.logprobs is not None
        assert output.logprobs[0].logprob == pytest.approx(0.0)


def test_a_failed_step_that_runs_again_does_not_follow_twice() -> None:
    bench = Bench()
    bench.runner.is_broken = lambda prefix: len(prefix) == 6 and prefix[0] == 100
    bench.add("broken", token_ids=[100, 100, 100], max_tokens=20)
    bench.add("json", text=">>>", json_schema=SCHEMA, max_tokens=100)
    bench.finish()
    assert bench.finish_reason("broken") == "error"
    assert bench.finish_reason("json") == "stop"
    check_point(json.loads(bench.text("json")))


def test_preempted_answers_are_valid() -> None:
    """A cache too small for all: some give their blocks up and come back."""
    bench = Bench(num_blocks=24, max_sequences=4)
    for at in range(4):
        bench.add(f"r{at}", text=f"{at}>", json_schema=SCHEMA, max_tokens=70)
    bench.finish()
    assert bench.engine.stats().preemptions > 0
    for at in range(4):
        assert bench.finish_reason(f"r{at}") == "stop"
        check_point(json.loads(bench.text(f"r{at}")))


# --- tools ------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", "function:place"])
def test_a_required_call_is_made(scatter: Bench, choice: str) -> None:
    scatter.add(messages=ASKED, tools=TOOLS, tool_choice=choice, max_tokens=1000, seed=2)
    scatter.finish()
    outputs = scatter.outputs["r", 0]
    assert scatter.finish_reason() == "tool_calls"
    assert scatter.text() == ""
    calls = calls_of(outputs)
    assert calls
    for call in calls:
        assert call.name == "place" or choice == "required"
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        if call.name == "place":
            check_point(arguments)
    assert choice == "required" or len(calls) == 1


def reciting(said: str, tools: list[Tool]) -> Bench:
    """A model that recites `said` behind the prompt of `ASKED` with these tools."""
    bench = Bench(max_context_tokens=2_000, num_blocks=600)
    script = [*TOKENIZER.encode(said), EOS]
    length = len(bench.prepare(messages=ASKED, tools=tools).token_ids)
    bench.runner.next_token = lambda tokens: script[len(tokens) - length]
    return bench


def test_text_then_a_call_as_the_model_likes() -> None:
    said = 'Let me see.\n<tool_call>\n{"name": "stop", "arguments": {"a": 1}}\n</tool_call>'
    bench = reciting(said, TOOLS)
    answer = bench.ask(messages=ASKED, tools=TOOLS, max_tokens=100)
    assert answer == ("Let me see.\n", "tool_calls")
    (call,) = calls_of(bench.outputs["r", 0])
    assert (call.name, call.arguments) == ("stop", '{"a": 1}')


def test_a_call_that_the_limit_cuts_off_is_text() -> None:
    said = 'So.\n<tool_call>\n{"name": "stop", "arguments": {"a": 1}}\n</tool_call>'
    bench = reciting(said, TOOLS)
    assert bench.ask(messages=ASKED, tools=TOOLS, max_tokens=40) == (said[:40], "length")
    outputs = bench.outputs["r", 0]
    assert calls_of(outputs) == []
    assert "".join(output.text for output in outputs[:-1]) == "So.\n"
    assert outputs[-1].text == said[4:40]


def test_of_two_calls_the_one_that_is_cut_off_is_text() -> None:
    call = '<tool_call>\n{"name": "stop", "arguments": {"a": 1}}\n</tool_call>'
    bench = reciting(f"{call}\n{call}", TOOLS)
    answer = bench.ask(messages=ASKED, tools=TOOLS, max_tokens=len(call) + 20)
    assert answer == (f"\n{call}"[:20], "length")
    assert len(calls_of(bench.outputs["r", 0])) == 1


def test_a_model_that_calls_nothing_just_answers() -> None:
    bench = reciting("No <tool> here", TOOLS)
    assert bench.ask(messages=ASKED, tools=TOOLS) == ("No <tool> here", "stop")
    assert calls_of(bench.outputs["r", 0]) == []


def test_tools_that_may_not_be_called_are_not_told() -> None:
    bench = Bench()
    untold = bench.prepare(messages=ASKED, tools=TOOLS, tool_choice="none")
    assert untold.token_ids == bench.prepare(messages=ASKED).token_ids
    assert untold.constraint is None


def test_a_count_makes_no_grammar_and_knows_no_context() -> None:
    bench = Bench(max_context_tokens=2_000, num_blocks=600)
    asked: dict[str, Any] = {"messages": ASKED, "tools": TOOLS}
    long = [ChatMessage(role="user", content="how is it" * 1000)]
    for json_schema in (None, SCHEMA):
        counted = bench.prepare(**asked, json_schema=json_schema, is_count=True)
        assert bench.engine.to_compile(counted.generate) is None
        assert (counted.constraint, counted.max_tokens) == (None, 0)
        assert counted.token_ids == bench.prepare(**asked).token_ids
    with pytest.raises(RequestError, match="may have"):
        bench.prepare(messages=long)
    assert bench.prepare(messages=long, is_count=True).num_prompt_tokens > 2_000


def test_masks_are_made_while_the_model_runs(
    scatter: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that waits for its step's mask ends."""
    run, fill_mask = scatter.runner.run, grammars.GrammarState.fill_mask
    is_made, num_runs = threading.Event(), 0

    def fill(state: grammars.GrammarState, address: int, num_bytes: int) -> None:
        fill_mask(state, address, num_bytes)
        is_made.set()

    def run_until_made(batch: StepBatch) -> torch.Tensor:
        nonlocal num_runs
        assert num_runs == 0 or is_made.wait(10)  # the first logits tell how wide a mask is
        num_runs += 1
        is_made.clear()
        return run(batch)

    monkeypatch.setattr(grammars.GrammarState, "fill_mask", fill)
    monkeypatch.setattr(scatter.runner, "run", run_until_made)
    scatter.add(json_schema=SCHEMA, max_tokens=400)
    for _ in range(5):
        scatter.step()
    assert scatter.text().startswith("{")
    assert num_runs == 5


def test_a_schema_that_goes_too_far_ends_its_own_answer_alone(scatter: Bench) -> None:
    choices = [{"properties": {"a": {"const": at}}} for at in range(300)]
    schema = {
        "type": "object",
        "properties": {"t": {"enum": ["some text"]}, "z": {"type": "object", "anyOf": choices}},
        "required": ["t", "z"],
        "additionalProperties": False,
    }
    scatter.add("far", json_schema=json.dumps(schema), max_tokens=400)
    scatter.add("near", json_schema=SCHEMA, max_tokens=400)
    scatter.finish()
    assert scatter.finish_reason("far") == "refused"
    assert "some text" in scatter.text("far")
    assert scatter.finish_reason("near") == "stop"


# --- refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"json_schema": '{"type": "objec"}'}, "response_format"),
        ({"json_schema": "nonsense"}, "response_format"),
        ({"messages": ASKED, "tools": [Tool(name="f", parameters='{"not": {}}')]}, "tools"),
        ({"messages": ASKED, "tools": [Tool(name="a b")]}, "tools"),
        ({"messages": ASKED, "tools": TOOLS, "tool_choice": "function:g"}, "tool_choice"),
        ({"messages": ASKED, "tool_choice": "required"}, "tool_choice"),
        ({"messages": ASKED, "tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"text": ">", "tools": TOOLS}, "tools"),
    ],
)
def test_a_bad_request_fails_alone(fields: dict[str, Any], param: str) -> None:
    bench = Bench(max_context_tokens=2_000, num_blocks=600)
    bench.add("good", text="abc>", max_tokens=8)
    bench.step()
    with pytest.raises(RequestError) as caught:
        bench.prepare("bad", **fields)
    assert caught.value.error.param == param
    assert caught.value.error.status == 400
    bench.finish()
    assert bench.token_ids("good") == continuation(TOKENIZER.encode("abc>"), 8)


def test_a_schema_is_compiled_once_and_a_refused_one_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench, compiled = Bench(), list[str]()
    compile_now = grammars._compile

    def count(vocabulary: Any, source: str) -> Any:
        compiled.append(source)
        return compile_now(vocabulary, source)

    monkeypatch.setattr(grammars, "_compile", count)
    for _ in range(3):
        bench.prepare(json_schema=SCHEMA)
        with pytest.raises(RequestError, match="cannot be enforced"):
            bench.prepare(json_schema='{"type": "string", "pattern": "("}')
    assert len(compiled) == 2
    bench.prepare(json_schema=SCHEMA, fairness_key="another")
    assert len(compiled) == 3
    wanted = bench.prepare(json_schema=SCHEMA).generate
    assert bench.engine.to_compile(wanted) is None
    other = msgspec.structs.replace(wanted, json_schema="{}")
    assert bench.engine.to_compile(other) is not None
    assert bench.engine.to_compile(bench.prepare().generate) is None


def test_without_a_tokenizer_there_is_no_format() -> None:
    bench = Bench(tokenizer=None)
    with pytest.raises(RequestError, match="no tokenizer") as caught:
        bench.prepare(token_ids=[5], json_schema="{}")
    assert caught.value.error.param == "response_format"
