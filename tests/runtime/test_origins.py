"""Decoders of every origin, from the upload through a real build to a real worker's tokens."""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from runtime.compiling.packaging import write_manifest
from runtime.compiling.plans.plan import PLAN_NAME
from runtime.importing.huggingface_uncached import load_uncached
from runtime.protocol import BuildReceipt, Built, Manifest
from tests.runtime.compiling.paging.decoders import HIDDEN, VOCAB, HandWritten, export, masked_fill
from tests.runtime.compiling.paging.test_decoders import Bidirectional
from tests.runtime.decoders import save_decoder
from tests.runtime.peer import RECEIPT, WorkerProcess, generate, save_tokenizer
from tests.runtime.test_build import BuildProcess

NUM_TOKENS = 12
PROMPT = [3, 14, 15, 9, 2, 6]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[BuildProcess]:
    directory = tmp_path / "build"
    directory.mkdir()
    process = BuildProcess(directory)
    yield process
    if process.process.poll() is None:
        process.process.kill()
        process.process.wait()
    process.hang_up()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], WorkerProcess]]:
    started: list[WorkerProcess] = []

    def start(artifact_dir: Path) -> WorkerProcess:
        directory = tmp_path / "worker"
        directory.mkdir()
        started.append(WorkerProcess(directory))
        started[-1].serve(artifact_dir, kv_cache_bytes=4 * 1024**2)
        return started[-1]

    yield start
    for worker in started:
        worker.stop()


def run(build: BuildProcess) -> tuple[Manifest, BuildReceipt]:
    _, message = build.run()
    assert isinstance(message, Built), (message, build.log())
    return message.manifest, message.receipt


def greedy(logits: Callable[[Tensor], Tensor]) -> list[int]:
    """What the model itself continues the prompt with, from the whole sequence each time."""
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            tokens.append(int(logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def generated(worker: WorkerProcess, **options: Any) -> list[int]:
    request = generate("request", list(PROMPT), max_tokens=NUM_TOKENS, **options)
    outputs = worker.peer.generate(request)["request"]
    return [token for output in outputs for token in output.token_ids]


def spread(module: nn.Module) -> nn.Module:
    """Weights wide enough that greedy choices are clear and vary."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return module.eval()


def test_a_graph_with_a_tokenizer_is_paged_and_generates_what_it_says(build, serve, tmp_path):
    model = spread(HandWritten(masked_fill, positions="rotary"))
    torch.export.save(export(model, batch=torch.export.Dim.DYNAMIC), tmp_path / "program.pt2")
    (tmp_path / "text").mkdir()
    save_tokenizer(tmp_path / "text")
    (tmp_path / "text" / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    with tarfile.open(build.upload_path, "w") as tar:
        tar.add(tmp_path / "program.pt2", "program.pt2")
        tar.add(tmp_path / "text", "tokenizer")
    manifest, receipt = run(build)

    assert (manifest.kind, manifest.format) == ("decoder", "pt2")
    info = manifest.decoder
    assert info is not None
    assert info.is_paged
    assert (info.has_tokenizer, info.has_chat_template) == (True, True)
    assert info.eos_token_ids == [7, 8]
    assert receipt.verdict == "equal"
    assert receipt.route == "Paged by rewriting its graph."
    assert not any("Not used" in note for note in receipt.notes)
    assert {check.name for check in receipt.checks} >= {"paged", "partial", "preempted", "swapped"}

    worker = serve(build.output_dir)
    assert generated(worker) == greedy(model)
    assert (build.output_dir / PLAN_NAME).is_file()
    assert "plan is not used" not in worker.log
    text = generate("text", None, text="!", max_tokens=3)
    assert worker.peer.generate(text)["text"]


def test_a_directory_with_attention_of_its_own_is_rewritten(build, serve, tmp_path):
    model = save_decoder("bloom", tmp_path / "model")
    with tarfile.open(build.upload_path, "w") as tar:
        tar.add(tmp_path / "model", "model")
    manifest, receipt = run(build)
    assert manifest.format == "pt2"
    assert manifest.decoder is not None
    assert manifest.decoder.is_paged
    assert manifest.decoder.architecture == "BloomForCausalLM"
    assert receipt.verdict == "equal"
    assert receipt.route == "Paged by rewriting an exported graph of it."
    assert any("transformers' attention" in note for note in receipt.notes)
    names = {path.name for path in build.output_dir.iterdir()}
    assert "program.pt2" in names
    assert not any(name.endswith(".safetensors") for name in names)

    def logits(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens).logits

    worker = serve(build.output_dir)
    assert generated(worker) == greedy(logits)
    assert "plan is not used" not in worker.log


class Mixing(nn.Module):
    """Looks ahead, so it cannot be paged, and mixes its rows, so they cannot be batched."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        return self.head(hidden + hidden.mean((0, 1), keepdim=True))


@pytest.mark.parametrize(("kind", "form"), [(Bidirectional, "eager"), (Mixing, "alone")])
def test_what_cannot_be_paged_is_served_uncached_and_says_so(
    build, serve, kind: type[nn.Module], form: str
):
    model = spread(kind())
    torch.export.save(export(model, batch=torch.export.Dim.DYNAMIC), build.upload_path)
    manifest, receipt = run(build)
    info = manifest.decoder
    assert info is not None
    assert not info.is_paged
    assert info.unpaged_reason
    assert manifest.form == form
    assert receipt.verdict == "equal"
    assert receipt.route.startswith("Uncached")
    assert any(info.unpaged_reason in note for note in receipt.notes)

    worker = serve(build.output_dir)
    assert worker.ready is not None
    assert worker.ready.num_blocks == 0
    requests = [generate(str(at), list(PROMPT), max_tokens=NUM_TOKENS) for at in range(3)]
    for outputs in worker.peer.generate(*requests).values():
        assert [token for each in outputs for token in each.token_ids] == greedy(model)


def test_an_uncached_directory_is_served(serve, tmp_path):
    model = save_decoder("mamba", tmp_path / "model")
    whole = load_uncached(tmp_path / "model", unpaged_reason="It has a state.")
    manifest = Manifest(
        kind="decoder", format="huggingface", num_parameters=1, weight_bytes=1, decoder=whole.info
    )
    write_manifest(tmp_path / "model", manifest, RECEIPT)
    worker = serve(tmp_path / "model")

    def logits(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens).logits

    assert generated(worker) == greedy(logits)
    assert msgspec.structs.asdict(worker.ready)["attention"] == "uncached"
