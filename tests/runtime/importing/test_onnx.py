"""ONNX files: what is read off them, what is refused, and that they run as torch did."""

import contextlib
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from runtime.importing.archive import unpack
from runtime.importing.onnx import preparing
from runtime.importing.onnx.float64 import Float64Evaluator
from runtime.importing.onnx.model import OnnxModel, load_onnx
from runtime.importing.onnx.preparing import Prepared, prepare_onnx
from runtime.importing.onnx.reading import read_onnx
from runtime.importing.onnx.session import OnnxRunError
from runtime.importing.onnx.signature import read_onnx_signature
from runtime.importing.onnx.weights import read_weights
from runtime.importing.program import ImportFailure
from runtime.protocol import BuildHints, InputHint
from runtime.proving.tensor import prove_tensor
from tests.runtime.importing.onnx_files import (
    FLOAT,
    WEIGHT,
    export_bundle,
    export_digits_onnx,
    export_onnx,
    graph,
    linear,
    node,
    save,
    with_external,
)
from tests.runtime.importing.programs import BATCH, Classifier, Digits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Prepared]:
    def save_and_prepare(model: ModelProto, hints: BuildHints = BuildHints()) -> Prepared:  # noqa: B008
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        return prepare_onnx(save(tmp_path / "upload", model), scratch, hints)

    return save_and_prepare


@pytest.fixture
def load(tmp_path: Path) -> Callable[[ModelProto], OnnxModel]:
    return lambda model: load_onnx(save(tmp_path / "upload", model))


def refusal(path: Path) -> ImportFailure:
    with pytest.raises(ImportFailure) as caught:
        load_onnx(path)
    return caught.value


# --- what is read -----------------------------------------------------------------------


def test_a_signature_is_read(load):
    ends = (
        {"ids": (TensorProto.INT64, ["batch", "length"]), "mask": (FLOAT, ["batch", "length"])},
        {"y": (FLOAT, ["batch", "length", 3]), "z": (FLOAT, ["batch", "2*length + 1"])},
    )
    nodes = [
        node("Gather", "table ids", "rows"),
        node("Unsqueeze", "mask last", "wide"),
        node("Mul", "rows wide", "y"),
        node("Concat", "mask mask one", "z", axis=1),
    ]
    weights = {"table": np.ones((7, 3), np.float32), "last": np.array([-1])}
    weights["one"] = np.ones((2, 1), np.float32)
    model = load(graph(nodes, *ends, weights))
    ids, mask = model.signature.inputs
    y, z = model.signature.outputs
    assert ids.axes == mask.axes == y.axes[:2], "a name is one size wherever it is"
    assert z.axes[1] == 2 * ids.axes[1] + 1
    assert model.signature.batch == {ids.axes[0]}
    schema = model.schema
    assert schema.is_batched
    assert [spec.shape for spec in schema.inputs] == [[None, None]] * 2
    assert [(spec.minimum, spec.maximum) for spec in schema.inputs] == [(0, 6), (None, None)]
    assert model.num_parameters == 23
    assert model.state["table"].shape == (7, 3)
    assert model.weight_bytes == 23 * 4 + 8


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.BFLOAT16, "float32"),
        (TensorProto.DOUBLE, "float64"),
        (TensorProto.INT8, "int8"),
        (TensorProto.UINT32, "uint32"),
        (TensorProto.BOOL, "bool"),
    ],
)
def test_every_type_of_number_goes_in_and_out(load, kind, wire):
    model = load(
        graph([node("Identity", "x", "y")], {"x": (kind, ["n", 2])}, {"y": (kind, ["n", 2])})
    )
    assert [spec.dtype for spec in model.schema.inputs + model.schema.outputs] == [wire] * 2
    values = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(getattr(torch, wire))
    (output,) = model.run([values])
    assert output.dtype is values.dtype
    assert torch.equal(output, values)


def test_weights_are_filled_inputs_not_asked_for(load):
    """Files of old keep initializers among the inputs."""
    model = linear()
    model.graph.input.add().CopyFrom(helper.make_tensor_value_info("w", FLOAT, [4, 3]))
    assert [spec.name for spec in load(model).schema.inputs] == ["x"]


