"""What is accepted, what is refused, and that no header can cost much time or memory."""

import contextlib
import json
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.errors import Unprocessable
from app.registry import tars
from app.registry.inspection import Inspection, inspect_upload
from tests.app.registry.archive_files import (
    model_files,
    pt2_files,
    safetensors,
    write_deflated_zip,
    write_gz,
    write_pt2,
    write_tar,
    write_zip,
)


def refusal(path: Path) -> Unprocessable:
    with pytest.raises(Unprocessable) as caught:
        inspect_upload(path, path.name)
    return caught.value


# --- accepted ---------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_tar, write_zip, write_deflated_zip, write_gz])
def test_huggingface_archive(tmp_path: Path, write: Callable[..., Path]) -> None:
    files = model_files()
    inspection = inspect_upload(write(tmp_path / "model", files), "model")
    assert inspection == Inspection(
        kind="huggingface",
        num_members=3,
        unpacked_bytes=sum(map(len, files.values())),
        notes=[],
    )


def test_sentence_transformers_archives(tmp_path: Path) -> None:
    layout = {"modules.json": b"[]", "1_Pooling/config.json": b"{}"}
    path = write_tar(tmp_path / "new", model_files() | layout)
    assert inspect_upload(path, "model").notes == []
    old = {f"0_Transformer/{name}": content for name, content in model_files().items()}
    path = write_tar(tmp_path / "old", old | layout)
    assert inspect_upload(path, "model").kind == "huggingface"
    del old["0_Transformer/model.safetensors"]
    assert refusal(write_tar(tmp_path / "none", old | layout)).code == "no_safetensors"
    code = layout | {"1_Pooling/pooling.py": b"raise SystemExit"}
    assert refusal(write_tar(tmp_path / "code", model_files() | code)).code == "remote_code"


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_directory_inside_the_archive(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / "model", model_files(), "exports/my-model/")
    assert inspect_upload(path, "model").kind == "huggingface"


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_in_every_tar_dialect(tmp_path: Path, kind: int) -> None:
    files = model_files() | {f"{'d' * 90}/{'n' * 90}.json": b"{}"}
    if kind != tarfile.USTAR_FORMAT:
        files["été/" + "x" * 150 + ".txt"] = b"text"
    path = write_tar(tmp_path / "model.tar", files, kind=kind)
    assert inspect_upload(path, "model.tar").num_members == len(files)


def test_tar_written_by_the_command_line(tmp_path: Path) -> None:
    from app.cli.packing import pack

    directory = tmp_path / "model"
    directory.mkdir()
    for name, content in model_files().items():
        (directory / name).write_bytes(content)
    parcel = pack(directory, None)
    path = tmp_path / "model.tar"
    path.write_bytes(parcel.read(0, parcel.num_bytes))
    assert inspect_upload(path, path.name).kind == "huggingface"


def test_program(tmp_path: Path) -> None:
    inspection = inspect_upload(write_pt2(tmp_path / "model.pt2"), "model.pt2")
    assert inspection.kind == "pt2"
    assert inspection.num_members == 4


@pytest.mark.parametrize("write", [write_tar, write_gz])
def test_program_with_a_tokenizer_beside_it(tmp_path: Path, write: Callable[..., Path]) -> None:
    program = write_pt2(tmp_path / "model.pt2").read_bytes()
    path = write(tmp_path / "a", {"model.pt2": program, "tokenizer/tokenizer.json": b"{}"})
    assert inspect_upload(path, "a").kind == "pt2"


