"""Ragged paged batches for attention backends: prefill, chunks and decodes in one step."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from runtime.cache.pool import KvPool, KvShape
from runtime.execution.attention import AttentionBackend, AttentionMetadata, AttentionSpec
from runtime.execution.reference import attend_one


@dataclass(frozen=True)
class Case:
    """`lengths` are (new tokens, context tokens) per sequence."""

    lengths: tuple[tuple[int, int], ...]
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    sliding_window: int | None = None
    soft_cap: float | None = None
    has_slopes: bool = False
    has_sinks: bool = False


@dataclass
class PagedInputs:
    """A case's tensors, with the past already cached and everything unused poisoned."""

    query: Tensor
    keys: Tensor  # of the new tokens
    values: Tensor
    pool: KvPool
    metadata: AttentionMetadata
    spec: AttentionSpec
    whole_keys: list[Tensor]  # per sequence, its whole context [kv_heads, context, head_dim]
    whole_values: list[Tensor]

    def attend(self, backend: AttentionBackend) -> Tensor:
        caches = self.pool.keys(1), self.pool.values(1)
        backend.write(self.keys, self.values, *caches, self.metadata.slots)
        return backend.attend(self.query, *caches, self.metadata, self.spec)

    def attend_on(self, device: str, backend: AttentionBackend) -> Tensor:
        """`attend` with everything moved there; the result comes back."""
        pool = KvPool(
            self.pool.shapes,
            num_blocks=self.pool.num_blocks,
            block_size=self.pool.block_size,
            dtype=self.pool.dtype,
            device=device,
        )
        pool.storage.copy_(self.pool.storage)
        tensors = {
            field.name: value.to(device)
            for field in fields(self.metadata)
            if isinstance(value := getattr(self.metadata, field.name), Tensor)
        }
        moved = replace(
            self,
            query=self.query.to(device),
            keys=self.keys.to(device),
            values=self.values.to(device),
            pool=pool,
            metadata=replace(self.metadata, **tensors),
        )
        return moved.attend(backend).cpu()

    def expected(self) -> Tensor:
        """From the dense keys and values, in float64: no paging is involved."""
        starts = self.metadata.query_start.tolist()
        outputs = [
            attend_one(
                self.query[starts[i] : starts[i + 1]].double(),
                self.whole_keys[i].double(),
                self.whole_values[i].double(),
                self.spec,
            )
            for i in range(len(self.whole_keys))
        ]
        return torch.cat(outputs)


def make_spec(case: Case) -> AttentionSpec:
    """ALiBi's slopes as for a power of two of heads; sinks from negligible to dominant."""
    heads = range(case.num_heads)
    return AttentionSpec(
        case.head_dim**-0.5,
        case.sliding_window,
        case.soft_cap,
        tuple(2.0 ** (-8 * (h + 1) / case.num_heads) for h in heads) if case.has_slopes else None,
        tuple(3.0 * h - 7.0 for h in heads) if case.has_sinks else None,
    )


