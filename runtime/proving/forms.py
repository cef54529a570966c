"""The forms of a decoder that a proof is about, and how each is run: paged, or without a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from runtime.cache.pool import KvPool
from runtime.execution.attention import AttentionBackend, choose_backend
from runtime.execution.runner import Runner
from runtime.execution.whole import WholeModel
from runtime.importing.program import Decoder
from runtime.proving.original import Trace
from runtime.proving.replay import Replay
from runtime.proving.ways import PAGED_WAYS, WHOLE_WAYS, Found, Way


@dataclass(frozen=True)
class Run:
    """One way of running a form, ready to be run."""

    name: str
    description: str
    run: Callable[[], list[Found]]


class Form(Protocol):
    """One form that could be served. Its name is that of the candidate ("eager", "fused")."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype:
        """What it is served in."""
        ...

    @property
    def max_context_tokens(self) -> int: ...

    @property
    def window(self) -> int:
        """The longest sliding window of a layer; 0 where there is none."""
        ...

    @property
    def is_whole(self) -> bool:
        """It keeps no cache, so it need not be causal."""
        ...

    def runs(self, dtype: torch.dtype, traces: list[Trace]) -> list[Run]:
        """Each way that serving can run it, with the model in `dtype`."""
        ...


@dataclass(frozen=True)
class PagedForm:
    """A `Form` over a block pool. `load` gives the model in a dtype."""

    name: str
    dtype: torch.dtype
    max_context_tokens: int
    window: int
    load: Callable[[torch.dtype], Decoder]
    block_size: int = 32
    backend: AttentionBackend | None = None
    is_whole: bool = False

    def runs(self, dtype: torch.dtype, traces: list[Trace]) -> list[Run]:
        """Each on a pool of its own, whose unused memory is all NaN."""
        model = self.load(dtype)
        return [
            Run(way.name, way.description, partial(self._run, way, seed, model, dtype, traces))
            for seed, way in enumerate(PAGED_WAYS)
        ]

    def _run(
        self, way: Way, seed: int, model: Decoder, dtype: torch.dtype, traces: list[Trace]
    ) -> list[Found]:
        num_tokens = sum(len(trace.tokens) for trace in traces)
        num_blocks = 2 * (num_tokens // self.block_size + len(traces)) + 1
        pool, swap = (
            KvPool(
                [layer.kv_shape for layer in model.layers],
                num_blocks=num_blocks,
                block_size=self.block_size,
                dtype=dtype,
                device=device,
            )
            for device in (model.device, "cpu")
        )
        backend = self.backend or choose_backend(model.device)
        found = way.run(Replay(Runner(model, pool, backend, swap), seed), traces)
        pairs: list[Found] = []
        for logits, trace in zip(found, traces, strict=True):
            first = len(trace.tokens) - len(logits)
            rows = trace.first_row + first + torch.arange(len(logits))
            pairs.append((logits.cpu(), trace.reference[first:], rows))
        return pairs


@dataclass(frozen=True)
class WholeForm:
    """A `Form` without a cache; not `is_batched` if each sequence is run by itself."""

    name: str
    dtype: torch.dtype
    max_context_tokens: int
    load: Callable[[torch.dtype], WholeModel]
    is_batched: bool = True
    window: int = 0
    is_whole: bool = True

    def runs(self, dtype: torch.dtype, traces: list[Trace]) -> list[Run]:
        """Each on one model, which keeps nothing between them."""
        model = self.load(dtype)
        ways = WHOLE_WAYS if self.is_batched else WHOLE_WAYS[:1]
        return [Run(way.name, way.description, partial(way.run, model, traces)) for way in ways]


def paged_form(
    decoder: Decoder,
    load: Callable[[torch.dtype], Decoder],
    *,
    name: str = "eager",
    block_size: int = 32,
    backend: AttentionBackend | None = None,
) -> PagedForm:
    """The form of a decoder that is loaded already; `load` makes it again in another dtype."""
    dtype = decoder.dtype
    return PagedForm(
        name=name,
        dtype=dtype,
        max_context_tokens=decoder.info.max_context_tokens,
        window=max((layer.attention.sliding_window or 0 for layer in decoder.layers), default=0),
        load=lambda wanted: decoder if wanted == dtype else load(wanted),
        block_size=block_size,
        backend=backend,
    )
