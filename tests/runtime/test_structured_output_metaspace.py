"""Grammars over tokenizers whose spaces come from Metaspace: what is delivered is what the grammar
let through."""

import json
from typing import Any

import pytest
import torch

from runtime.engine import RequestError
from runtime.execution.batch import StepBatch
from runtime.protocol import ChatMessage, SequenceOutput, Tool
from runtime.text.tokenizer import Tokenizer
from tests.runtime.engine_bench import Bench, FakeRunner, pseudo_random_token
from tests.runtime.text.metaspace import EOS_ID, IRREGULAR, SCHEMES, metaspace

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "a kind": {"enum": ["one  two", " é"]},
            "count": {"type": "integer", "minimum": -9, "maximum": 99},
        },
        "required": ["name", "a kind", "count"],
        "additionalProperties": False,
    }
)
ASKED = [ChatMessage(role="user", content="日 how is it")]
TOOLS = [Tool(name="place", parameters=SCHEMA), Tool(name="stop", parameters="")]
KINDS = [(scheme, has_bytes) for scheme in SCHEMES for has_bytes in (True, False)]
MADE = {(scheme, has): Tokenizer(metaspace(scheme, has_bytes=has)) for scheme, has in KINDS}


class Babbler(FakeRunner):
    """Random logits, a function of the prefix, over more ids than the tokenizer has. Brackets are
    made likely, so that answers end."""

    def __init__(self, tokenizer: Tokenizer, num_blocks: int) -> None:
        super().__init__(num_blocks, 4, pseudo_random_token)
        self._vocab_size = tokenizer.vocab_size + 3
        self._ends = tokenizer.encode('"}', is_templated=True)

    def run(self, batch: StepBatch) -> torch.Tensor:
        self.slots[batch.slots] = batch.token_ids
        rows = [torch.zeros(0, self._vocab_size)]
        for token_row in batch.sample_indices.tolist():
            row = int(torch.searchsorted(batch.query_start, token_row, right=True)) - 1
            generator = torch.Generator().manual_seed(sum(self.prefix(batch, row)))
            logits = torch.randn(1, self._vocab_size, generator=generator) * 2
            logits[0, self._ends] += 3
            rows.append(logits)
        return torch.cat(rows)


def bench_of(tokenizer: Tokenizer) -> Bench:
    bench = Bench(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size + 3,
        eos_token_ids=[EOS_ID],
        num_blocks=1_500,
        max_batch_tokens=512,
        max_context_tokens=5_000,
    )
    bench.runner = bench.engine._runner = Babbler(tokenizer, 1_500)
    return bench


def check_value(value: Any) -> None:
    assert value.keys() == {"name", "a kind", "count"}
    assert len(value["name"]) <= 12
    assert value["a kind"] in ("one  two", " é")
    assert -9 <= value["count"] <= 99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_valid_json(kind: tuple[str, bool], temperature: float) -> None:
    bench = bench_of(MADE[kind])
    for seed in range(4):
        prompt = {"text": f"{seed} say"} if seed % 2 else {"messages": ASKED}
        limits = {"temperature": temperature, "seed": seed, "max_tokens": 600}
        bench.add(f"r{seed}", json_schema=SCHEMA, **prompt, **limits)
    bench.finish()
    for seed in range(4):
        assert bench.finish_reason(f"r{seed}") == "stop"
        check_value(json.loads(bench.text(f"r{seed}")))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_streamed_is_what_was_let_through(kind: tuple[str, bool]) -> None:
    """To the character, spaces at either end of a token included."""
    wanted = " é  one two\\n 日  "
    bench = bench_of(MADE[kind])
    bench.add(messages=ASKED, json_schema=json.dumps({"const": wanted}), max_tokens=100)
    bench.finish()
    assert json.loads(bench.text()) == wanted
    assert bench.text() == json.dumps(wanted, ensure_ascii=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["required", "function:place"])
def test_calls_are_read(kind: tuple[str, bool], choice: str) -> None:
    bench = bench_of(MADE[kind])
    fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 3_000}
    bench.add(messages=ASKED, allows_several_calls=False, **fields)
    bench.finish()
    assert (bench.text(), bench.finish_reason()) == ("", "tool_calls")
    outputs: list[SequenceOutput] = bench.outputs["r", 0]
    (call,) = [call for output in outputs for call in output.tool_calls]
    if call.name == "place":
        check_value(json.loads(call.arguments))
    else:
        assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_is_cut_off_is_delivered_as_it_was_written(kind: tuple[str, bool]) -> None:
    bench = bench_of(MADE[kind])
    bench.add(messages=ASKED, tools=TOOLS, tool_choice="function:place", max_tokens=45)
    bench.finish()
    assert bench.finish_reason() == "length"
    start = '<tool_call>\n{"name": "place", "arguments": {"name": "'
    assert bench.text().startswith(start[:30])
    assert len(bench.text()) >= 30


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"json_schema": SCHEMA}, "response_format"),
        ({"messages": ASKED, "tools": TOOLS}, "tools"),
    ],
)
def test_other_decoders_are_refused(kind: str, fields: dict[str, Any], param: str) -> None:
    bench = bench_of(Tokenizer(IRREGULAR[kind]()))
    with pytest.raises(RequestError, match="does not allow structured output") as caught:
        bench.prepare(**fields)
    assert (caught.value.error.status, caught.value.error.param) == (400, param)
