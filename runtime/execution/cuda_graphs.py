"""Captures work as CUDA graphs. What is worth capturing is `decode_graphs.py`'s to know."""

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraph:
    """A `decode_graphs.CapturedGraph`: all launches of a function, made again by one."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        """On the current stream; does not wait."""
        self._graph.replay()


class CudaGraphCapture:
    """A `decode_graphs.GraphCapture` whose graphs share one pool of memory.

    They may, because no two of them run at once and none needs what another left.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Tensor]) -> CudaGraph:
        """Run once, so that what happens only once is over (kernels compiled, workspaces taken),
        then capture. Raises `RuntimeError` when `run` waits for the device."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may use the device for something else meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    output = run()
            finally:
                # A capture that cannot be ended leaves its stream behind as the current one.
                torch.cuda.set_stream(current)
            return CudaGraph(graph, output)
