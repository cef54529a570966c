"""The arrays of a step, against the plan spelled out token by token."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.execution.batch import StepBatch
from runtime.protocol import SamplingParams
from runtime.scheduling.plan import ScheduledSequence, StepPlan
from runtime.scheduling.sequence import Sequence


def scheduled(
    num_computed: int, num_tokens: int, num_left: int, blocks: list[int]
) -> ScheduledSequence:
    num_all = num_computed + num_tokens + num_left
    sequence = Sequence(
        sequence_id=0,
        request_id="r",
        token_ids=list(range(1000, 1000 + num_all)),
        num_prompt_tokens=num_all,
        max_tokens=1,
        sampling=SamplingParams(),
        cache_salt=b"",
    )
    sequence.num_computed_tokens = num_computed
    sequence.block_table = blocks
    return ScheduledSequence(sequence, num_tokens, num_left == 0)


def test_a_mixed_step() -> None:
    plan = StepPlan(
        [
            scheduled(num_computed=5, num_tokens=1, num_left=0, blocks=[7, 3]),
            scheduled(num_computed=4, num_tokens=3, num_left=2, blocks=[1, 9, 5]),
            scheduled(num_computed=0, num_tokens=2, num_left=0, blocks=[2]),
        ]
    )
    batch = StepBatch.from_plan(plan, block_size=4)
    assert batch.token_ids.tolist() == [1005, 1004, 1005, 1006, 1000, 1001]
    assert batch.positions.tolist() == [5, 4, 5, 6, 0, 1]
    assert batch.query_start.tolist() == [0, 1, 4, 6]
    assert batch.context_lens.tolist() == [6, 7, 2]
    assert batch.block_tables.tolist() == [[7, 3], [1, 9], [2, 0]]
    assert batch.slots.tolist() == [3 * 4 + 1, 9 * 4, 9 * 4 + 1, 9 * 4 + 2, 2 * 4, 2 * 4 + 1]
    assert batch.sample_indices.tolist() == [0, 5]


@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=6
    ),
    block_size=st.integers(1, 16),
)
def test_any_plan(shapes: list[tuple[int, int, int]], block_size: int) -> None:
    next_block = 0
    items = []
    for num_computed, num_tokens, num_left in shapes:
        num_blocks = -(-(num_computed + num_tokens + num_left) // block_size)
        blocks = list(range(next_block + num_blocks, next_block, -1))
        next_block += num_blocks
        items.append(scheduled(num_computed, num_tokens, num_left, blocks))
    batch = StepBatch.from_plan(StepPlan(items), block_size)
    row = 0
    for at, item in enumerate(items):
        sequence = item.sequence
        assert batch.query_start[at] == row
        for offset in range(item.num_tokens):
            position = sequence.num_computed_tokens + offset
            assert batch.token_ids[row] == sequence.token_ids[position]
            assert batch.positions[row] == position
            block = sequence.block_table[position // block_size]
            assert batch.slots[row] == block * block_size + position % block_size
            row += 1
        assert batch.context_lens[at] == sequence.num_computed_tokens + item.num_tokens
        assert (row - 1 in batch.sample_indices.tolist()) == item.is_sampled
    assert batch.query_start[-1] == row == len(batch.token_ids)