def test_digits_equal_the_module(tmp_path):
    model = load_onnx(export_digits_onnx(tmp_path / "digits.onnx"))
    torch.manual_seed(0)
    module, images = Digits().eval(), torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(model.run([images])[0], module(images))
    proof = prove_tensor(model, 32)
    assert (proof.verdict, proof.is_batched, proof.max_rows) == ("equal", True, 32)


def test_errors_are_one_plain_line(load):
    nodes = [node("Reshape", "x shape", "y", name="fold")]
    ends = ({"x": (FLOAT, ["n", 2])}, {"y": (FLOAT, [3, 3])})
    model = load(graph(nodes, *ends, {"shape": np.array([3, 3])}))
    with pytest.raises(OnnxRunError) as caught:
        model.run([torch.zeros(2, 2)])
    message = str(caught.value)
    assert message.startswith("Reshape 'fold': The input tensor cannot be reshaped")
    assert "/" not in message
    assert "\n" not in message


def test_a_graph_that_the_runtime_does_not_take_is_refused(tmp_path):
    model = graph([node("Add", "x x", "y")], *[{n: (TensorProto.BFLOAT16, ["n"])} for n in "xy"])
    failure = refusal(save(tmp_path / "secret-name", model))
    assert failure.error.code == "onnx_unloadable"
    assert "Could not find an implementation for Add" in failure.error.message
    assert str(tmp_path) not in failure.error.message


def test_trees_of_a_table_are_served(prepare):
    """As converters of scikit-learn write them: unnamed axes, and no standard domain."""
    nodes = [
        node(
            *("TreeEnsembleRegressor", "x", "y"),
            domain="ai.onnx.ml",
            n_targets=1,
            nodes_treeids=[0] * 5,
            nodes_nodeids=[*range(5)],
            nodes_featureids=[0, 1, 0, 0, 0],
            nodes_values=[0.5, 0.25, 0.0, 0.0, 0.0],
            nodes_modes=["BRANCH_LEQ", "BRANCH_LEQ", "LEAF", "LEAF", "LEAF"],
            nodes_truenodeids=[1, 2, 0, 0, 0],
            nodes_falsenodeids=[4, 3, 0, 0, 0],
            target_treeids=[0] * 3,
            target_nodeids=[2, 3, 4],
            target_ids=[0] * 3,
            target_weights=[1.5, 2.5, 3.5],
        )
    ]
    table = graph(nodes, {"x": (FLOAT, [None, 2])}, {"y": (FLOAT, [None, 1])})
    del table.opset_import[:]
    table.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    model = load_onnx(prepare(table).path)
    assert model.num_parameters == 8
    rows = torch.tensor([[0.1, 0.1], [0.1, 0.9], [0.9, 0.1]])
    assert model.run([rows])[0].flatten().tolist() == [1.5, 2.5, 3.5]
    proof = prove_tensor(model, 8)
    assert proof.is_batched
    assert all(check.is_equal for check in proof.checks)


# --- what is refused --------------------------------------------------------------------


def training_dropout() -> ModelProto:
    nodes = [node("Dropout", "x ratio mode", "y")]
    weights = {"ratio": np.array(0.5, np.float32), "mode": np.array(True)}
    return graph(nodes, *[{n: (FLOAT, ["n", 4])} for n in "xy"], weights)


def sparse() -> ModelProto:
    model = linear()
    tensor = model.graph.initializer.pop()
    values = numpy_helper.from_array(np.ones(1, np.float32), tensor.name)
    indices = numpy_helper.from_array(np.array([0]), "indices")
    huge = helper.make_sparse_tensor(values, indices, [2**20, 2**20])
    model.graph.sparse_initializer.append(huge)
    return model


def own_operator() -> ModelProto:
    ends = [{name: (FLOAT, ["n"])} for name in "xy"]
    return graph([node("Fold", "x", "y", domain="my.operators")], *ends)


def of_kind(kind: int) -> ModelProto:
    return graph([node("Identity", "x", "y")], *[{name: (kind, ["n"])} for name in "xy"])


