"""Random lives of a scheduler, checked step by step against a model of the cache."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.scheduling.scheduler import Scheduler, SequenceTooLongError
from runtime.scheduling.sequence import Sequence

from .conftest import CacheModel, MakeSequence

# Few different tokens and few prefixes, so that prompts overlap often and blocks repeat.
PREFIXES = [[0] * 20, [1] * 20, [0, 1] * 10, [0] * 7 + [1] * 13]
prompts = st.builds(
    lambda prefix, length, tail: PREFIXES[prefix][:length] + tail,
    st.integers(0, len(PREFIXES) - 1),
    st.integers(0, 20),
    st.lists(st.integers(0, 1), min_size=1, max_size=6),
)
additions = st.tuples(
    st.just("add"),
    prompts,
    st.integers(1, 12),
    st.sampled_from([b"", b"salt"]),
    st.sampled_from(["a", "b"]),
)
operations = st.lists(
    st.one_of(
        additions,
        additions,
        st.tuples(st.just("step")),
        st.tuples(st.just("step")),
        st.tuples(st.just("step")),
        st.tuples(st.just("finish"), st.integers(0, 40), st.sampled_from(["abort", "error"])),
    ),
    max_size=60,
)


@settings(
    max_examples=2000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    operations=operations,
    num_blocks=st.integers(3, 24),
    block_size=st.integers(1, 5),
    max_sequences=st.integers(1, 6),
    spare_tokens=st.integers(0, 12),
)
def test_any_schedule_attends_only_to_its_own_prefix_and_ends(
    make_sequence: MakeSequence,
    operations: list[tuple[Any, ...]],
    num_blocks: int,
    block_size: int,
    max_sequences: int,
    spare_tokens: int,
) -> None:
    scheduler = Scheduler(num_blocks, block_size, max_sequences + spare_tokens, max_sequences)
    cache = CacheModel(scheduler)
    sequences: list[Sequence] = []

    def next_token(sequence: Sequence) -> int:
        return sum(sequence.token_ids) % 2

    for operation, *details in operations:
        if operation == "add":
            prompt, max_tokens, salt, flow = details
            sequence = make_sequence(prompt, max_tokens, salt, flow)
            fits = len(prompt) + max_tokens <= num_blocks * block_size
            try:
                scheduler.add(sequence)
            except SequenceTooLongError:
                assert not fits
            else:
                assert fits
                sequences.append(sequence)
        elif operation == "step":
            cache.step(next_token)
        elif sequences:
            at, reason = details
            scheduler.finish(sequences[at % len(sequences)], reason)
            scheduler.check_integrity()

    cache.finish_all(next_token)

    assert not scheduler.has_work
    assert scheduler.num_waiting == scheduler.num_running == scheduler.pool.num_used == 0
    assert len(scheduler.index) == scheduler.pool.num_cached
    for sequence in sequences:
        assert sequence.is_finished
        assert 0 <= sequence.num_cached_tokens < sequence.num_prompt_tokens
        if sequence.finish_reason == "length":
            assert sequence.num_generated_tokens == sequence.max_tokens
            expected = sequence.token_ids[: sequence.num_prompt_tokens]
            while len(expected) < len(sequence.token_ids):
                expected.append(sum(expected) % 2)
            assert sequence.token_ids == expected
