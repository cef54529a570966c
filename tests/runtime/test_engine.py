"""The engine over a tiny deterministic model: what comes out, what fails, what is refused."""

import random
from typing import Any

import pytest
import torch

from runtime.engine import RequestError
from runtime.execution.batch import StepBatch
from runtime.protocol import ChatMessage
from runtime.text.chat import ChatTemplate
from runtime.worker import ContentFreeFormatter
from tests.runtime.engine_bench import (
    EOS,
    TOKENIZER,
    VOCAB_SIZE,
    Bench,
    continuation,
    says,
)

# --- what comes out ---------------------------------------------------------------------


def test_text_streams_until_the_end_of_sequence() -> None:
    bench = Bench(says("Grüße, 世界 😀"))
    assert bench.ask() == ("Grüße, 世界 😀", "stop")
    assert bench.token_ids()[-1] == EOS
    assert len(bench.token_ids()) == len("Grüße, 世界 😀".encode()) + 1
    assert not any("\ufffd" in output.text for output in bench.outputs["r", 0])


def test_ignore_eos_runs_on_and_max_tokens_ends() -> None:
    bench = Bench(lambda prefix: EOS)
    assert bench.ask(ignore_eos=True, max_tokens=7) == ("", "length")
    assert bench.token_ids() == [EOS] * 7


def test_a_stop_string_is_not_delivered_but_its_tokens_count() -> None:
    bench = Bench(says("one two three four"))
    assert bench.ask(stop=["zzz", " three"]) == ("one two", "stop")
    assert len(bench.token_ids()) == len("one two three")
    strings = [output.stop_string for output in bench.outputs["r", 0]]
    assert strings == [None] * (len(strings) - 1) + [" three"]


def test_a_stop_string_at_the_length_limit_is_a_stop() -> None:
    assert Bench(says("abcdef")).ask(stop=["cd"], max_tokens=4) == ("ab", "stop")


def test_text_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    assert Bench(says("abcX")).ask(stop=["abcY"], max_tokens=3) == ("abc", "length")


def test_stop_token_ids() -> None:
    bench = Bench(says("one, two"))
    comma = TOKENIZER.encode(",")[0]
    assert bench.ask(stop_token_ids=[comma]) == ("one", "stop")
    assert bench.token_ids()[-1] == comma  # it counts


def test_an_end_of_sequence_that_is_not_special_adds_no_text() -> None:
    dot = TOKENIZER.encode(".")[0]
    bench = Bench(says("one. two"), eos_token_ids=[dot])
    assert bench.ask() == ("one", "stop")
    assert bench.token_ids()[-1] == dot
    bench = Bench(says("one. two"), eos_token_ids=[dot])
    assert bench.ask(ignore_eos=True, max_tokens=4) == ("one.", "length")  # as text, where it is


def test_a_character_cut_off_by_the_length_limit_shows_as_one() -> None:
    assert Bench(says("a😀")).ask(max_tokens=3) == ("a\ufffd", "length")


def test_echo_puts_the_prompt_before_the_text_and_not_into_the_ids() -> None:
    bench = Bench(says("!"))
    assert bench.ask(text="hé>", echo=True) == ("hé>!", "stop")
    assert bench.token_ids() == [TOKENIZER.encode("!")[0], EOS]
    assert Bench(says("!")).ask(token_ids=TOKENIZER.encode("hé>"), echo=True)[0] == "hé>!"


def test_chat_is_rendered_with_the_template() -> None:
    bench = Bench()
    prepared = bench.prepare(messages=[ChatMessage(role="user", content="Hi")])
    assert TOKENIZER.decode(prepared.token_ids) == "user: Hi\nassistant:"


def test_logprobs_come_with_text() -> None:
    bench = Bench(says("hi"))
    bench.ask(logprobs=2)
    first = bench.outputs["r", 0][0].logprobs
    assert first is not None
    assert (first[0].text, len(first[0].top)) == ("h", 2)
    assert first[0].top[0][:2] == (first[0].token_id, "h")
    assert first[0].logprob == pytest.approx(0, abs=1e-5)
    bench = Bench(says("hi"))
    bench.ask()
    assert bench.outputs["r", 0][0].logprobs is None


