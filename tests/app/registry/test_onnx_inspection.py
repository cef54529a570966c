"""ONNX files by their headers: what is accepted and refused, and that no bytes can do harm."""

import contextlib
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.errors import Unprocessable
from app.registry import onnx as onnx_files
from app.registry import protobuf
from app.registry.inspection import Inspection, inspect_upload
from app.registry.torchscript import is_torchscript
from tests.app.registry.archive_files import (
    model_files,
    pt2_files,
    write_deflated_zip,
    write_gz,
    write_pt2,
    write_tar,
    write_zip,
)

EXTERNAL = {"location": "weights.bin", "offset": "0", "length": "48"}


def refusal(path: Path) -> Unprocessable:
    with pytest.raises(Unprocessable) as caught:
        inspect_upload(path, path.name)
    return caught.value


# --- a writer of the wire format --------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(
    name: str = "w",
    dims: tuple[int, ...] = (4, 3),
    kind: int = 1,
    raw: bytes | None = bytes(48),
    external: dict[str, str] | None = None,
) -> bytes:
    data = b"".join(field(1, size) for size in dims) + field(2, kind) + field(8, name)
    if external is not None:
        entries = (field(1, key) + field(2, value) for key, value in external.items())
        return data + b"".join(field(13, entry) for entry in entries) + field(14, 1)
    return data + (field(9, raw) if raw is not None else b"")


def value(name: str, kind: bytes | None = None) -> bytes:
    """A named input or output, by default a float tensor."""
    return field(1, name) + field(2, field(1, field(1, 1)) if kind is None else kind)


def node(operator: str = "MatMul", domain: str = "", *attributes: bytes) -> bytes:
    found = b"".join(field(5, attribute) for attribute in attributes)
    return field(4, operator) + field(7, domain) + found


def graph(
    *more: bytes,
    nodes: tuple[bytes, ...] = (),
    weights: tuple[bytes, ...] = (),
    inputs: tuple[bytes, ...] = (value("x"),),
    outputs: tuple[bytes, ...] = (value("y"),),
) -> bytes:
    parts = [field(1, each) for each in nodes or (node(),)]
    parts += [field(5, each) for each in weights or (tensor(),)]
    parts += [field(11, each) for each in inputs] + [field(12, each) for each in outputs]
    return b"".join([*parts, *more])


def model(made: bytes | None = None, *more: bytes, opset: int = 18, ir_version: int = 10) -> bytes:
    opsets = field(8, field(1, "") + field(2, opset))
    made = graph() if made is None else made
    return field(1, ir_version) + field(2, "test") + field(7, made) + opsets + b"".join(more)


EXTERNAL_MODEL = model(graph(weights=(tensor(external=EXTERNAL),)))


# --- accepted ---------------------------------------------------------------------------


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(model())
    inspection = inspect_upload(tmp_path / "upload", "upload")
    assert inspection == Inspection(kind="onnx", num_members=1, unpacked_bytes=len(model()))


def test_a_real_file_of_every_kind_of_field(tmp_path: Path) -> None:
    from tests.runtime.importing.onnx_files import export_bundle

    path, data = export_bundle(tmp_path)
    assert inspect_upload(tmp_path / "whole", "whole").kind == "onnx"
    assert refusal(path).code == "external_data_missing"
    files = {"model.onnx": path.read_bytes(), "model.onnx.data": data.read_bytes()}
    assert inspect_upload(write_tar(tmp_path / "tar", files), "tar").kind == "onnx"
    files["model.onnx.data"] = files["model.onnx.data"][:-1]
    assert refusal(write_tar(tmp_path / "tar", files)).code == "external_data_short"


@pytest.mark.parametrize("write", [write_tar, write_zip, write_gz, write_deflated_zip])
@pytest.mark.parametrize("name", ["model.onnx", "network"])
def test_a_bundle(tmp_path: Path, write: Callable[..., Path], name: str) -> None:
    files = {name: EXTERNAL_MODEL, "weights.bin": bytes(48), "examples.npz": b"PK\x03\x04"}
    path = write(tmp_path / "upload", files | {"tokenizer/tokenizer.json": b"{}"})
    inspection = inspect_upload(path, "upload")
    assert inspection.kind == "onnx"
    is_compressed = write in (write_gz, write_deflated_zip)
    assert any("looked into by the build" in note for note in inspection.notes) == is_compressed