def sequence() -> ModelProto:
    model = linear()
    of_maps = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, [3]))
    model.graph.output.append(helper.make_value_info("probabilities", of_maps))
    return model


REFUSED = [
    (training_dropout(), "training_mode", "model.eval()"),
    (sparse(), "onnx_sparse", "densely"),
    (own_operator(), "custom_operators", "my.operators::Fold"),
    (of_kind(TensorProto.STRING), "non_tensor", "Turn texts into numbers"),
    (of_kind(TensorProto.FLOAT8E4M3FN), "non_tensor", "float8e4m3fn"),
    (sequence(), "non_tensor", '"zipmap": False'),
    (graph([], {}, {"w": (FLOAT, [4, 3])}, {"w": WEIGHT}), "no_tensors", "no inputs"),
    (graph([node("Abs", "x", "y")], *[{n: (FLOAT, ["n"])} for n in "xy"], opset=5),
     "onnx_version", "convert_version"),
    (graph([node("Abs", "x", "y")], *[{n: (FLOAT, ["n"])} for n in "xy"], opset=99),
     "onnx_version", "opset_version="),
]  # fmt: skip


@pytest.mark.parametrize(("model", "code", "words"), REFUSED)
def test_refusals_say_what_to_do(tmp_path, model, code, words):
    failure = refusal(save(tmp_path / "upload", model))
    assert failure.error.code == code
    assert words in failure.error.message


def test_operators_that_the_file_defines_itself_are_served(load):
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    function = helper.make_function(
        "own", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], opsets[:1]
    )
    model = graph([node("Twice", "x", "y", domain="own")], *[{n: (FLOAT, ["n"])} for n in "xy"])
    model.functions.append(function)
    model.opset_import.append(opsets[1])
    loaded = load(model)
    assert loaded.run([torch.ones(2)])[0].tolist() == [2.0, 2.0]
    reference = loaded.run_float64([[torch.ones(2)]])
    assert reference is not None
    assert reference[0][0].dtype is torch.float64


@pytest.mark.parametrize("data", [b"", b"\x08\x08", b"not protobuf at all", b"\x08\x08\x12\xff"])
def test_damaged_files_are_refused(tmp_path, data):
    (tmp_path / "upload").write_bytes(data)
    assert refusal(tmp_path / "upload").error.code == "onnx_damaged"


SEEDS = [
    made.SerializeToString() for made in (linear(), linear(1), with_external(linear())[0], sparse())
]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_altered_files_are_read_or_refused(tmp_path, data):
    changed = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        changed = changed or bytearray(b"\x08")
    (tmp_path / "weights.bin").write_bytes(bytes(48))
    (tmp_path / "upload").write_bytes(changed)
    with contextlib.suppress(ImportFailure):  # and nothing else
        model = read_onnx(tmp_path / "upload")
        read_onnx_signature(model)
        read_weights(model, tmp_path)


# --- weights in other files -------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../secret",
        "a/../../secret",
        "..\\secret",
        "C:secret",
        "*/_ORT_MEM_ADDR_/*",
        "_ORT_MEM_ADDR_",
        "",
        ".",
        "a\0b",
        "link",
        "linked/weights.bin",
        "hard",
        "directory",
        "pipe",
    ],
)
def test_locations_outside_the_bundle_are_refused(tmp_path, location):
    bundle = tmp_path / "bundle"
    (bundle / "directory").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path in (
        tmp_path / "secret",
        bundle / "_ORT_MEM_ADDR_",
        tmp_path / "elsewhere/weights.bin",
    ):
        path.write_bytes(bytes(48))
    (bundle / "link").symlink_to(tmp_path / "secret")
    (bundle / "linked").symlink_to(tmp_path / "elsewhere")
    os.link(tmp_path / "secret", bundle / "hard")
    os.mkfifo(bundle / "pipe")
    model, _ = with_external(linear(), location)
    assert refusal(save(bundle / "model.onnx", model)).error.code == "external_data_path"