def test_real_exported_program(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    program = torch.export.export(torch.nn.Linear(4, 2), (torch.randn(2, 4),))
    torch.export.save(program, tmp_path / "model.pt2")
    assert inspect_upload(tmp_path / "model.pt2", "model.pt2").kind == "pt2"


def test_a_model_of_images_needs_no_tokenizer(tmp_path: Path) -> None:
    files = model_files(tokenizer__json=None, preprocessor_config__json=b"{}")
    assert inspect_upload(write_tar(tmp_path / "m.tar", files), "m.tar").notes == []


def test_missing_tokenizer_and_stray_pickle_are_only_noted(tmp_path: Path) -> None:
    files = model_files(tokenizer__json=None, training_args__bin=pickle.dumps({"a": 1}))
    notes = inspect_upload(write_tar(tmp_path / "m.tar", files), "m.tar").notes
    assert any("no tokenizer" in note for note in notes)
    assert any("training_args.bin" in note for note in notes)


def test_large_compressed_archive_is_judged_by_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gz(tmp_path / "m.tar.gz", model_files() | {"z.bin": bytes(range(256)) * 400})
    monkeypatch.setattr(tars, "MAX_GZIP_BYTES", 8 * 1024)
    inspection = inspect_upload(path, "m.tar.gz")
    assert inspection.kind == "huggingface"
    assert "its end" in inspection.notes[-1]


# --- refused by what it is --------------------------------------------------------------


class Module:
    """Stands for a class of the user's own."""


def test_torch_files(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 2)
    cases: list[tuple[object, bool, str]] = [
        (module, True, "pickled_module"),
        (module, False, "pickled_module"),
        (module.state_dict(), True, "state_dict"),
        (module.state_dict(), False, "state_dict"),
    ]
    for number, (value, is_zip, code) in enumerate(cases):
        path = tmp_path / f"{number}.pt"
        torch.save(value, path, _use_new_zipfile_serialization=is_zip)
        error = refusal(path)
        assert error.code == code, (value, is_zip)
        assert "torch.export.save" in error.message


def test_bare_pickles(tmp_path: Path) -> None:
    for protocol in (2, 4, 5):
        path = tmp_path / f"model{protocol}.pkl"
        path.write_bytes(pickle.dumps(OrderedDict(module=Module()), protocol))
        error = refusal(path)
        assert error.code == "pickled_module"
        assert "Module" in error.message


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["m/.data/extern_modules", "m/model.pkl"], "torch_package"),
        (["serialized_exported_program.json", "version"], "old_export"),
    ],
)
def test_torch_zips_that_are_not_programs(tmp_path: Path, names: list[str], code: str) -> None:
    path = write_zip(tmp_path / "m.pt", dict.fromkeys(names, b"x"))
    error = refusal(path)
    assert error.code == code
    assert "torch.export.save" in error.message


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty"),
        (safetensors(), "bare_safetensors"),
        (b"\x7fELF\x02\x01\x01" + bytes(100), "native_code"),
        (b"GGUF" + bytes(100), "gguf"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:" + bytes(40), "onnx_damaged"),
        (b"\xfd7zXZ\x00" + bytes(40), "compression"),
        (b"\x28\xb5\x2f\xfd" + bytes(40), "compression"),
        (b"just some text", "unknown_format"),
        (b"\x80\x02", "state_dict"),
        (b"\x08", "unknown_format"),
        (b"\x1f\x8b", "archive_damaged"),
        (b"PK\x03\x04" + bytes(40), "archive_damaged"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "upload"
    path.write_bytes(content)
    assert refusal(path).code == code


def test_a_single_compressed_file(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "model.pt2.gz"
    path.write_bytes(gzip.compress(write_pt2(tmp_path / "m.pt2").read_bytes()))
    assert refusal(path).code == "compression"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"config__json": None}, "unknown_contents"),
        ({"model__safetensors": None, "pytorch_model__bin": b"x"}, "no_safetensors"),
        ({"modeling_own__py": b"import os"}, "remote_code"),
        ({"config__json": b'{"auto_map": {"AutoConfig": "a.B"}}'}, "remote_code"),
        ({"tokenizer_config__json": b'{"auto_map": {}}'}, "remote_code"),
        ({"config__json": b"{"}, "invalid_json"),
        ({"config__json": b'{"a":' + b"[" * 100_000}, "invalid_json"),
        ({"config__json": b" " * (2 * 1024**2)}, "config_too_large"),
        ({"adapter_config__json": b"{}"}, "adapter"),
        ({"kernel__so": b"x"}, "native_code"),
        ({"weights__dat": b"\x7fELF" + bytes(60)}, "native_code"),
        ({"model__safetensors__index__json": b'{"weight_map": {"a": "gone.safetensors"}}'},
         "weights_missing"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_directories(
    tmp_path: Path, write: Callable[..., Path], changes: dict[str, bytes | None], code: str
) -> None:
    assert refusal(write(tmp_path / "m", model_files(**changes))).code == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"data__aotinductor__model.so": b"x"}, "native_code"),
        ({"models__model.json": None}, "pt2_models"),
        ({"models__other.json": b"{}"}, "pt2_models"),
        ({"data__weights__w.pt": b"x"}, "pickled_weights"),
        ({"data__constants__custom_obj_0": b"x"}, "custom_objects"),
        ({"data__constants__model_constants_config.json": b"[]"}, "archive_damaged"),
        (
            {"data__weights__model_weights_config.json": json.dumps(
                {"config": {"w": {"path_name": "weight_0", "use_pickle": True}}}).encode()},
            "pickled_weights",
        ),
        (
            {"data__weights__model_weights_config.json": json.dumps(
                {"config": {"w": {"path_name": "../x", "use_pickle": False}}}).encode()},
            "custom_objects",
        ),
    ],
)  # fmt: skip
def test_programs(tmp_path: Path, changes: dict[str, bytes | None], code: str) -> None:
    path = write_pt2(tmp_path / "model.pt2", pt2_files(**changes))
    assert refusal(path).code == code
    nested = write_tar(tmp_path / "m.tar", {"model.pt2": path.read_bytes()})
    assert refusal(nested).code == code


