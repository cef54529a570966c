"""What the index may and may not find, and which block goes first when room is needed."""

from runtime.scheduling.blocks import BlockPool
from runtime.scheduling.prefix import PrefixIndex, token_bytes
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.sequence import BlockKey

from .conftest import CacheModel, MakeSequence


def test_equal_digests_of_unequal_tokens_are_not_a_hit() -> None:
    index = PrefixIndex(block_size=2)
    key, other = (BlockKey(b"parent", b"digest", token_bytes(ids)) for ids in ([1, 2], [3, 4]))
    assert index.publish(key, 1) is None
    assert index.find(key) == 1
    assert index.find(other) is None
    assert index.publish(other, 2) == 2
    index.forget(1)
    assert index.find(key) is None


def test_keys_name_the_whole_prefix_and_the_salt(make_sequence: MakeSequence) -> None:
    index = PrefixIndex(block_size=2)
    sequences = [
        make_sequence([1, 2, 3, 4, 5]),
        make_sequence([9, 2, 3, 4]),
        make_sequence([1, 2, 3, 4], salt=b"other"),
    ]
    for sequence in sequences:
        index.extend_keys(sequence)
        assert len(sequence.block_keys) == 2
    assert len({sequence.block_keys[1].digest for sequence in sequences}) == 3
    assert len({sequence.block_keys[1].tokens for sequence in sequences}) == 1


def test_keys_grow_with_the_sequence(make_sequence: MakeSequence) -> None:
    index = PrefixIndex(block_size=2)
    growing, whole = make_sequence([1, 2, 3]), make_sequence([1, 2, 3, 4, 5, 6])
    index.extend_keys(growing)
    growing.token_ids += [4, 5, 6]
    index.extend_keys(growing)
    index.extend_keys(whole)
    assert growing.block_keys == whole.block_keys


def test_the_end_of_a_chain_is_evicted_before_its_beginning(make_sequence: MakeSequence) -> None:
    scheduler = Scheduler(num_blocks=5, block_size=2, max_batch_tokens=32, max_sequences=2)
    cache = CacheModel(scheduler)
    scheduler.add(make_sequence(list(range(9)), max_tokens=1))
    cache.finish_all()
    assert scheduler.pool.num_cached == 5
    scheduler.add(make_sequence([50, 51, 52, 53], max_tokens=1))
    cache.finish_all()
    again = make_sequence(list(range(9)), max_tokens=1)
    scheduler.add(again)
    cache.finish_all()
    assert again.num_cached_tokens == 6


def test_free_blocks_are_used_before_anything_is_evicted() -> None:
    evicted: list[int] = []
    pool = BlockPool(3, on_evict=evicted.append)
    block = pool.allocate()
    pool.publish(block)
    pool.release([block])
    others = [pool.allocate(), pool.allocate()]
    assert (pool.num_free, pool.num_cached, pool.num_used, evicted) == (0, 1, 2, [])
    assert pool.allocate() == block
    assert evicted == [block]
    pool.release([block, *others])
    pool.check_integrity({}, {})