@pytest.mark.parametrize(
    ("entries", "num_bytes", "code"),
    [
        ({}, None, "external_data_missing"),
        ({}, 47, "external_data_short"),
        ({"offset": 4}, 48, "external_data_short"),
        ({"offset": -4}, 48, "onnx_damaged"),
        ({"length": 40}, 48, "onnx_damaged"),
        ({"offset": "1e3"}, 48, "onnx_damaged"),
        ({"offset": 2**64}, 48, "onnx_damaged"),
    ],
)
def test_tensors_must_lie_inside_their_file(tmp_path, entries, num_bytes, code):
    model, _ = with_external(linear(), **entries)
    if num_bytes is not None:
        (tmp_path / "weights.bin").write_bytes(bytes(num_bytes))
    assert refusal(save(tmp_path / "model.onnx", model)).error.code == code


def test_a_single_file_may_not_name_others(prepare, tmp_path):
    """An upload lies beside those of strangers."""
    model, data = with_external(linear())
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(ImportFailure) as caught:
        prepare(model)
    assert caught.value.error.code == "external_data_missing"


def test_a_bundle_is_loaded_with_its_files_renamed(tmp_path):
    path, data = export_bundle(tmp_path)
    expected = load_onnx(tmp_path / "whole")
    with tarfile.open(tmp_path / "upload", "w") as tar:
        tar.add(path, "m/model.onnx")
        tar.add(data, "m/model.onnx.data")
        tar.add(path, "m/readme")
    (tmp_path / "scratch").mkdir()
    upload = unpack(tmp_path / "upload", tmp_path / "scratch")
    assert upload.kind == "onnx"
    prepared = prepare_onnx(upload.path, tmp_path / "scratch", BuildHints())
    assert prepared.used == {"model.onnx.data"}
    model = load_onnx(prepared.path)
    assert model.locations == [f"{preparing.FILES_DIRECTORY}/0"]
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(model.run([images])[0], expected.run([images])[0])
    assert model.state.keys() == expected.state.keys()
    assert all(torch.equal(model.state[name], value) for name, value in expected.state.items())
    assert model.run_float64([[images]]) is not None


# --- float64 ----------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(6, 5, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class UpAndDown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2)
        self.up = nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)
        self.most = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = nn.functional.gelu(self.up(self.down(x)))
        sizes = [
            nn.functional.interpolate(y, scale_factor=1.5, mode=mode)
            for mode in ("nearest", "bilinear", "bicubic")
        ]
        corners = nn.functional.interpolate(y, size=(5, 9), mode="bilinear", align_corners=True)
        return [self.pool(y), self.most(y), *sizes, corners]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(self.embedding(ids), src_key_padding_mask=mask == 0)
        return hidden.mean(1)


