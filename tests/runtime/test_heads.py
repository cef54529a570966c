"""Models with heads from an upload to an answer: real build processes, real workers."""

import io
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.protocol import Built, Failed, Predict, Predicted
from tests.runtime.heads import IMAGE_MODELS, cross_encoder, save_head, save_processor
from tests.runtime.peer import WorkerProcess
from tests.runtime.test_build import BuildProcess

PAIRS = [["the cat sat", "a dog"], ["red", "the fast dog ran on the log"], ["a a a", "mat"]]


def pack(directory: Path, target: Path) -> None:
    with tarfile.open(target, "w") as tar:
        for path in sorted(directory.iterdir()):
            tar.add(path, path.name)


def built_artifact(directory: Path, tmp_path: Path) -> tuple[Path, Built]:
    process = BuildProcess(tmp_path)
    try:
        pack(directory, process.upload_path)
        _, message = process.run()
        assert isinstance(message, Built), (message, process.log())
    finally:
        process.hang_up()
        process.process.kill()
        process.process.wait()
    return process.output_dir, message


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Built]:
    """The model's directory, its artifact and what its build said."""
    directory = tmp_path_factory.mktemp("ranker")
    save_head(directory / "model", cross_encoder())
    artifact, built = built_artifact(directory / "model", directory)
    return directory / "model", artifact, built


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Path], WorkerProcess]]:
    started: list[WorkerProcess] = []

    def start(artifact: Path) -> WorkerProcess:
        started.append(WorkerProcess(tmp_path))
        started[-1].serve(artifact)
        return started[-1]

    yield start
    for worker in started:
        worker.stop()


def logits(predicted: Predicted) -> np.ndarray[Any, Any]:
    (tensor,) = predicted.outputs
    assert (tensor.name, tensor.dtype) == ("logits", "float32")
    return np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)


def test_a_ranker_scores_pairs_as_sentence_transformers_does(
    ranker: tuple[Path, Path, Built], serve: Callable[[Path], WorkerProcess]
) -> None:
    directory, artifact, built = ranker
    assert built.receipt.verdict == "equal"
    assert built.manifest.text is not None
    worker = serve(artifact)
    worker.peer.send(Predict(request_id="all", texts=PAIRS))
    together = worker.peer.receive_until(Predicted)
    # Every pair in a request of its own too: they may share a run, padded.
    for index, pair in enumerate(PAIRS):
        worker.peer.send(Predict(request_id=str(index), texts=[pair]))
    alone = [worker.peer.receive_until(Predicted) for _ in PAIRS]
    by_id = {predicted.request_id: logits(predicted)[0] for predicted in alone}

    from sentence_transformers import CrossEncoder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CrossEncoder(str(directory), device="cpu", local_files_only=True)
        expected = model.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(logits(together)[:, 0], expected, rtol=1e-4, atol=1e-4)
    separate = np.array([by_id[str(index)][0] for index in range(len(PAIRS))])
    np.testing.assert_allclose(separate, expected, rtol=1e-4, atol=1e-4)


def test_texts_that_do_not_fit_fail_alone(
    ranker: tuple[Path, Path, Built], serve: Callable[[Path], WorkerProcess]
) -> None:
    worker = serve(ranker[1])
    worker.peer.send(
        Predict(request_id="long", texts=[["cat " * 70, "dog"]]),
        Predict(request_id="image", image=b"\x89PNG"),
        Predict(request_id="fits", texts=[["cat", "dog"]]),
    )
    answers = {
        message.request_id: message
        for message in (worker.peer.receive(), worker.peer.receive(), worker.peer.receive())
        if isinstance(message, Predicted | Failed)
    }
    long, image = answers["long"], answers["image"]
    assert isinstance(long, Failed)
    assert isinstance(image, Failed)
    assert long.error.code == "context_length_exceeded"
    assert "texts[0] has 74 tokens; this model takes at most 64" in long.error.message
    assert image.error.code == "wrong_kind_of_input"
    assert isinstance(answers["fits"], Predicted)


def test_a_vision_model_takes_image_files(
    tmp_path: Path, serve: Callable[[Path], WorkerProcess]
) -> None:
    module = IMAGE_MODELS["vit"]()
    directory = save_head(tmp_path / "model", module)
    save_processor(directory)
    artifact, built = built_artifact(directory, tmp_path)
    assert built.manifest.labels == ["bad", "middling", "good"]
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    )
    file = io.BytesIO()
    picture.save(file, "PNG")
    worker = serve(artifact)
    worker.peer.send(Predict(request_id="image", image=file.getvalue()))
    found = logits(worker.peer.receive_until(Predicted))

    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil.from_pretrained(directory)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = module(pixel_values=pixels).logits
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