def test_without_a_tokenizer_ids_go_in_and_out() -> None:
    bench = Bench(tokenizer=None)
    assert bench.ask(token_ids=[5, 6, 7], max_tokens=9) == ("", "length")
    assert bench.token_ids() == continuation([5, 6, 7], 9)


# --- batching, caching, preemption ------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [200, 24])
@pytest.mark.parametrize("max_batch_tokens", [8, 64])
def test_every_request_gets_the_answer_it_would_get_alone(
    num_blocks: int, max_batch_tokens: int
) -> None:
    """Mixed lengths, shared prefixes, arrivals over time; with few blocks also preemption."""
    bench = Bench(num_blocks=num_blocks, max_batch_tokens=max_batch_tokens)
    generator = random.Random(5)  # noqa: S311 - not a secret
    prompts: dict[str, tuple[list[int], int]] = {}
    for number in range(40):
        shared = [9, 8, 7, 6, 5, 4, 3, 2] * generator.randint(0, 3)
        prompt = shared + [generator.randrange(2, 200) for _ in range(generator.randint(1, 12))]
        prompts[str(number)] = (prompt, generator.randint(1, 30))
        bench.add(str(number), token_ids=prompt, max_tokens=prompts[str(number)][1])
        for _ in range(generator.randint(0, 4)):
            bench.step()
    bench.finish()
    for request_id, (prompt, max_tokens) in prompts.items():
        assert bench.token_ids(request_id) == continuation(prompt, max_tokens)
        assert bench.finish_reason(request_id) == "length"
    stats = bench.engine.stats()
    assert stats.output_tokens == sum(max_tokens for _, max_tokens in prompts.values())
    assert stats.prompt_tokens == sum(len(prompt) for prompt, _ in prompts.values())
    assert 0 < stats.cached_tokens < stats.prompt_tokens
    assert (stats.requests, stats.num_running, stats.num_waiting) == (40, 0, 0)
    assert stats.free_blocks + stats.cached_blocks == num_blocks


def test_choices_share_the_prompt() -> None:
    bench = Bench(max_batch_tokens=512)
    prompt = [7] * 101
    bench.add(token_ids=prompt, num_choices=5, temperature=1.5, seed=3, max_tokens=4)
    bench.finish()
    cached = [bench.outputs["r", choice][-1].num_cached_tokens for choice in range(5)]
    assert cached == [0] + [100] * 4
    assert bench.runner.num_tokens == 101 + 4 * 1 + 5 * 3
    assert bench.engine.stats().prompt_tokens == 101
    assert all(bench.finish_reason("r", choice) == "length" for choice in range(5))


def test_seeded_choices_differ_from_each_other_but_not_from_run_to_run() -> None:
    def flat(seed: int, neighbours: int) -> list[list[int]]:
        bench = Bench()
        for number in range(neighbours):
            bench.add(f"n{number}", token_ids=[number + 2] * 9, temperature=1.0, max_tokens=30)
        sampling = {"temperature": 2.0, "min_p": 0.0, "top_p": 1.0, "logit_bias": {}}
        # The model is sure of its token; a bias against it makes all others equally likely.
        sampling["logit_bias"] = dict.fromkeys(range(2, 40), -20.0) | {50: 30.0, 51: 30.0}
        bench.add(token_ids=[7, 8], num_choices=3, seed=seed, max_tokens=20, **sampling)
        bench.finish()
        return [bench.token_ids("r", choice) for choice in range(3)]

    first = flat(seed=1, neighbours=0)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert flat(seed=1, neighbours=5) == first
    assert flat(seed=2, neighbours=0) != first