LENGTHS = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=60)}
IDS = torch.arange(18).reshape(2, 9)
MODULES = {
    "digits": (lambda: Digits(), (torch.rand(2, 1, 8, 8),), (BATCH,)),
    "sizes": (lambda: UpAndDown(), (torch.rand(2, 4, 9, 12),), (BATCH,)),
    "lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True), (torch.rand(2, 7, 6),), (BATCH,)),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), (torch.rand(2, 7, 6),), (BATCH,)),
    "encoder": (lambda: Encoder(), (IDS, torch.ones_like(IDS)), (LENGTHS, LENGTHS)),
    "classifier": (lambda: Classifier(), (IDS,), (LENGTHS,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_exported_models_equal_torch_in_float64(tmp_path, name):
    make, inputs, dynamic = MODULES[name]
    torch.manual_seed(0)
    module = make().eval()
    path = export_onnx(tmp_path / "model.onnx", module, *inputs, dynamic=dynamic)
    model = load_onnx(path)
    with torch.inference_mode():
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        expected = torch.utils._pytree.tree_leaves(module.double()(*wide))
    reference = model.run_float64([list(inputs)])
    assert reference is not None
    own = model.run(list(inputs))
    for exact, found, single in zip(expected, reference[0], own, strict=True):
        assert found.dtype is torch.float64
        # What the exporter folds into weights, it has rounded to float32.
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=3e-8)
        torch.testing.assert_close(single, exact.float(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(own[0].double(), reference[0][0]), "it does not round as float32"
    assert model.schema.is_batched
    assert prove_tensor(model, 8).is_batched


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_recurrent_operators_equal_the_runtime(load, operator, is_backward):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    random = np.random.default_rng(0)
    make = lambda *sizes: random.standard_normal(sizes).astype(np.float32)  # noqa: E731
    weights = {"w": make(1, gates * 5, 6), "r": make(1, gates * 5, 5), "b": make(1, gates * 10)}
    weights["h"] = make(1, 2, 5)
    inputs = "x w r b _ h"
    if operator == "LSTM":
        weights |= {"c": make(1, 2, 5), "p": make(1, 15)}
        inputs += " c p"
    nodes = [
        node(
            *(operator, inputs, "y last"),
            hidden_size=5,
            direction="reverse" if is_backward else "forward",
        )
    ]
    ends = ({"x": (FLOAT, [7, 2, 6])}, {"y": (FLOAT, [7, 1, 2, 5]), "last": (FLOAT, [1, 2, 5])})
    model = load(graph(nodes, *ends, weights))
    x = torch.from_numpy(make(7, 2, 6))
    reference = model.run_float64([[x]])
    assert reference is not None
    for found, exact in zip(model.run([x]), reference[0], strict=True):
        torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)


def test_floats_that_the_graph_names_are_widened(load):
    """Casts, constants as numbers, filled shapes, normalisation of an old opset."""
    third = float(np.float32(1 / 3))
    nodes = [
        node("Cast", "i", "f", to=FLOAT),
        node("Constant", "", "third", value_float=third),
        node("Mul", "f third", "product"),
        node("Shape", "product", "shape"),
        node("ConstantOfShape", "shape", "zeros"),
        node("Add", "product zeros", "sum"),
        node("BatchNormalization", "sum s b m v", "y", epsilon=0.0),
    ]
    values = {"s": 3, "b": 1, "m": 0, "v": 1}
    weights = {name: np.full(2, value, np.float32) for name, value in values.items()}
    ends = ({"i": (TensorProto.INT64, ["n", 2])}, {"y": (FLOAT, ["n", 2])})
    model = load(graph(nodes, *ends, weights, opset=13))
    given = torch.tensor([[1, 7], [100, 3]])
    reference = model.run_float64([[given]])
    assert reference is not None
    torch.testing.assert_close(reference[0][0], given.double() * third * 3 + 1, rtol=1e-14, atol=0)


def test_an_evaluation_without_end_is_given_up(tmp_path):
    body = helper.make_graph(
        [node("Identity", "go", "again"), node("Add", "state state", "next")],
        "body",
        [
            helper.make_tensor_value_info("at", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )
    nodes = [node("Loop", "_ forever x", "y", body=body)]
    ends = [{name: (FLOAT, ["n"])} for name in "xy"]
    path = save(tmp_path / "upload", graph(nodes, *ends, {"forever": np.array(True)}))
    evaluator = Float64Evaluator(path, limit_seconds=0.2)
    assert evaluator.run(["y"], [{"x": torch.ones(1)}]) is None
    before = time.monotonic()
    assert evaluator.run(["y"], [{"x": torch.ones(1)}]) is None
    assert time.monotonic() - before < 0.1, "it is not tried again"


def test_operators_without_a_float64_form_leave_the_floor(load):
    nodes = [node("Gelu", "x", "y", domain="com.microsoft")]
    model = graph(nodes, *[{name: (FLOAT, ["n", 2])} for name in "xy"])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    loaded = load(model)
    assert loaded.run([torch.ones(1, 2)])[0].shape == (1, 2)
    assert loaded.run_float64([[torch.ones(1, 2)]]) is None
    assert prove_tensor(loaded, 8).is_batched


# --- shapes and the batch ---------------------------------------------------------------


def test_a_batch_of_one_is_made_dynamic(prepare):
    prepared = prepare(linear(1))
    assert not load_onnx(prepared.path).schema.is_batched
    assert prepared.batched is not None
    model = load_onnx(prepared.batched)
    assert prove_tensor(model, 16).is_batched
    x = torch.rand(3, 4)
    torch.testing.assert_close(model.run([x])[0], x @ torch.from_numpy(WEIGHT))


@pytest.mark.parametrize("allows_zero", [0, 1])
def test_shapes_written_as_constants_are_freed(prepare, allows_zero):
    nodes = [
        node("Reshape", "x shape", "flat", allowzero=allows_zero),
        node("MatMul", "flat w", "y"),
    ]
    ends = ({"x": (FLOAT, [1, 2, 2])}, {"y": (FLOAT, [1, 3])})
    prepared = prepare(graph(nodes, *ends, {"w": WEIGHT, "shape": np.array([1, 4])}))
    assert prepared.batched is not None
    assert prove_tensor(load_onnx(prepared.batched), 16).is_batched


@pytest.mark.parametrize(
    "model",
    [
        linear(8),
        graph(
            [node("Reshape", "x shape", "y")],
            *({"x": (FLOAT, [1, 4])}, {"y": (FLOAT, [1, 2, 2])}),
            {"shape": np.array([2, 2])},
        ),
        graph(
            [node("ReduceSum", "x", "y", keepdims=0)],
            *({"x": (FLOAT, [1, 4])}, {"y": (FLOAT, [])}),
        ),
    ],
    ids=["of 8", "reshaped", "summed"],
)
def test_other_fixed_batches_stay(prepare, model):
    prepared = prepare(model)
    assert prepared.batched is None


def test_rows_that_mix_are_found_by_the_proof(prepare):
    nodes = [node("ReduceSum", "x axis", "sum"), node("Sub", "x sum", "y")]
    ends = [{name: (FLOAT, [1, 4])} for name in "xy"]
    prepared = prepare(graph(nodes, *ends, {"axis": np.array([0])}))
    assert prepared.batched is not None
    assert not prove_tensor(load_onnx(prepared.batched), 16).is_batched
    model = load_onnx(prepared.path)
    assert "export with a dynamic first axis" in model.notes[0]
    assert 'dynamic_shapes={"x": {0: batch}}' in model.notes[0]


@pytest.mark.parametrize("rows", [None, -1, 0, "other"])
@pytest.mark.parametrize("batch", [None, -1, 0, "n"])
def test_unnamed_first_axes_may_be_the_batch(prepare, batch, rows):
    model = load_onnx(prepare(linear(batch, rows)).path)
    assert model.schema.is_batched == (rows != "other")
    if rows != "other":
        assert prove_tensor(model, 8).is_batched


def test_missing_shapes_are_found_or_asked_for(prepare):
    model = linear()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    loaded = load_onnx(prepare(model).path)
    assert (loaded.schema.is_batched, loaded.schema.outputs[0].shape) == (True, [None, 3])
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ImportFailure) as caught:
        prepare(model)
    assert (caught.value.error.code, caught.value.error.param) == ("no_shape", "inputs")
    hint = InputHint(name="x", dtype="float32", axes=["batch", 4])
    loaded = load_onnx(prepare(model, BuildHints(inputs=[hint])).path)
    assert (loaded.schema.is_batched, loaded.schema.inputs[0].shape) == (True, [None, 4])


def test_the_file_itself_is_used_where_nothing_is_amiss(prepare, tmp_path):
    assert prepare(linear()) == Prepared(tmp_path / "upload", None, set())


def test_limits_are_those_of_the_library():
    from app.registry.onnx import MAX_IR_VERSION, MAX_OPSET, MIN_OPSET
    from runtime.importing.onnx.reading import MIN_OPSET as MIN_OPSET_OF_BUILD

    assert (onnx.defs.onnx_opset_version(), onnx.IR_VERSION) == (MAX_OPSET, MAX_IR_VERSION)
    assert MIN_OPSET == MIN_OPSET_OF_BUILD


def test_graphs_nested_without_end_are_refused(tmp_path):
    inner = graph([node("Identity", "x", "y")], {}, {"y": (FLOAT, [1])}).graph
    for _ in range(20):
        made = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([made], "g", [], [helper.make_tensor_value_info("y", FLOAT, [1])])
        if inner.ByteSize() > 100_000:
            break
        del inner.node[0].attribute[1]
    model = linear()
    model.graph.node.extend(inner.node)
    with pytest.raises(ImportFailure):
        read_onnx(save(tmp_path / "upload", model))
