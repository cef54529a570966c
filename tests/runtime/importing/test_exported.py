"""Exported programs load with the right schema; those that would run code are refused first."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from runtime.batching.joining import check_outputs, encode
from runtime.importing.exported import ExportedProgramModel, load_exported
from runtime.importing.program import ImportFailure
from runtime.importing.signature import describe_schema
from runtime.protocol import TensorSpec
from tests.runtime.importing.programs import BATCH, Classifier, Digits, export, export_digits


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt2"


def refusal(path: Path) -> ImportFailure:
    with pytest.raises(ImportFailure) as caught:
        load_exported(path)
    return caught.value


# --- the schema -------------------------------------------------------------------------


def test_a_dynamic_batch_is_recognised(path):
    model = load_exported(export_digits(path))
    assert model.schema.inputs == [
        TensorSpec(
            name="image",
            dtype="float32",
            shape=[None, 1, 8, 8],
            min_shape=[1, 1, 8, 8],
            max_shape=[None, 1, 8, 8],
        )
    ]
    assert [spec.name for spec in model.schema.outputs] == ["output"]
    assert model.schema.is_batched
    assert model.notes == []
    assert describe_schema(model.schema) == "image float32 [n, 1, 8, 8] -> output float32 [n, 10]"
    assert model.num_parameters == sum(p.numel() for p in Digits().parameters())


def test_answers_are_the_models_own(path):
    module = Digits().eval()
    model = load_exported(export(path, module, torch.rand(2, 1, 8, 8)))
    image = torch.rand(5, 1, 8, 8)
    (output,) = model.run([image])
    torch.testing.assert_close(output, module(image))


def test_ranges_come_from_the_exports_constraints(path):
    dynamic = ({0: Dim("batch", min=1, max=64), 1: Dim("length", min=4, max=9) * 2},)

    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0], 2, -1)

    model = load_exported(export(path, Halves(), torch.randn(2, 10), dynamic=dynamic))
    (spec,) = model.schema.inputs
    assert (spec.shape, spec.min_shape, spec.max_shape) == ([None, None], [1, 8], [64, 18])
    assert model.schema.is_batched


def test_dict_outputs_keep_their_keys_and_keywords_their_names(path):
    program = export(
        path,
        Classifier(),
        dynamic={"ids": BATCH, "mask": BATCH, "scale": None},
        ids=torch.tensor([[1, 2], [3, 4]]),
        mask=torch.ones(2, 2),
        scale=False,
    )
    model = load_exported(program)
    assert [spec.name for spec in model.schema.inputs] == ["ids", "mask"]
    assert [spec.name for spec in model.schema.outputs] == ["logits", "hidden"]
    ids, mask = torch.tensor([[5, 6]]), torch.tensor([[1.0, 0.0]])
    _, hidden = model.run([ids, mask])
    assert hidden[0, 1].abs().sum() == 0, "the mask reached the graph"


def test_sequences_are_numbered_and_nests_join_their_path(path):
    class Many(nn.Module):
        def forward(self, state: dict[str, Any]) -> tuple[Any, ...]:
            x, y = state["x"], state["more"][0]
            return x + 1, [x * y, None], {"last": y}

    state = {"x": torch.randn(2, 3), "more": [torch.randn(2, 3)]}
    dynamic = ({"x": BATCH, "more": [BATCH]},)
    model = load_exported(export(path, Many(), state, dynamic=dynamic))
    assert [spec.name for spec in model.schema.inputs] == ["state_x", "state_more_0"]
    names = [spec.name for spec in model.schema.outputs]
    assert names == ["output_0", "output_1_0", "output_2_last"]
    assert len(model.run([torch.ones(4, 3), torch.ones(4, 3)])) == 3


def test_bfloat16_travels_as_float32(path):
    module = nn.Linear(3, 2).bfloat16()
    model = load_exported(export(path, module, torch.randn(2, 3).bfloat16()))
    assert {spec.dtype for spec in model.schema.inputs + model.schema.outputs} == {"float32"}
    (output,) = model.run([torch.randn(4, 3)])
    assert output.dtype is torch.float32


def test_a_weight_may_be_an_output(path):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.weight, x * self.weight

    model = load_exported(export(path, Both(), torch.randn(3, 2)))
    outputs = model.run([torch.zeros(4, 2)])
    encoded = encode([check_outputs(outputs, 4, model.schema)], model.schema)
    assert [each.shape for each in encoded] == [[2], [4, 2]]


def test_a_program_that_writes_to_its_input_leaves_ours_alone(path):
    class AddsInPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1) * 2

    model = load_exported(export(path, AddsInPlace(), torch.randn(3, 2)))
    given = torch.zeros(4, 2)
    assert all(torch.equal(model.run([given])[0], torch.full((4, 2), 2.0)) for _ in range(2))
    assert not given.any()


@pytest.mark.parametrize("size", [1, 3])
def test_a_fixed_batch_says_how_to_export_again(path, size):
    model = load_exported(export(path, Digits().eval(), torch.rand(size, 1, 8, 8), dynamic=None))
    assert not model.schema.is_batched
    (note,) = model.notes
    assert f"fixed at {size}" in note
    assert 'dynamic_shapes={"image": {0: batch}}' in note


def test_rows_that_depend_on_each_other_by_shape_are_not_batched(path):
    class Gram(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.T

    model = load_exported(export(path, Gram(), torch.randn(2, 3)))
    assert not model.schema.is_batched
    assert "rows depend on each other" in model.notes[0]


def test_inputs_whose_equal_batches_the_export_was_not_told_of_are_batched(path):
    class Apart(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * 2, y * 3

    model = load_exported(export(path, Apart(), torch.randn(2, 3), torch.randn(2, 4)))
    assert len(model.signature.batch) == 2
    assert model.schema.is_batched


def test_an_output_without_the_batch_is_not_batched(path):
    class Total(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x.sum()

    model = load_exported(export(path, Total(), torch.randn(2, 3)))
    assert not model.schema.is_batched
    assert "'output_1'" in model.notes[0]


def test_example_inputs_are_kept_for_the_proof(path):
    model = load_exported(export_digits(path))
    assert model.example_inputs is not None
    assert [tuple(value.shape) for value in model.example_inputs] == [(2, 1, 8, 8)]


# --- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "layer"),
    [(nn.BatchNorm1d(3), "batch norm"), (nn.Dropout(0.5), "dropout"), (Digits(), "batch norm")],
)
def test_training_mode_is_refused(path, module, layer):
    example = torch.rand(2, 1, 8, 8) if isinstance(module, Digits) else torch.randn(2, 3)
    failure = refusal(export(path, module.train(), example))
    assert failure.error.code == "training_mode"
    assert layer in failure.error.message
    assert "model.eval()" in failure.error.message


def test_numbers_as_inputs_are_refused(path):
    class Repeated(nn.Module):
        def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
            return x * times

    dynamic = (BATCH, Dim.DYNAMIC)
    failure = refusal(export(path, Repeated(), torch.randn(2, 3), 5, dynamic=dynamic))
    assert failure.error.code == "non_tensor"
    assert "'times'" in failure.error.message


def test_a_file_that_is_no_program_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    assert refusal(path).error.code == "pt2_damaged"


# --- programs that would run code -------------------------------------------------------


class Canary:
    """Unpickling one creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


