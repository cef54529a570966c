"""The pool lays out what it says, and costs what is used."""

import resource
from pathlib import Path

import torch

from runtime.cache.pool import KvPool, KvShape, num_blocks_within

SHAPES = [KvShape(2, 8), KvShape(1, 16), KvShape(4, 4)]


def make_pool(num_blocks: int = 5) -> KvPool:
    pool = KvPool(SHAPES, num_blocks=num_blocks, block_size=4, dtype=torch.float32)
    pool.storage.copy_(torch.arange(pool.storage.numel()).view_as(pool.storage))
    return pool


def test_views_cover_each_block_once_with_layers_in_order() -> None:
    pool = make_pool()
    for block in range(pool.num_blocks):
        parts = [
            view[block].flatten()
            for layer in range(len(SHAPES))
            for view in (pool.keys(layer), pool.values(layer))
        ]
        assert torch.equal(torch.cat(parts), pool.storage[block])


def test_equal_layers_have_the_documented_layout() -> None:
    pool = KvPool([KvShape(2, 8)] * 3, num_blocks=5, block_size=4, dtype=torch.float32)
    pool.storage.copy_(torch.arange(pool.storage.numel()).view_as(pool.storage))
    whole = pool.storage.view(5, 3, 2, 2, 4, 8)  # blocks, layers, k/v, heads, block_size, head_dim
    for layer in range(3):
        assert torch.equal(pool.keys(layer), whole[:, layer, 0])
        assert torch.equal(pool.values(layer), whole[:, layer, 1])


def test_copy_reads_all_sources_before_it_writes() -> None:
    pool = make_pool()
    before = pool.storage.clone()
    pool.copy_blocks([(0, 1), (1, 0), (2, 4)])
    assert torch.equal(pool.storage, before[[1, 0, 2, 3, 2]])
    pool.copy_blocks([])
    assert torch.equal(pool.storage, before[[1, 0, 2, 3, 2]])


def test_poison_fills_only_the_named_blocks() -> None:
    pool = make_pool()
    pool.poison([1, 3])
    assert pool.storage.isnan().all(dim=1).tolist() == [False, True, False, True, False]
    assert pool.storage.isnan().any(dim=1).tolist() == [False, True, False, True, False]


def test_sizes_in_bytes() -> None:
    pool = make_pool()
    assert pool.bytes_per_block == 2 * (2 * 8 + 16 + 4 * 4) * 4 * 4
    assert num_blocks_within(3 * pool.bytes_per_block + 1, SHAPES, 4, torch.float32) == 3
    assert num_blocks_within(pool.bytes_per_block - 1, SHAPES, 4, torch.float32) == 0


def test_a_pool_takes_memory_only_as_it_is_used() -> None:
    def resident_bytes() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    before = resident_bytes()
    shape = KvShape(num_kv_heads=8, head_dim=64)
    pool = KvPool([shape] * 4, num_blocks=2048, block_size=32, dtype=torch.bfloat16)
    assert pool.storage.nbytes == 512 * 1024**2
    assert resident_bytes() - before < 64 * 1024**2
    assert pool.keys(3)[2047].count_nonzero() == 0