def test_a_bundle_in_a_directory(tmp_path: Path) -> None:
    files = {"model.onnx": EXTERNAL_MODEL, "weights.bin": bytes(48)}
    path = write_tar(tmp_path / "upload", files, "exports/mine/")
    assert inspect_upload(path, "upload").kind == "onnx"


def test_weights_come_before_an_onnx_file_beside_them(tmp_path: Path) -> None:
    files = model_files() | {"model.onnx": b"whatever", "onnx/model.onnx": b"whatever"}
    assert inspect_upload(write_tar(tmp_path / "a", files), "a").kind == "huggingface"
    files.pop("model.safetensors")
    files["model.onnx"] = model()
    assert inspect_upload(write_tar(tmp_path / "b", files), "b").kind == "onnx"


def test_torchscript(tmp_path: Path) -> None:
    names = ["m/data.pkl", "m/code/__torch__.py", "m/constants.pkl", "m/version"]
    files = dict.fromkeys(names, b"x")
    script = write_zip(tmp_path / "script", files)
    assert inspect_upload(script, "script").kind == "torchscript"
    bundle = {"model.pt": script.read_bytes(), "examples.npz": b""}
    for write in (write_tar, write_gz):
        path = write(tmp_path / "bundle", bundle)
        assert inspect_upload(path, "bundle").kind == "torchscript"
    native = write_zip(tmp_path / "native", files | {"m/extra/kernel.so": b"x"})
    assert refusal(native).code == "native_code"


class CountedName(str):
    """Counts how often a name is looked at."""

    num_looks = 0

    def startswith(self, *arguments: Any) -> bool:
        CountedName.num_looks += 1
        return super().startswith(*arguments)

    def endswith(self, *arguments: Any) -> bool:
        CountedName.num_looks += 1
        return super().endswith(*arguments)

    def partition(self, separator: str, /) -> tuple[str, str, str]:
        CountedName.num_looks += 1
        return super().partition(separator)


def test_telling_torchscript_costs_a_few_looks_at_each_name() -> None:
    names = [CountedName(f"{number}/data.pkl") for number in range(200)]
    assert not is_torchscript(list(names))
    assert CountedName.num_looks <= 5 * len(names)
    assert is_torchscript([*names, "7/code/__torch__.py"])
    assert not is_torchscript([*names, "7/codes/__torch__.py", "x/code/__torch__.py"])