def test_the_cache_serves_a_second_turn() -> None:
    bench = Bench()
    bench.add("first", token_ids=[5, 6, 7], max_tokens=10)
    bench.finish()
    turn = [5, 6, 7, *bench.token_ids("first"), 9]
    bench.add("second", token_ids=turn, max_tokens=5)
    bench.add("other", token_ids=turn, max_tokens=5, cache_salt=b"other tenant")
    bench.finish()
    assert bench.outputs["second", 0][0].num_cached_tokens == 12
    assert bench.outputs["other", 0][0].num_cached_tokens == 0
    assert bench.token_ids("second") == bench.token_ids("other") == continuation(turn, 5)


# --- ends of all kinds ------------------------------------------------------------------


def test_abort_answers_once_for_each_choice_and_leaves_neighbours_alone() -> None:
    bench = Bench(max_sequences=3)
    bench.add("gone", token_ids=[5, 6], num_choices=4, max_tokens=40, temperature=1.0)
    bench.add("kept", token_ids=[7, 8], max_tokens=12)
    for _ in range(3):
        bench.step()
    bench.engine.abort("gone")
    bench.engine.abort("gone")
    bench.engine.abort("never existed")
    bench.engine.check_integrity()
    assert bench.engine.has_work
    bench.finish()
    assert [bench.finish_reason("gone", choice) for choice in range(4)] == ["abort"] * 4
    assert bench.token_ids("kept") == continuation([7, 8], 12)
    assert bench.engine.stats().used_blocks == 0


def test_abort_delivers_the_text_that_was_held_back() -> None:
    bench = Bench(says("abcX"))
    bench.add(stop=["abcY"])
    for _ in range(3):
        bench.step()
    assert bench.text() == ""
    bench.engine.abort("r")
    bench.finish()
    assert (bench.text(), bench.finish_reason()) == ("abc", "abort")


@pytest.mark.parametrize("kind", ["is_broken", "is_poisoned"])
def test_a_sequence_that_fails_fails_alone(kind: str) -> None:
    bench = Bench()
    setattr(bench.runner, kind, lambda prefix: prefix[0] == 99 and len(prefix) > 6)
    bench.add("bad", token_ids=[99, 3, 4, 5], max_tokens=20)
    for name in ("one", "two"):
        bench.add(name, token_ids=[ord(name[0]), 3, 4], max_tokens=20)
    bench.finish()
    assert bench.finish_reason("bad") == "error"
    assert bench.token_ids("bad") == continuation([99, 3, 4, 5], 3)
    for name in ("one", "two"):
        assert bench.token_ids(name) == continuation([ord(name[0]), 3, 4], 20)
    # What the failed one computed is not served to the next.
    bench.add("again", token_ids=[99, 3, 4, 5, 6, 7], max_tokens=1)
    bench.finish()
    assert bench.outputs["again", 0][0].num_cached_tokens == 0


def test_what_a_model_says_as_it_fails_stays_out_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(prefix: list[int]) -> bool:
        raise ValueError(f"cannot bear {prefix}")

    bench = Bench()
    bench.runner.is_broken = fail
    bench.add(token_ids=[5, 6])
    bench.finish()
    formatter = ContentFreeFormatter()
    for record in caplog.records:
        record.exc_text = None  # what another formatter made of it
    log = "\n".join(map(formatter.format, caplog.records))
    assert "the model failed: ValueError" in log
    assert "in fail" in log  # where it failed
    assert "[5, 6]" not in log


def test_a_lost_device_is_everyones_failure() -> None:
    bench = Bench()
    bench.add(token_ids=[5, 6])

    def lost(batch: StepBatch) -> torch.Tensor:
        raise torch.AcceleratorError("device lost")

    bench.runner.run = lost
    with pytest.raises(torch.AcceleratorError):
        bench.step()


def test_device_time_is_shared_by_tokens_and_adds_up() -> None:
    bench = Bench(max_batch_tokens=8)
    bench.add("long", token_ids=[5] * 60, max_tokens=5)
    bench.add("short", token_ids=[6, 7], max_tokens=20)
    bench.finish()
    shares = [output.device_ns for outputs in bench.outputs.values() for output in outputs]
    stats = bench.engine.stats()
    assert 0 <= stats.device_ns - sum(shares) <= 2 * stats.runs, "all but the rounding is shared"


