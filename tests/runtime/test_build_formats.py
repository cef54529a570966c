"""Real builds of tensor programs whose files need more than loading: TorchScript, examples, nested
arguments, and files that only look fine."""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from app.registry.input_hints import parse_inputs
from runtime.compiling.packaging import read_manifest
from runtime.compiling.programs import load_program
from runtime.protocol import BuildFailed, BuildHints, Built
from tests.runtime.importing.programs import BATCH, Digits, export
from tests.runtime.importing.torchscript.modules import Baked, Looped, save_scripted, save_traced
from tests.runtime.test_build import BuildProcess

IMAGE = "image: float32[batch, 1, 8, 8] in 0..1"


@pytest.fixture
def build(tmp_path: Path) -> Iterator[BuildProcess]:
    process = BuildProcess(tmp_path)
    yield process
    process.hang_up()


@pytest.fixture
def run(build: BuildProcess) -> Callable[[str], Built]:
    def run(inputs: str = "") -> Built:
        build.hints = BuildHints(inputs=parse_inputs(inputs), accepts_loss=True)
        _, message = build.run()
        assert isinstance(message, Built), (message, build.log())
        return message

    return run


def pack(path: Path, *files: Path, **arrays: np.ndarray) -> None:
    """An upload of files, with an `examples.npz` of the arrays."""
    np.savez(path.parent / "examples.npz", **arrays)  # type: ignore[arg-type]
    with tarfile.open(path, "w") as archive:
        for file in (*files, path.parent / "examples.npz"):
            archive.add(file, file.name)


def test_torchscript_is_served_as_an_exported_program_that_is_proved_equal(
    build: BuildProcess, run: Callable[[str], Built], tmp_path: Path
) -> None:
    module = Digits().eval()
    save_traced(tmp_path / "digits.pt", module, torch.rand(2, 1, 8, 8))
    pack(build.upload_path, tmp_path / "digits.pt", image=np.random.rand(5, 1, 8, 8).astype("f4"))
    built = run(IMAGE)
    manifest, receipt = built.manifest, built.receipt
    assert (manifest.format, manifest.num_parameters) == ("pt2", 1386)
    assert manifest.accepts_loss
    assert manifest.schema is not None
    assert manifest.schema.is_batched
    spec = manifest.schema.inputs[0]
    assert (spec.name, spec.shape, spec.minimum, spec.maximum) == ("image", [None, 1, 8, 8], 0, 1)
    assert "converted" in {check.form for check in receipt.checks}
    assert any("your inputs, batch of 5" in check.name for check in receipt.checks)
    assert all(check.is_equal for check in receipt.checks)
    assert any("deprecated" in note for note in receipt.notes)
    assert receipt.warnings == []

    files = {path.name for path in build.output_dir.iterdir()}
    assert files == {"program.json", "receipt.json", "program.pt2", "examples.npz"}
    program = load_program(build.output_dir, read_manifest(build.output_dir))
    assert program.example_inputs is not None
    assert program.example_inputs[0].shape == (5, 1, 8, 8)
    assert program.schema == manifest.schema
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(program.run([images])[0], module(images))


def test_what_torch_cannot_convert_is_served_as_it_is(
    build: BuildProcess, run: Callable[[str], Built]
) -> None:
    module = Looped().eval()
    save_scripted(build.upload_path, module)
    built = run("x: float32[batch, 4]")
    assert built.manifest.format == "torchscript"
    assert built.receipt.notes[0].startswith("It is served as TorchScript")
    assert "prim::Loop" in built.receipt.notes[0]
    program = load_program(build.output_dir, built.manifest)
    x = torch.rand(3, 4)
    assert torch.equal(program.run([x])[0], module(x))


def test_a_batch_baked_into_a_trace_is_a_warning(
    build: BuildProcess, run: Callable[[str], Built]
) -> None:
    save_traced(build.upload_path, Baked(), torch.rand(1, 4, 3))
    built = run("x: float32[batch, 4, 3]")
    (warning,) = built.receipt.warnings
    assert "The batch dimension of 'x' is fixed at 1" in warning
    assert "torch.export.export" in warning
    assert not any("fixed at 1" in note for note in built.receipt.notes)


def test_torchscript_alone_asks_for_its_inputs(build: BuildProcess) -> None:
    save_traced(build.upload_path, Digits().eval(), torch.rand(2, 1, 8, 8))
    _, message = build.run()
    assert isinstance(message, BuildFailed)
    assert message.error.code == "needs_inputs"
    assert "    image: float32[batch, 1, 224, 224]" in message.error.message.splitlines()


class Nested(nn.Module):
    """Nested inputs, one by keyword; a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(
        self, pair: tuple[torch.Tensor, dict[str, torch.Tensor]], *, bias: torch.Tensor
    ) -> dict[str, Any]:
        left, rest = pair
        logits = self.head(left + rest["right"]) + bias
        return {"logits": logits, "parts": (left * 2, rest["right"].sum(1))}


def test_nested_arguments_have_names_and_an_order(
    build: BuildProcess, run: Callable[[str], Built]
) -> None:
    module, rows = Nested().eval(), torch.rand(2, 4)
    pair = (rows, {"right": rows * 3})
    dynamic = {"pair": (BATCH, {"right": BATCH}), "bias": BATCH}
    export(build.upload_path, module, pair, dynamic=dynamic, bias=torch.rand(2, 3))
    built = run()  # type: ignore[call-arg]
    schema = built.manifest.schema
    assert schema is not None
    assert schema.is_batched
    assert [spec.name for spec in schema.inputs] == ["pair_0", "pair_1_right", "bias"]
    assert [spec.name for spec in schema.outputs] == ["logits", "parts_0", "parts_1"]
    program = load_program(build.output_dir, built.manifest)
    left, right, bias = torch.rand(3, 4), torch.rand(3, 4), torch.rand(3, 3)
    expected = module((left, {"right": right}), bias=bias)
    logits, first, second = program.run([left, right, bias])
    torch.testing.assert_close(logits, expected["logits"])
    assert torch.equal(first, expected["parts"][0])
    torch.testing.assert_close(second, expected["parts"][1])


def test_weights_that_are_not_numbers_are_refused(build: BuildProcess) -> None:
    module = Digits().eval()
    with torch.no_grad():
        module.head.bias[3] = torch.nan
    export(build.upload_path, module, torch.rand(2, 1, 8, 8))
    _, message = build.run()
    assert isinstance(message, BuildFailed)
    assert message.error.code == "nan_weights"
    assert "head.bias" in message.error.message


def test_examples_that_do_not_fit_are_refused(build: BuildProcess, tmp_path: Path) -> None:
    export(tmp_path / "digits.pt2", Digits().eval(), torch.rand(2, 1, 8, 8))
    pack(build.upload_path, tmp_path / "digits.pt2", image=np.zeros((2, 1, 8, 8)))
    _, message = build.run()
    assert isinstance(message, BuildFailed)
    assert message.error.code == "examples"
    assert ".astype('float32')" in message.error.message
