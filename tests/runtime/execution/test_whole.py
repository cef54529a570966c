"""Whole sequences, grouped by length, against each one alone; and the engine on top."""

import pytest
import torch

from runtime.engine import DecoderEngine
from runtime.execution.batch import StepBatch
from runtime.execution.whole import WholeRunner
from runtime.protocol import DecoderInfo, Generate, SamplingParams, SequenceOutput
from runtime.scheduling.plan import ScheduledSequence, StepPlan
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.validation import RequestError
from runtime.scheduling.whole import WholeScheduler

VOCAB_SIZE = 50


class Recurrent:
    """A tiny model with a state, which no block could hold."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.embedding = torch.randn(VOCAB_SIZE, 8, generator=generator)
        self.mixing = torch.randn(8, 8, generator=generator) / 3
        self.shapes: list[tuple[int, ...]] = []
        self.fails_on: int | None = None

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(token_ids.shape))
        if self.fails_on is not None and (token_ids == self.fails_on).any():
            raise ValueError("no such token")
        state = torch.zeros(len(token_ids), 8)
        for column in token_ids.T:
            state = torch.tanh(state @ self.mixing + self.embedding[column])
        return (state @ self.embedding.T).double()


def make_batch(prompts: list[list[int]]) -> StepBatch:
    items = []
    for number, prompt in enumerate(prompts):
        sequence = Sequence(
            sequence_id=number,
            request_id=str(number),
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            max_tokens=1,
            sampling=SamplingParams(),
            cache_salt=b"",
        )
        items.append(ScheduledSequence(sequence, len(prompt), True))
    return StepBatch.from_plan(StepPlan(items), block_size=0)


def test_equal_lengths_run_together_and_every_row_is_its_own() -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7], [8, 9], [10, 11, 12], [13]]
    model = Recurrent()
    logits = WholeRunner(model, max_rows=2).run(make_batch(prompts))
    assert sorted(model.shapes) == [(1, 2), (1, 3), (2, 1), (2, 3)]
    assert logits.dtype == torch.float32
    for row, prompt in enumerate(prompts):
        alone = model.logits(torch.tensor([prompt]))[0].float()
        torch.testing.assert_close(logits[row], alone)


def make_engine(
    model: Recurrent, max_batch_tokens: int = 64, num_embedded_ids: int = 0
) -> DecoderEngine:
    info = DecoderInfo(
        architecture="recurrent",
        vocab_size=VOCAB_SIZE,
        max_context_tokens=40,
        num_layers=1,
        kv_bytes_per_token=0,
        dtype="float32",
        has_tokenizer=False,
        has_chat_template=False,
        num_embedded_ids=num_embedded_ids,
    )
    scheduler = WholeScheduler(max_batch_tokens, 8, max_sequence_tokens=40)
    return DecoderEngine(WholeRunner(model), scheduler, None, info=info)


def run(engine: DecoderEngine, prompts: dict[str, list[int]]) -> dict[str, list[SequenceOutput]]:
    for name, prompt in prompts.items():
        sampling = SamplingParams(max_tokens=6, temperature=0.0)
        request = Generate(request_id=name, sampling=sampling, cache_salt=b"", token_ids=prompt)
        engine.add(engine.prepare(request))
    outputs: dict[str, list[SequenceOutput]] = {name: [] for name in prompts}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return outputs


def greedy(prompt: list[int], num_tokens: int) -> list[int]:
    tokens, model = list(prompt), Recurrent()
    for _ in range(num_tokens):
        tokens.append(int(model.logits(torch.tensor([tokens])).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("max_batch_tokens", [5, 64])
def test_an_engine_without_a_cache_answers_as_the_model_alone(max_batch_tokens: int) -> None:
    prompts = {"a": [1, 2, 3], "b": [1, 2, 3, 4], "c": [7, 7, 7], "long": [9] * 30}
    engine = make_engine(Recurrent(), max_batch_tokens)
    for name, outputs in run(engine, prompts).items():
        assert [id_ for each in outputs for id_ in each.token_ids] == greedy(prompts[name], 6)
        assert outputs[-1].finish_reason == "length"
        assert all(output.num_cached_tokens == 0 for output in outputs)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (40, 0, 24)
    assert (stats.free_blocks, stats.cached_blocks, stats.used_blocks) == (0, 0, 0)
    assert stats.device_ns > 0


def test_ids_without_an_embedding_are_refused_and_never_generated() -> None:
    num_ids = VOCAB_SIZE - 5

    class Padded(Recurrent):
        """Prefers what it cannot take in."""

        def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
            assert token_ids.max() < num_ids
            logits = super().logits(token_ids)
            logits[:, num_ids:] = 1000.0
            return logits

    engine = make_engine(Padded(), num_embedded_ids=num_ids)
    ids = [id_ for each in run(engine, {"a": [1, 2, 3]})["a"] for id_ in each.token_ids]
    assert len(ids) == 6
    requests = {
        "prompt": ([1, num_ids], SamplingParams()),
        "stop_token_ids": ([1], SamplingParams(stop_token_ids=[num_ids])),
        "logit_bias": ([1], SamplingParams(logit_bias={num_ids: 1.0})),
    }
    for param, (token_ids, sampling) in requests.items():
        request = Generate(request_id=param, sampling=sampling, cache_salt=b"", token_ids=token_ids)
        with pytest.raises(RequestError, match=f"outside 0 to {num_ids - 1}") as caught:
            engine.prepare(request)
        assert caught.value.error.param == param


def test_one_on_which_such_a_model_fails_fails_alone() -> None:
    model = Recurrent()
    model.fails_on = 13
    outputs = run(make_engine(model), {"bad": [13, 2, 3], "good": [1, 2, 3]})
    assert [output.finish_reason for output in outputs["bad"]] == ["error"]
    good = [id_ for each in outputs["good"] for id_ in each.token_ids]
    assert good == greedy([1, 2, 3], 6)
