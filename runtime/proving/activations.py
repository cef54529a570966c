"""How much memory a model that keeps nothing takes for a sequence, and how long one may be.

Owns the measurement: every tensor that a forward allocates, at three short lengths, from which
each moment's memory at any length follows. What an operator takes inside itself is not seen.
"""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.execution.whole import WholeModel

logger = logging.getLogger(__name__)

# What a sequence may take: as much as the keys and values of a paged decoder do by default.
ACTIVATION_BYTES = 512 << 20
MARGIN = 1.25  # times what is seen, for what operators take inside
UNMEASURED_TOKENS = 2048  # the longest sequence where it could not be measured
STEP_TOKENS = 64  # the lengths measured are 1, 2 and 3 times this


class AllocationLog(TorchDispatchMode):
    """While active, notes the bytes of all living tensors made under it, whenever one is made."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.bytes_at: list[int] = []
        self._living = 0
        self._known: dict[int, weakref.ref[Any]] = {}  # by the storage's own id

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if _is(each)}
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if _is(each) and id(each.untyped_storage()) not in given:
                self._note(each.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._known:
            return

        def forget(_: object) -> None:
            self._living -= num_bytes
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self._living += num_bytes
        self.bytes_at.append(self._living)


def _is(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def affordable_context(model: WholeModel, limit: int, max_bytes: int = ACTIVATION_BYTES) -> int:
    """The longest sequence, `limit` at most, whose forward stays within `max_bytes`."""
    if limit < 3 * STEP_TOKENS:
        return limit
    lengths = [STEP_TOKENS, 2 * STEP_TOKENS, 3 * STEP_TOKENS]
    try:
        logs = [_bytes_of(model, length) for length in lengths]
    except (RuntimeError, TypeError) as error:  # an operation that no mode can see through
        logger.warning("what a sequence takes was not measured: %s", error)
        return min(limit, UNMEASURED_TOKENS)
    if len({len(log) for log in logs}) > 1:  # it does something for each token in turn
        logs = [[max(log)] for log in logs]
    terms = torch.linalg.solve(
        torch.tensor([[1, n, n * n] for n in lengths], dtype=torch.float64),
        torch.tensor(logs, dtype=torch.float64),
    ).clamp(min=0)  # [3, moments]: bytes, bytes per token, bytes per pair of tokens

    def fits(length: int) -> bool:
        sizes = torch.tensor([1, length, length * length], dtype=torch.float64)
        return float((sizes @ terms).max()) * MARGIN <= max_bytes

    least, most = min(limit, 3 * STEP_TOKENS), limit + 1
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


@torch.inference_mode()
def _bytes_of(model: WholeModel, length: int) -> list[int]:
    log = AllocationLog()
    with log:
        model.logits(torch.zeros(1, length, dtype=torch.int64))
    return log.bytes_at or [0]