def test_a_pickle_in_an_archive_gets_its_own_lines(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    path = write_tar(tmp_path / "tar", {"model.pt": (tmp_path / "model.pt").read_bytes()})
    error = refusal(path)
    assert error.code == "pickled_module"
    assert "torch.export.save" in error.message


def test_trees_with_long_lists_are_stepped_over(tmp_path: Path) -> None:
    numbers = b"".join(field(8, at) for at in range(300_000))
    trees = node("TreeEnsembleRegressor", "ai.onnx.ml", *[field(1, "a") + numbers] * 10)
    (tmp_path / "upload").write_bytes(model(graph(nodes=(trees,))))
    assert inspect_upload(tmp_path / "upload", "upload").kind == "onnx"


# --- refused ----------------------------------------------------------------------------


def subgraph(depth: int) -> bytes:
    made = graph()
    for _ in range(depth):
        made = graph(nodes=(node("If", "", field(1, "then_branch") + field(6, made)),))
    return made


REFUSED = {
    "opset too new": (model(opset=99), "onnx_version", "opset_version="),
    "opset too old": (model(opset=3), "onnx_version", "convert_version"),
    "ir too new": (model(ir_version=31), "onnx_version", "older"),
    "own operator": (model(graph(nodes=(node("Fold", "mine"),))), "custom_operators", "mine::Fold"),
    "extensions": (
        model(graph(nodes=(node("BpeTokenizer", "ai.onnx.contrib"),))),
        "custom_operators", "ai.onnx.contrib::BpeTokenizer",
    ),
    "context of a device": (
        model(graph(nodes=(node("EPContext", "com.microsoft"),))), "custom_operators", "EPContext",
    ),
    "operator in a branch": (
        model(graph(nodes=(node("If", "", field(6, graph(nodes=(node("Fold", "mine"),)))),))),
        "custom_operators", "mine::Fold",
    ),
    "text": (
        model(graph(inputs=(value("x", field(1, field(1, 8))),))), "non_tensor", "outside",
    ),
    "sequence": (model(graph(outputs=(value("y", field(4, b"")),))), "non_tensor", "zipmap"),
    "no inputs": (model(graph(inputs=(value("w"),))), "no_tensors", "no inputs"),
    "sparse": (model(graph(field(15, b""))), "onnx_sparse", "densely"),
    "sparse constant": (
        model(graph(nodes=(node("Constant", "", field(22, b"")),))), "onnx_sparse", "densely",
    ),
    "training": (model(None, field(20, b"")), "training_mode", "model.eval()"),
    "weights missing": (EXTERNAL_MODEL, "external_data_missing", "tar -cf model.tar"),
    "no graph": (field(1, 10) + field(2, "test"), "onnx_damaged", "no graph"),
    "wrong size": (model(graph(weights=(tensor(raw=bytes(47)),))), "onnx_damaged", "shape"),
    "unknown type": (model(graph(weights=(tensor(kind=99),))), "onnx_damaged", "unknown type"),
    "negative size": (
        model(graph(weights=(tensor(dims=(2**64 - 1,), raw=b""),))), "onnx_damaged", "shape",
    ),
    "not UTF-8": (model(graph(nodes=(field(4, b"\x80atMul"),))), "onnx_damaged", "UTF-8"),
    "nested": (model(subgraph(40)), "onnx_damaged", "deeply"),
    "cut": (model()[:-9], "onnx_damaged", "cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_do(tmp_path: Path, name: str) -> None:
    data, code, words = REFUSED[name]
    (tmp_path / "upload").write_bytes(data)
    error = refusal(tmp_path / "upload")
    assert (error.code, words in error.message) == (code, True), error.message
    path = write_tar(tmp_path / "tar", {"model.onnx": data})
    assert refusal(path).code == code, "and so in an archive"


def test_operators_that_the_file_defines_are_accepted(tmp_path: Path) -> None:
    function = field(1, "Fold") + field(7, node("Abs")) + field(10, "mine")
    data = model(graph(nodes=(node("Fold", "mine"),)), field(25, function))
    (tmp_path / "upload").write_bytes(data)
    assert inspect_upload(tmp_path / "upload", "upload").kind == "onnx"


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../weights.bin", "a/../../b", "a\\b", "C:b", "a\0b", "", ".", "a\nb",
     "*/_ORT_MEM_ADDR_/*", "_ORT_MEM_ADDR_", "x" * 300],
)  # fmt: skip
def test_weights_outside_the_upload(tmp_path: Path, location: str) -> None:
    made = graph(weights=(tensor(external=EXTERNAL | {"location": location}),))
    path = write_tar(tmp_path / "tar", {"model.onnx": model(made), "weights.bin": bytes(48)})
    assert refusal(path).code == "external_data_path"


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ({"offset": "1"}, "external_data_short"),
        ({"offset": "-1"}, "onnx_damaged"),
        ({"offset": "9" * 30}, "onnx_damaged"),
        ({"length": "47"}, "onnx_damaged"),
        ({"length": "1e1"}, "onnx_damaged"),
        ({"location": "other.bin"}, "external_data_missing"),
    ],
)
def test_weights_that_do_not_lie_in_their_file(
    tmp_path: Path, entries: dict[str, str], code: str
) -> None:
    made = model(graph(weights=(tensor(external=EXTERNAL | entries),)))
    path = write_tar(tmp_path / "tar", {"model.onnx": made, "weights.bin": bytes(48)})
    assert refusal(path).code == code


def test_weights_inside_nodes_are_found(tmp_path: Path) -> None:
    hidden = field(5, tensor(external=EXTERNAL | {"location": "/etc/passwd"}))
    made = graph(nodes=(node("If", "", field(6, graph(nodes=(node("Constant", "", hidden),)))),))
    (tmp_path / "upload").write_bytes(model(made))
    assert refusal(tmp_path / "upload").code == "external_data_path"


@pytest.mark.parametrize(
    "files",
    [
        {"encoder.onnx": model(), "decoder.onnx": model()},
        {"model.onnx": model(), "model.pt2": b""},
        {"a": model(), "b": model()},
        {f"{at}.dat": b"PK\x03\x04" for at in range(20)},
    ],
)
def test_several_programs(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert refusal(write_tar(tmp_path / "tar", files)).code == "several_programs"


# --- no harm ----------------------------------------------------------------------------


def peak_bytes(path: Path) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(Unprocessable):
            inspect_upload(path, "hostile")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["fields", "names", "tensors", "dims", "texts", "opsets"])