def make_inputs(case: Case, seed: int = 0) -> PagedInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    shape = KvShape(case.num_kv_heads, case.head_dim)
    size = case.block_size
    num_blocks = sum(-(-context // size) for _, context in case.lengths) + 3
    pool = KvPool([shape] * 3, num_blocks=num_blocks, block_size=size, dtype=case.dtype)
    pool.poison(range(num_blocks))
    shuffled = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_blocks, generator=shuffled).tolist()
    tables, slots, starts, wholes, new = [], [], [0], [], []
    for num_new, context in case.lengths:
        table = [order.pop() for _ in range(-(-context // size))]
        whole = normal(2, case.num_kv_heads, context, case.head_dim)
        for p in range(context - num_new):
            pool.keys(1)[table[p // size], :, p % size] = whole[0, :, p]
            pool.values(1)[table[p // size], :, p % size] = whole[1, :, p]
        tables.append(table)
        slots += [table[p // size] * size + p % size for p in range(context - num_new, context)]
        starts.append(starts[-1] + num_new)
        wholes.append(whole)
        new.append(whole[:, :, context - num_new :])
    width = max(len(table) for table in tables)
    packed = torch.cat(new, dim=2).transpose(1, 2)  # [2, tokens, kv_heads, head_dim], strided
    metadata = AttentionMetadata(
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in case.lengths], dtype=torch.int32),
        # Entries past a context are arbitrary: they must not be read.
        block_tables=torch.tensor(
            [table + [2**30] * (width - len(table)) for table in tables], dtype=torch.int32
        ),
        slots=torch.tensor(slots),
        block_size=size,
        max_query_len=max(num_new for num_new, _ in case.lengths),
        max_context_len=max(context for _, context in case.lengths),
    )
    return PagedInputs(
        query=normal(case.num_heads, starts[-1], case.head_dim).transpose(0, 1),
        keys=packed[0],
        values=packed[1],
        pool=pool,
        metadata=metadata,
        spec=make_spec(case),
        whole_keys=[whole[0] for whole in wholes],
        whole_values=[whole[1] for whole in wholes],
    )


# Decodes, whole prompts, chunks that continue a past, a single token, contexts ending inside and
# at the end of a block, and one long enough to be split.
RAGGED = ((1, 300), (1, 3), (37, 37), (30, 90), (2, 64), (1, 1), (1, 16), (3, 20))

# Contexts that no part, one part and several share, and one that all parts do.
DECODES = ((1, 700), (1, 1), (1, 128), (1, 129), (1, 300), (1, 40))

CASES = {
    "grouped": Case(RAGGED),
    "sharing one kv head": Case(RAGGED, num_heads=8, num_kv_heads=1),
    "one head per kv head": Case(RAGGED, num_heads=3, num_kv_heads=3, head_dim=64),
    "odd width": Case(RAGGED, head_dim=20),
    "odd blocks": Case(RAGGED, block_size=5),
    "large blocks": Case(RAGGED, block_size=64),
    "window": Case(RAGGED, sliding_window=13),
    "wide window": Case(RAGGED, sliding_window=33, num_heads=4, num_kv_heads=4),
    "soft cap": Case(RAGGED, soft_cap=1.5),
    "soft cap and window": Case(RAGGED, soft_cap=5.0, sliding_window=20),
    "only decoding": Case(((1, 40), (1, 7), (1, 65)), num_heads=9, num_kv_heads=3, head_dim=64),
    "decoding": Case(DECODES),
    "decoding, one kv head": Case(DECODES[1:], num_heads=20, num_kv_heads=1, head_dim=20),
    "decoding, window and sinks": Case(
        DECODES, sliding_window=200, has_sinks=True, block_size=5, dtype=torch.float16
    ),
    "decoding, everything": Case(
        DECODES, sliding_window=290, soft_cap=5.0, has_slopes=True, has_sinks=True, head_dim=24
    ),
    "bfloat16": Case(RAGGED, dtype=torch.bfloat16),
    "float16": Case(RAGGED, dtype=torch.float16, sliding_window=19),
    "alibi": Case(RAGGED, has_slopes=True),
    "alibi, one head per kv head": Case(RAGGED, num_heads=5, num_kv_heads=5, has_slopes=True),
    "alibi, odd width, window": Case(RAGGED, head_dim=20, sliding_window=17, has_slopes=True),
    "alibi after a soft cap": Case(RAGGED, soft_cap=2.0, has_slopes=True, block_size=5),
    "sinks": Case(RAGGED, has_sinks=True),
    "sinks, one kv head": Case(RAGGED, num_heads=8, num_kv_heads=1, has_sinks=True),
    "sinks and window": Case(RAGGED, sliding_window=9, has_sinks=True, head_dim=64),
    "everything": Case(
        RAGGED, sliding_window=40, soft_cap=5.0, has_slopes=True, has_sinks=True, head_dim=24
    ),
    "everything, bfloat16": Case(
        RAGGED, dtype=torch.bfloat16, soft_cap=5.0, has_slopes=True, has_sinks=True
    ),
    "bfloat16, several tiles and splits": Case(
        ((1, 1100), (150, 700), (1, 513), (2, 64)),
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        block_size=32,
        dtype=torch.bfloat16,
    ),
    "bfloat16, eight rows of odd blocks": Case(
        ((1, 600), (31, 90)), 8, 1, head_dim=96, block_size=5, dtype=torch.bfloat16
    ),
    "bfloat16, window and sinks": Case(
        ((1, 700), (200, 333), (3, 65)),
        head_dim=128,
        dtype=torch.bfloat16,
        sliding_window=130,
        has_slopes=True,
        has_sinks=True,
    ),
    "bfloat16, width that fills no register": Case(
        ((1, 600), (70, 90)), head_dim=80, dtype=torch.bfloat16
    ),
}

# Largest deviation from float64 that rounding explains, of outputs of magnitude about 1.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def deviation(backend: AttentionBackend, case: Case) -> float:
    inputs = make_inputs(case)
    return float((inputs.attend(backend).double() - inputs.expected()).abs().max())
