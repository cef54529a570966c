"""What the index may and may not find, and which block goes first when room is needed."""

from random import Random

import pytest

from runtime.scheduling.blocks import BlockPool
from runtime.scheduling.branches import Branches, num_common_tokens
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


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ([], [], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2, 259], 2),  # they differ in the second byte of the third
        ([7], [8], 0),
        ([70000, 5], [70000 + 2**24, 5], 0),
    ],
)
def test_tokens_in_common(one: list[int], other: list[int], common: int) -> None:
    assert num_common_tokens(token_bytes(one), token_bytes(other)) == common


def test_the_longest_run_is_found_among_any() -> None:
    random = Random(3)  # noqa: S311 - not a secret
    branches = Branches()
    runs: list[tuple[bytes, list[int], int]] = []
    for value in range(3000):
        parent = random.choice([b"a", b"b", b"c"])
        run = [random.choice([0, 1, 256, 70000]) for _ in range(random.randint(1, 6))]
        known = [each for key, each, _ in runs if key == parent]
        best = branches.longest(parent, token_bytes(run))
        lengths = [num_common_tokens(token_bytes(run), token_bytes(each)) for each in known]
        assert (best.num_tokens if best else 0) == max(lengths, default=0)
        if best is not None:
            found = next(each for _, each, value in runs if value == best.value)
            assert found[: best.num_tokens] == run[: best.num_tokens]
        runs.append((parent, run, value))
        branches.add(parent, token_bytes(run), value)
        if len(runs) > 20:
            parent, run, value = runs.pop(random.randrange(20))
            branches.remove(parent, token_bytes(run), value)
    assert len(branches) == len(runs) == 20


def test_no_block_is_kept_of_which_another_holds_as_much() -> None:
    index = PrefixIndex(block_size=4)
    root = b"root"
    assert index.publish_part(root, token_bytes([1, 2]), 1) is None
    assert index.publish_part(root, token_bytes([1, 2]), 2) == 2, "the first one stays"
    assert index.publish_part(root, token_bytes([1]), 3) == 3
    assert index.publish_part(root, token_bytes([1, 2, 3]), 4) == 1
    assert index.publish_part(root, token_bytes([1, 9]), 5) is None
    key = BlockKey(root, b"digest", token_bytes([1, 2, 3, 4]))
    assert index.publish(key, 4) is None, "it filled up"
    assert [block in index for block in range(6)] == [False, False, False, False, True, True]
    assert index.publish_part(root, token_bytes([1, 2, 3]), 6) == 6
    assert index.find(key) == 4


def test_what_an_index_finds_is_the_longest_there_is(make_sequence: MakeSequence) -> None:
    """Against a plain list of what was published, with evictions at random."""
    random = Random(4)  # noqa: S311 - not a secret
    index = PrefixIndex(block_size=3)
    held: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # block -> salt, all tokens to its end

    def best_tokens(salt: bytes, tokens: tuple[int, ...]) -> int:
        """Full blocks as far as they go, then the most of any one more."""
        at = 0
        while (salt, tokens[: at + 3]) in held.values() and at + 3 <= len(tokens):
            at += 3
        best = at
        for other_salt, others in held.values():
            if other_salt == salt and others[:at] == tokens[:at] and at < len(others) <= at + 3:
                common = at
                while common < min(len(others), len(tokens)) and others[common] == tokens[common]:
                    common += 1
                best = max(best, common)
        return best

    num_hits = 0
    for _ in range(1500):
        salt = random.choice([b"", b"other"])
        sequence = make_sequence([random.randint(0, 1) for _ in range(random.randint(1, 14))])
        sequence.cache_salt = salt
        index.extend_keys(sequence)
        match = index.match(sequence)
        num_found = 3 * len(match.blocks) + match.num_copied_tokens
        tokens = tuple(sequence.token_ids)
        assert num_found == best_tokens(salt, tokens[:-1])
        ends = [3 * (at + 1) for at in range(len(match.blocks))]
        assert [held[block] for block in match.blocks] == [(salt, tokens[:end]) for end in ends]
        if match.source is not None:
            num_hits += 1
            assert held[match.source][1][:num_found] == tokens[:num_found]
        at = random.randint(0, len(tokens) // 3)
        block = random.randrange(30)
        held.pop(block, None)
        index.forget(block)
        tail = tokens[3 * at :][: random.randint(1, 2)]
        if at < len(sequence.block_keys) and random.random() < 0.7:
            loser = index.publish(sequence.block_keys[at], block)
            held[block] = (salt, tokens[: 3 * at + 3])
        elif tail:
            loser = index.publish_part(index.parent(sequence, at), token_bytes(list(tail)), block)
            held[block] = (salt, tokens[: 3 * at + len(tail)])
        else:
            continue
        if loser is not None:
            del held[loser]
        assert {block for block in range(30) if block in index} == held.keys()
    assert num_hits > 300