def test_compressed_program(tmp_path: Path) -> None:
    path = write_deflated_zip(tmp_path / "model.pt2", pt2_files(), "model/")
    assert refusal(path).code == "pt2_compressed"


# --- refused as an archive --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "C:x", "d/" * 20 + "x"]
)
@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_names_that_lead_outside(tmp_path: Path, write: Callable[..., Path], name: str) -> None:
    assert refusal(write(tmp_path / "m", model_files() | {name: b"x"})).code == "archive_path"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, b"S"])
def test_links_and_devices_in_a_tar(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "m.tar"
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("config.json")
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    assert refusal(path).code == "archive_link"


def test_link_in_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("config.json")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    assert refusal(path).code == "archive_link"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", ["tar", "zip", "pt2"])
def test_the_same_name_twice(tmp_path: Path, form: str) -> None:
    path = tmp_path / "m"
    if form == "tar":
        with tarfile.open(path, "w") as archive:
            for name in ("a", "./a"):
                archive.addfile(tarfile.TarInfo(name))
    else:
        files = pt2_files() if form == "pt2" else {"a": b""}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in [*files.items(), *files.items()]:
                archive.writestr(f"m/{name}", content)
    assert refusal(path).code == "archive_duplicate"


def test_bombs(tmp_path: Path) -> None:
    files = {"config.json": bytes(64 * 1024**2)}
    assert refusal(write_deflated_zip(tmp_path / "bomb.zip", files)).code == "archive_ratio"
    assert refusal(write_gz(tmp_path / "bomb.tar.gz", files)).code == "archive_ratio"


def test_too_many_members(tmp_path: Path) -> None:
    files = {f"{number}.txt": b"" for number in range(20_001)}
    assert refusal(write_tar(tmp_path / "m.tar", files)).code == "archive_members"
    assert refusal(write_zip(tmp_path / "m.zip", files)).code == "archive_members"


def _zip_with(path: Path, edit: Callable[[bytearray], None]) -> Path:
    write_zip(path, {"a.txt": b"a" * 50, "b.txt": b"b" * 50})
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)
    return path


def test_overlapping_members(tmp_path: Path) -> None:
    def edit(data: bytearray) -> None:
        second = data.rindex(b"PK\x01\x02")
        data[second + 42 : second + 46] = struct.pack("<I", 0)  # both at the first one's place

    error = refusal(_zip_with(tmp_path / "m.zip", edit))
    assert (error.code, "overlap" in error.message) == ("archive_damaged", True)


def test_sizes_that_contradict_each_other(tmp_path: Path) -> None:
    def edit(data: bytearray) -> None:
        first = data.index(b"PK\x01\x02")
        data[first + 24 : first + 28] = struct.pack("<I", 10)

    assert refusal(_zip_with(tmp_path / "m.zip", edit)).code == "archive_damaged"


def test_zip_directory_of_a_claimed_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.zip"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(1024**3)
        file.seek(1024**3)
        size = 1024**3 - 100
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, size, 100, 0))
    assert peak_bytes(path) < 32 * 1024**2