def test_headers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each kind of header, more than there may be of it; the limits are brought down so that the
    test is quick."""
    monkeypatch.setattr(protobuf, "MAX_FIELDS", 20_000)
    monkeypatch.setattr(protobuf, "MAX_HEADER_BYTES", 200_000)
    hostile = {
        "fields": field(1, 10) * 30_000,
        "names": model(graph(*[field(1, node("A" * 50 + str(at))) for at in range(10_000)])),
        "tensors": model(graph(*[field(5, tensor(raw=None))] * 10_000)),
        "dims": model(graph(weights=(tensor(dims=(1,) * 30_000),))),
        "texts": model(graph(nodes=(node("A" * 300_000),))),
        "opsets": model(None, *[field(8, field(1, str(at))) for at in range(30_000)]),
    }[name]
    path = tmp_path / "upload"
    path.write_bytes(field(1, 10) + field(2, "x") + hostile)
    assert peak_bytes(path) < 8 * 1024**2
    assert refusal(path).code == "onnx_damaged"


def test_a_gigabyte_of_weights_is_stepped_over(tmp_path: Path) -> None:
    size = 2**28
    head = field(1, size) + field(2, 1) + field(8, "w")
    raw = varint(9 << 3 | 2) + varint(4 * size)
    whole = varint(5 << 3 | 2) + varint(len(head) + len(raw) + 4 * size) + head + raw
    rest = graph(nodes=(node(),))
    path = tmp_path / "upload"
    with path.open("wb") as file:
        file.write(field(1, 10) + field(2, "x") + varint(7 << 3 | 2))
        file.write(varint(len(rest) + len(whole) + 4 * size) + rest + whole)
        file.seek(4 * size, 1)
        file.write(field(8, field(2, 18)))
    tracemalloc.start()
    try:
        assert inspect_upload(path, "large").kind == "onnx"
        assert tracemalloc.get_traced_memory()[1] < 1024**2
    finally:
        tracemalloc.stop()


SEEDS = [model(), EXTERNAL_MODEL, model(subgraph(4)), model(None, field(25, field(7, node())))]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.integers(0, 3)):
            case 0:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at : at + draw(st.integers(1, 20))]
            case 2:
                data[at:at] = draw(st.binary(min_size=1, max_size=12))
            case _:
                data[at:at] = data[draw(st.integers(0, len(data) - 1)) :][:50]
        data = data or bytearray(b"\x08")
    return bytes(data)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.one_of(
        mutated(),
        st.binary(max_size=400).map(lambda data: b"\x08\x0a\x12" + data),
        st.binary(max_size=400).map(lambda data: b"\x08\x0a" + field(7, data)),
    )
)
def test_any_bytes_are_accepted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed-onnx"
    path.write_bytes(data)
    before = time.process_time()
    with contextlib.suppress(Unprocessable):  # and nothing else
        assert inspect_upload(path, "fuzzed").kind in ("onnx", "huggingface")
    assert time.process_time() - before < 5


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=mutated())
def test_what_passes_here_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """The two readers see the same places of weights and the same operators."""
    onnx = pytest.importorskip("onnx")
    from google.protobuf.message import DecodeError

    path = tmp_path_factory.getbasetemp() / "read-twice"
    path.write_bytes(data)
    with path.open("rb") as file:
        try:
            header = onnx_files.check_onnx(file, 0, len(data))
        except Unprocessable:
            return
    parsed = onnx.ModelProto()
    try:
        parsed.ParseFromString(data)
    except DecodeError:
        return  # names that are not UTF-8, say
    found = {
        entry.value
        for each in parsed.graph.initializer
        for entry in each.external_data
        if entry.key == "location"
    }
    assert found <= header.external.keys()
    assert {(each.domain, each.op_type) for each in parsed.graph.node} <= header.operators


def test_varints_without_end_and_groups(tmp_path: Path) -> None:
    for tail in (b"\x80" * 20, b"\x0b", b"\x07", struct.pack("<Q", 2**63)):
        (tmp_path / "upload").write_bytes(field(1, 10) + field(2, "x") + tail)
        assert refusal(tmp_path / "upload").code == "onnx_damaged"


def test_a_program_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    assert refusal(write_tar(tmp_path / "tar", {"a.onnx": b"text"})).code == "unknown_format"
    pt2 = write_pt2(tmp_path / "pt2", pt2_files())
    named = write_tar(tmp_path / "named", {"a.onnx": pt2.read_bytes()})
    assert inspect_upload(named, "named").kind == "pt2", "by content, whatever the name"