def test_ten_thousand_steps_cost_what_ten_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the tokens that pass through a step's hands, not time."""
    bench = Bench(lambda prefix: 70, num_blocks=400, block_size=32, max_context_tokens=10_001)
    monkeypatch.setattr(bench.runner, "prefix", lambda batch, row: [])
    num_bytes: list[int] = []
    monkeypatch.setattr(
        bench.engine._deliverer._tokenizer,
        "token_bytes",
        lambda id_, original=TOKENIZER.token_bytes: num_bytes.append(id_) or original(id_),
    )
    bench.engine.add(bench.prepare(max_tokens=10_000))
    num_steps = 0
    while bench.engine.has_work:
        bench.engine.step()
        num_steps += 1
    assert num_steps == 10_000
    assert bench.runner.num_tokens == 10_000
    assert len(num_bytes) == 10_001


# --- refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 513]}, "stop"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {3: 101.0}}, "logit_bias"),
        ({"num_choices": 0}, "n"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"text": ""}, "prompt"),
        ({"token_ids": []}, "prompt"),
        ({"token_ids": [3, VOCAB_SIZE]}, "prompt"),
        ({"token_ids": [-1]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"text": "a", "token_ids": [3]}, "prompt"),
        ({"token_ids": [3] * 200}, "prompt"),
        ({"text": "x" * 10**7}, "prompt"),
    ],
)
def test_bad_requests_are_refused_with_the_field_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        Bench().prepare(**fields)
    error = refused.value.error
    assert (error.param, error.status, error.type) == (param, 400, "invalid_request_error")


@pytest.mark.parametrize("fields", [{"text": "x"}, {"token_ids": [3], "stop": ["x"]}])
def test_text_needs_a_tokenizer(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        Bench(tokenizer=None).prepare(**fields)


def test_max_tokens_is_bounded_by_context_and_cache() -> None:
    assert Bench().prepare(token_ids=[3] * 150, max_tokens=99).max_tokens == 50
    assert Bench(num_blocks=10).prepare(token_ids=[3] * 30, max_tokens=99).max_tokens == 10
    with pytest.raises(RequestError, match="it may have 39") as refused:
        Bench(num_blocks=10).prepare(token_ids=[3] * 40)
    assert refused.value.error.code == "context_length_exceeded"


def test_an_id_in_use_is_refused() -> None:
    bench = Bench()
    prepared = bench.add("same")
    with pytest.raises(RequestError, match="is running"):
        bench.engine.add(prepared)
    bench.finish()
    bench.add("same")
    bench.finish()


def test_a_template_that_refuses_names_the_messages() -> None:
    bench = Bench()
    bench.engine._preparation._chat_template = ChatTemplate(
        "{{ raise_exception('no system role') }}", {}
    )
    with pytest.raises(RequestError, match="no system role") as refused:
        bench.prepare(messages=[ChatMessage(role="system", content="x")])
    assert refused.value.error.param == "messages"


def test_a_tokenizer_that_fails_ends_its_own_sequence_only() -> None:
    class Broken:
        is_stopped, stop_string = False, None

        def add(self, token_ids: list[int]) -> str:
            raise ValueError("no such token")

    bench = Bench()
    bench.add("a", max_tokens=5)
    bench.add("b", max_tokens=5)
    bench.step()
    bench.engine._requests["a"][0].stream = Broken()  # type: ignore[assignment]
    bench.finish()
    assert bench.finish_reason("a") == "error"
    assert (bench.finish_reason("b"), len(bench.token_ids("b"))) == ("length", 5)


def test_choices_share_the_hashes_of_their_prompt() -> None:
    bench = Bench()
    bench.add(token_ids=list(range(2, 42)), num_choices=3, max_tokens=1)
    keys = [delivery.sequence.block_keys for delivery in bench.engine._requests["r"]]
    assert len(keys[0]) == 10
    assert all(a is b for other in keys[1:] for a, b in zip(keys[0], other, strict=True))
    assert keys[0] is not keys[1]