Change = Callable[[bytes], bytes]


def alter(path: Path, changes: dict[str, Change], added: dict[str, bytes] | None = None) -> None:
    """Rewrite members of a program in place, stored as torch stores them."""
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    root = next(iter(members)).partition("/")[0]
    for name, change in changes.items():
        members[f"{root}/{name}"] = change(members[f"{root}/{name}"])
    members |= {f"{root}/{name}": data for name, data in (added or {}).items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, data in members.items():
            target.writestr(name, data)


def in_json(change: Callable[[Any], None]) -> Change:
    def apply(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return apply


WEIGHTS = "data/weights/model_weights_config.json"


def test_an_altered_program_still_loads_when_nothing_changed(path):
    export_digits(path)
    alter(path, {})
    assert isinstance(load_exported(path), ExportedProgramModel)


@pytest.mark.parametrize("flag", [True, 1, "false", None])
def test_pickled_weights_are_refused_before_they_run(path, tmp_path, flag):
    export_digits(path)
    canary = tmp_path / "canary"

    def use_pickle(config: Any) -> None:
        config["config"]["head.weight"]["use_pickle"] = flag

    payload = io.BytesIO()
    torch.save(Canary(canary), payload)
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("model/" + WEIGHTS))
    weight = "data/weights/" + config["config"]["head.weight"]["path_name"]
    alter(path, {WEIGHTS: in_json(use_pickle), weight: lambda _: payload.getvalue()})
    assert refusal(path).error.code == "pickled_weights"
    assert not canary.exists()


def test_pickled_example_inputs_are_refused_before_they_run(path, tmp_path):
    export_digits(path)
    canary = tmp_path / "canary"
    payload = io.BytesIO()
    torch.save((Canary(canary),), payload)
    alter(path, {"data/sample_inputs/model.pt": lambda _: payload.getvalue()})
    assert refusal(path).error.code == "sample_inputs"
    assert not canary.exists()
    torch.load(io.BytesIO(payload.getvalue()), weights_only=False)
    assert canary.exists(), "the canary sings when it is unpickled"


def test_shape_expressions_that_are_code_are_refused_before_they_run(path, tmp_path):
    export_digits(path)
    canary = tmp_path / "canary"
    code = f"__import__('pathlib').Path('{canary}').touch()"

    def poison(program: Any) -> None:
        for value in program["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = code

    alter(path, {"models/model.json": in_json(poison)})
    assert refusal(path).error.code == "shape_expression"
    assert not canary.exists()


def test_ranges_that_are_code_are_refused(path):
    export_digits(path)

    def poison(program: Any) -> None:
        ranges = program["range_constraints"]
        ranges["().__class__"] = next(iter(ranges.values()))

    alter(path, {"models/model.json": in_json(poison)})
    assert refusal(path).error.code == "shape_expression"


@pytest.mark.parametrize(
    ("member", "code"),
    [
        ("data/aotinductor/model/wrapper.so", "native_code"),
        ("data/aotinductor/model/kernel.cpp", "native_code"),
        ("extra/libop.so", "native_code"),
        ("extra/kernel.cubin", "native_code"),
        ("data/constants/custom_obj_0", "custom_objects"),
        ("data/constants/opaque_obj_0", "custom_objects"),
        ("data/weights/model.pt", "pickled_weights"),
        ("data/constants/model.pt", "pickled_weights"),
        ("models/second.json", "pt2_models"),
    ],
)
def test_members_that_are_code_are_refused(path, tmp_path, member, code):
    export_digits(path)
    alter(path, {}, {member: pickle.dumps(Canary(tmp_path / "canary"))})
    assert refusal(path).error.code == code
    assert not (tmp_path / "canary").exists()


def test_constants_that_point_at_objects_are_refused(path):
    export_digits(path)
    config = {
        "config": {"op": {"path_name": "custom_obj_1", "use_pickle": False, "is_param": False}}
    }
    name = "data/constants/model_constants_config.json"
    alter(path, {name: lambda _: json.dumps(config).encode()})
    assert refusal(path).error.code == "custom_objects"


def test_compressed_members_are_refused(path):
    export_digits(path)
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in members.items():
            target.writestr(name, data)
    assert refusal(path).error.code == "pt2_compressed"


def test_a_graph_that_torch_cannot_read_is_named(path):
    export_digits(path)

    def unknown_operator(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.mylib.conv.default"

    alter(path, {"models/model.json": in_json(unknown_operator)})
    failure = refusal(path)
    assert failure.error.code == "pt2_unloadable"
    assert torch.__version__ in failure.error.message


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"[" * 100_000])
def test_broken_json_is_refused(path, content):
    export_digits(path)
    alter(path, {WEIGHTS: lambda _: content})
    assert refusal(path).error.code == "pt2_damaged"
