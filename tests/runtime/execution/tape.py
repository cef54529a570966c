"""A capture for machines without a GPU: a tape of operators, played again on the same memory.

Like a CUDA graph, and unlike calling a function again, it holds on to every number that Python
had when it was recorded, and refuses to record what waits for a number from the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from runtime.execution.reference import ReferenceAttention

WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "where"}


class Tape(TorchDispatchMode):
    """A `decode_graphs.CapturedGraph`."""

    output: Tensor

    def __init__(self, count_replay: Callable[[int], None]) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._count_replay = count_replay

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if waits(func, args):
            raise RuntimeError(f"{func} waits for the device")
        return self.record(func, args, kwargs or {})

    def record(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = call(*args, **kwargs)
        self._calls.append((call, args, kwargs, result))
        return result

    def replay(self) -> None:
        self._count_replay(len(self.output))
        for call, args, kwargs, result in self._calls:
            again = call(*args, **kwargs)
            pairs = zip(_tensors(result), _tensors(again), strict=True)
            for old, new in pairs:
                old.copy_(new)  # a view or an argument is copied onto itself


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator needs a number from the device before it can go on."""
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):  # by a mask, whose true elements count
        return any(each is not None and each.dtype == torch.bool for each in args[1])
    return name in WAITS and (name != "where" or len(args) == 1)


def _tensors(result: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, result)
    return found


class TapeCapture:
    """A `decode_graphs.GraphCapture`; remembers the sizes that were captured and replayed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.replayed: list[int] = []
        self.recording: Tape | None = None

    def capture(self, run: Callable[[], Tensor]) -> Tape:
        run()
        self.recording = Tape(self.replayed.append)
        try:
            with self.recording as tape:
                tape.output = run()
        finally:
            self.recording = None
        self.sizes.append(len(tape.output))
        return tape


class TapedReference(ReferenceAttention):
    """The reference backend as two operators of a tape, as a GPU's would be two launches: inside,
    it reads numbers from the device."""

    def __init__(self, capture: TapeCapture) -> None:
        self._capture = capture

    def write(self, *args: Any) -> None:
        self._taped(super().write, args)

    def attend(self, *args: Any) -> Tensor:
        return self._taped(super().attend, args)

    def _taped(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._capture.recording is None:
            return call(*args)
        with _disable_current_modes():
            return self._capture.recording.record(call, args, {})
