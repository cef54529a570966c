"""Real captures where there is a GPU; anywhere, that a failed one leaves the thread as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from runtime.cache.pool import KvPool
from runtime.execution.attention import choose_backend
from runtime.execution.cuda_graphs import CudaGraphCapture
from runtime.execution.decode_graphs import DecodeGraphs, with_decode_graphs
from runtime.execution.runner import PackedBatch, Runner
from runtime.importing.huggingface import HuggingFaceDecoder, load_decoder
from runtime.proving.replay import Replay
from tests.runtime.decoders import save_decoder
from tests.runtime.execution.test_decode_graphs import (
    BLOCK_SIZE,
    MAX_SEQUENCES,
    equal,
    random_schedule,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


class Stream:
    """A stream of a device that is not there."""

    def wait_stream(self, other: "Stream") -> None:
        assert other is not self


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The current stream, last; a capture's end fails as torch's does, without a way back."""
    current = [Stream()]

    @contextmanager
    def stream(other: Stream) -> Iterator[None]:
        current.append(other)
        yield
        current.pop()

    @contextmanager
    def graph(graph: Any, *, stream: Stream, **_: Any) -> Iterator[None]:
        current.append(stream)
        yield
        if graph.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        current.pop()

    @contextmanager
    def device(_: Any) -> Iterator[None]:
        yield

    graphs = iter([type("Broken", (), {"is_broken": True}), type("Good", (), {"is_broken": False})])
    fakes = {
        "Stream": lambda _: Stream(),
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": lambda: next(graphs),
        "current_stream": lambda: current[-1],
        "set_stream": current.append,
        "stream": stream,
        "graph": graph,
        "device": device,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return current


def test_a_failed_capture_leaves_the_stream_that_was_current(streams: list[Stream]) -> None:
    capture = CudaGraphCapture(torch.device("cuda"))
    seen: list[Stream] = []

    def run() -> torch.Tensor:
        seen.append(streams[-1])
        return torch.ones(3)

    before = streams[-1]
    with pytest.raises(RuntimeError, match="during capture"):
        capture.capture(run)
    assert streams[-1] is before
    assert bool((capture.capture(run).output == 1).all())
    assert streams[-1] is before
    assert len(seen) == 4, "each is run once before it is captured"
    assert len(set(map(id, seen))) == 1, "on one stream"
    assert before not in seen


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceDecoder:
    directory: Path = tmp_path_factory.mktemp("llama")
    save_decoder("llama", directory)
    return load_decoder(directory, "cuda")


def make_replay(decoder: HuggingFaceDecoder, seed: int) -> Replay:
    shapes = [layer.kv_shape for layer in decoder.layers]
    pool = KvPool(shapes, num_blocks=48, block_size=BLOCK_SIZE, dtype=decoder.dtype, device="cuda")
    return Replay(Runner(decoder, pool, choose_backend("cuda", 64)), seed)


@pytest.mark.gpu
@needs_gpu
def test_replayed_steps_give_the_logits_of_steps_run_anew(decoder: HuggingFaceDecoder) -> None:
    replay, expected = make_replay(decoder, 0), make_replay(decoder, 1)
    graphs = with_decode_graphs(replay.runner, MAX_SEQUENCES, 64)
    assert isinstance(graphs, DecodeGraphs)
    for work, leaving in random_schedule(0, 120):
        logits = graphs.run(cast(PackedBatch, replay.pack(work)))
        found = dict(zip(work, logits.split([len(t) for t in work.values()]), strict=True))
        equal(found, expected.step(work))
        for name in leaving:
            replay.release(name)
            expected.release(name)
    assert graphs.captured_sizes == [1, 2, 4, 6]


@pytest.mark.gpu
@needs_gpu
def test_what_waits_for_the_device_is_not_captured_and_harms_nothing() -> None:
    capture = CudaGraphCapture(torch.device("cuda"))
    numbers = torch.ones(3, device="cuda")
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        capture.capture(lambda: numbers + numbers.sum().item())
    assert torch.cuda.current_stream() == before
    graph = capture.capture(lambda: numbers * 2)
    numbers.fill_(5)
    graph.replay()
    assert graph.output.tolist() == [10, 10, 10]


@pytest.mark.gpu
@needs_gpu
def test_a_step_waits_for_the_device_only_for_its_tokens(decoder: HuggingFaceDecoder) -> None:
    replay = make_replay(decoder, 0)
    graphs = with_decode_graphs(replay.runner, MAX_SEQUENCES, 64)
    for _ in range(3):  # eager, captured and checked, replayed
        graphs.run(cast(PackedBatch, replay.pack({"a": [5], "b": [6]})))
    batches = [replay.pack({"a": [5], "b": [6]}), replay.pack({"a": [5, 6], "b": [7]})]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            graphs.run(cast(PackedBatch, batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