@pytest.mark.parametrize("kind", [b"x", b"L", b"g"])
def test_tar_header_of_a_claimed_gigabyte_is_not_read(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "m.tar"
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = kind, 1024**3
    with path.open("wb") as file:
        file.write(entry.tobuf())
        file.truncate(1024**3 + 1024)
    assert peak_bytes(path) < 32 * 1024**2


def test_tar_of_endless_headers_ends(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("x")
    entry.type = b"K"
    path = tmp_path / "m.tar"
    path.write_bytes(entry.tobuf() * 70_000)
    assert refusal(path).code == "archive_damaged"


def test_negative_tar_size(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("x").tobuf())
    header[124:136] = b"\xff" * 11 + b"\x00"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    path = tmp_path / "m.tar"
    path.write_bytes(header * 4)
    assert refusal(path).code == "archive_damaged"


def test_tar_cut_short(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "m.tar", model_files() | {"z": bytes(50_000)})
    path.write_bytes(path.read_bytes()[:20_000])
    assert refusal(path).code == "archive_damaged"


# --- safetensors ------------------------------------------------------------------------


def _tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"short",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 9 * 1024**2) + b"{" + bytes(9 * 1024**2),
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        safetensors({"a": _tensor(0, 8, [4])}, bytes(8)),
        safetensors({"a": _tensor(0, 16, [4])}, bytes(12)),
        safetensors({"a": _tensor(0, 16, [4])}, bytes(20)),
        safetensors({"a": _tensor(0, 16, [4]), "b": _tensor(8, 24, [4])}, bytes(24)),
        safetensors({"a": _tensor(0, 8, [2]), "b": _tensor(12, 20, [2])}, bytes(20)),
        safetensors({"a": _tensor(0, 16, [2**62, 2**62, 4])}),
        safetensors({"a": _tensor(0, 16, [-4])}),
        safetensors({"a": _tensor(0, 16, [4], "PICKLE")}),
        safetensors({"a": _tensor(0, 2**70, [4])}),
        safetensors({"a": 1}),
    ],
)
def test_unsound_safetensors(tmp_path: Path, content: bytes) -> None:
    for write in (write_tar, write_zip):
        error = refusal(write(tmp_path / "m", model_files(model__safetensors=content)))
        assert error.code == "safetensors_damaged"


def test_too_many_tensors(tmp_path: Path) -> None:
    header: dict[str, object] = {f"{i}": _tensor(0, 0, [0]) for i in range(100_001)}
    path = write_tar(tmp_path / "m.tar", model_files(model__safetensors=safetensors(header, b"")))
    error = refusal(path)
    assert "100,000 tensors" in error.message


def test_header_written_by_safetensors_itself(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    data = numpy.save({"a": np.ones((2, 3), np.float16), "b": np.zeros(0)}, {"format": "pt"})
    path = write_tar(tmp_path / "m.tar", model_files(model__safetensors=data))
    assert inspect_upload(path, "m.tar").kind == "huggingface"


# --- any bytes at all -------------------------------------------------------------------


def peak_bytes(path: Path) -> int:
    """The memory a refusal takes."""
    tracemalloc.start()
    try:
        refusal(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SEEDS: dict[str, bytes] = {}


@pytest.fixture(scope="module", autouse=True)
def seeds(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sound uploads of each form, for the mutations below."""
    directory = tmp_path_factory.mktemp("seeds")
    SEEDS["tar"] = write_tar(directory / "a", model_files()).read_bytes()
    SEEDS["gz"] = write_gz(directory / "b", model_files()).read_bytes()
    SEEDS["zip"] = write_deflated_zip(directory / "c", model_files()).read_bytes()
    SEEDS["pt2"] = write_pt2(directory / "d").read_bytes()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    form=st.sampled_from(["tar", "gz", "zip", "pt2"]),
    edits=st.lists(
        st.tuples(st.integers(0, 10_000), st.binary(min_size=1, max_size=12)), max_size=6
    ),
    cut=st.integers(0, 12_000),
)
def test_damage_of_any_kind_is_refused_or_harmless(
    tmp_path: Path, form: str, edits: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(SEEDS[form])
    for at, replacement in edits:
        at %= len(data)
        data[at : at + len(replacement)] = replacement
    path = tmp_path / "fuzzed"
    path.write_bytes(data[: max(len(data) - max(cut - 9_000, 0), 0)])
    with contextlib.suppress(Unprocessable):  # anything else fails the test
        inspect_upload(path, "fuzzed")
