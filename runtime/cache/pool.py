"""The block pool: keys and values of every layer, in fixed-size blocks.

Owns the memory and its layout. Which block belongs to whom is `runtime.scheduling`'s business.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.cache.transfer import send


@dataclass(frozen=True)
class KvShape:
    """What one layer stores per token: a key and a value of `num_kv_heads x head_dim` each."""

    num_kv_heads: int
    head_dim: int

    @property
    def elements_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim


class KvPool:
    """Blocks that hold all layers contiguously, so that moving one is a single copy.

    `storage` is `[num_blocks, elements_per_block]`. Inside a block lie the layers in order, each
    `[2, num_kv_heads, block_size, head_dim]` with keys first: the same bytes on any device. With
    equal layers that is `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`; layers
    may differ in heads and width, at the cost of nothing but an offset each.
    """

    def __init__(
        self,
        shapes: Sequence[KvShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        is_pinned: bool = False,
    ) -> None:
        """`is_pinned`: host memory that a CUDA device reads and writes by itself."""
        assert shapes, "a pool needs at least one layer"
        assert num_blocks > 0, f"num_blocks is {num_blocks}"
        assert block_size > 0, f"block_size is {block_size}"
        self.shapes = tuple(shapes)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        elements = elements_per_block(shapes, block_size)
        shape = (num_blocks, elements)
        if is_pinned:
            self.storage = torch.zeros(shape, dtype=dtype, pin_memory=True)
        else:
            self.storage = zeros(shape, dtype, torch.device(device))
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        offset = 0
        for shape in self.shapes:
            size = shape.elements_per_token * block_size
            layer = self.storage[:, offset : offset + size].unflatten(
                1, (2, shape.num_kv_heads, block_size, shape.head_dim)
            )
            self._keys.append(layer[:, 0])
            self._values.append(layer[:, 1])
            offset += size

    @property
    def device(self) -> torch.device:
        return self.storage.device

    @property
    def bytes_per_block(self) -> int:
        return self.storage.shape[1] * self.storage.element_size()

    def keys(self, layer: int) -> Tensor:
        """A view `[num_blocks, num_kv_heads, block_size, head_dim]`, strided over blocks."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """A view `[num_blocks, num_kv_heads, block_size, head_dim]`, strided over blocks."""
        return self._values[layer]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, all layers, as (source, destination) ids.

        All sources are read before any destination is written.
        """
        if not pairs:
            return
        sources, destinations = (list(ids) for ids in zip(*pairs, strict=True))
        assert len(set(destinations)) == len(destinations), "a block is written twice"
        to, of = (send(torch.tensor(ids), self.device) for ids in (destinations, sources))
        self.storage[to] = self.storage[of]

    def copy_blocks_to(self, other: "KvPool", pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks into another pool of the same layout, as (own, other's) ids. Between
        a device and pinned memory nobody waits: later work of the device comes after."""
        assert other.storage.shape[1] == self.storage.shape[1], "the pools differ in layout"
        for own, others in pairs:
            other.storage[others].copy_(self.storage[own], non_blocking=True)

    def poison(self, block_ids: Sequence[int]) -> None:
        """Fill freed blocks with NaN, so that whoever still reads them shows it."""
        if block_ids:
            self.storage[send(torch.tensor(list(block_ids)), self.device)] = torch.nan


def zeros(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed tensor, so that an untouched slot can never be NaN. On CPU it costs no memory
    before it is used: the kernel zeroes its pages when they are first touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = shape[0] * shape[1] * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def elements_per_block(shapes: Sequence[KvShape], block_size: int) -> int:
    """Elements of one block over all layers."""
    return sum(shape.elements_per_token for shape in shapes) * block_size


def num_blocks_within(
    kv_cache_bytes: int, shapes: Sequence[KvShape], block_size: int, dtype: torch.dtype
) -> int:
    """How many blocks fit into `kv_cache_bytes`; may be 0."""
    return kv_cache_bytes // (elements_per_block(shapes, block_size) * dtype.itemsize)
