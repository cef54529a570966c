"""Uploads are recognised by content and unpacked under limits; hostile ones leave nothing behind
outside their directory."""

import gzip
import io
import stat
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from runtime.importing import archive
from runtime.importing.archive import UnpackedUpload, unpack
from runtime.importing.program import ImportFailure
from tests.runtime.importing.programs import Digits, export_digits

MODEL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    "tokenizer.json": b"{}",
}


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    return tmp_path / "upload"  # no suffix: only contents count


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    directory = tmp_path / "scratch"
    directory.mkdir()
    return directory


@pytest.fixture
def refusal(upload: Path, scratch: Path) -> Callable[..., ImportFailure]:
    def unpack_and_fail(**options: int) -> ImportFailure:
        with pytest.raises(ImportFailure) as caught:
            unpack(upload, scratch, **options)
        return caught.value

    return unpack_and_fail


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_special(path: Path, kind: bytes, name: str = "config.json", link: str = "") -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(name)
        member.type = kind
        member.linkname = link
        tar.addfile(member)


# --- what is accepted -------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "./", "my-model/", "a/b/"])
@pytest.mark.parametrize("form", ["tar", "tar.gz", "zip"])
def test_a_directory_is_found_in_every_archive_form(upload, scratch, form, top):
    files = {top + name: data for name, data in MODEL_FILES.items()}
    if form == "zip":
        write_zip(upload, files)
    else:
        write_tar(upload, files, "w:gz" if form == "tar.gz" else "w")
    unpacked = unpack(upload, scratch)
    assert unpacked.kind == "huggingface"
    assert {p.name: p.read_bytes() for p in unpacked.path.iterdir()} == MODEL_FILES


def test_a_tar_made_of_a_directory_is_accepted(upload, scratch, tmp_path):
    source = tmp_path / "source"
    (source / "nested").mkdir(parents=True)
    for name, data in MODEL_FILES.items():
        (source / name).write_bytes(data)
    with tarfile.open(upload, "w") as tar:
        tar.add(source, arcname=".")
    assert unpack(upload, scratch).kind == "huggingface"


def test_a_program_is_used_where_it_lies(upload, scratch):
    export_digits(upload)
    assert unpack(upload, scratch) == UnpackedUpload(kind="pt2", path=upload)
    assert list(scratch.iterdir()) == []


def test_a_program_may_come_with_files_beside_it(upload, scratch, tmp_path):
    program = export_digits(tmp_path / "digits.pt2").read_bytes()
    write_tar(upload, {"m/digits.pt2": program, "m/tokenizer/tokenizer.json": b"{}"}, "w:gz")
    unpacked = unpack(upload, scratch)
    assert (unpacked.kind, unpacked.beside) == ("pt2", ["tokenizer"])
    assert unpacked.path.read_bytes() == program


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("top", [None, "", "m/"])
def test_torchscript_is_told_by_its_content(upload, scratch, top):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), upload)
    if top is None:
        assert unpack(upload, scratch) == UnpackedUpload(kind="torchscript", path=upload)
        return
    program = upload.read_bytes()
    write_tar(upload, {top + "model.dat": program, top + "examples.npz": b"", top + "notes": b""})
    unpacked = unpack(upload, scratch)
    assert (unpacked.kind, unpacked.path.name) == ("torchscript", "model.dat")
    assert unpacked.path.read_bytes() == program
    assert unpacked.examples == unpacked.path.with_name("examples.npz")
    assert unpacked.beside == ["notes"]


ONNX_HEAD = b"\x08\x0a\x12\x07pytorch:" + bytes(600)


def test_onnx_is_told_by_its_content(upload, scratch):
    upload.write_bytes(ONNX_HEAD)
    assert unpack(upload, scratch) == UnpackedUpload(kind="onnx", path=upload)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["model.onnx", "model.onnx.data"], "onnx"),
        (["network", "weights/a.bin"], "onnx"),
        (["model.onnx", "config.json", "tokenizer.json"], "onnx"),
        (["model.onnx", "config.json", "model.safetensors"], "huggingface"),
    ],
)
def test_a_program_among_other_files(upload, scratch, names, kind):
    write_tar(upload, {name: bytes(20) for name in names} | {names[0]: ONNX_HEAD})
    unpacked = unpack(upload, scratch)
    assert unpacked.kind == kind
    if kind == "onnx":
        assert unpacked.path.name == names[0]


# --- what is refused, and what to run instead -------------------------------------------


def test_a_state_dict_is_told_from_a_pickled_module(upload, refusal):
    torch.save(Digits().state_dict(), upload)
    failure = refusal()
    assert failure.error.code == "state_dict"
    assert "model.load_state_dict" in failure.error.message
    assert "torch.export.save(program" in failure.error.message
    torch.save({"epoch": 3, "model": OrderedDict(w=torch.ones(2))}, upload)
    assert refusal().error.code == "state_dict"
    torch.save(Digits(), upload)
    failure = refusal()
    assert failure.error.code == "pickled_module"
    assert "Digits" in failure.error.message
    assert "torch.export.save(program" in failure.error.message


@pytest.mark.parametrize(("module", "code"), [(True, "pickled_module"), (False, "state_dict")])
def test_the_old_pickle_format_is_recognised_too(upload, refusal, module, code):
    content = Digits() if module else Digits().state_dict()
    torch.save(content, upload, _use_new_zipfile_serialization=False)
    assert refusal().error.code == code


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"hello", "unknown_format"),
        (b"\x7fELF" + b"\0" * 600, "native_code"),
        (b"GGUF" + b"\0" * 600, "gguf"),
        (b"\xfd7zXZ\0" + b"\0" * 600, "compression"),
        (b"BZh9" + b"\0" * 600, "compression"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "bare_safetensors"),
        (b"PK\x03\x04 not really", "archive_damaged"),
        (b"\x1f\x8b\x08 not really", "archive_damaged"),
        (b"\0" * 257 + b"ustar" + b"\0" * 250, "archive_damaged"),
    ],
)
def test_other_files_are_named(upload, refusal, data, code):
    upload.write_bytes(data)
    failure = refusal()
    assert failure.error.code == code
    assert failure.error.status == 422


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"readme.txt": b"hi"}, "unknown_contents"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "adapter"),
        ({"a.pt2": b"", "b.pt2": b""}, "several_programs"),
        ({"a.pt2": b"not a zip"}, "archive_damaged"),
        ({"a.onnx": b"not a model"}, "unknown_format"),
        ({"encoder.onnx": ONNX_HEAD, "decoder.onnx": ONNX_HEAD}, "several_programs"),
        ({"a": ONNX_HEAD, "b": ONNX_HEAD}, "several_programs"),
    ],
)
def test_archives_of_something_else_are_named(upload, refusal, files, code):
    write_tar(upload, files)
    assert refusal().error.code == code


# --- hostile archives -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/tmp/evil", "a\\..\\evil", "C:evil", "..", "a\0b"]
)
@pytest.mark.parametrize("form", ["tar", "zip"])
def test_nothing_is_written_outside_the_directory(upload, refusal, scratch, tmp_path, form, name):
    if form == "tar":
        member = tarfile.TarInfo("placeholder")
        member.name = name
        member.size = 4
        with tarfile.open(upload, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(member, io.BytesIO(b"evil"))
    else:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        with zipfile.ZipFile(upload, "w") as archive_:
            archive_.writestr(info, b"evil")
    if "\0" in name:  # both formats end a name there, which leaves a harmless one
        with pytest.raises(ImportFailure):
            unpack(upload, scratch)
    else:
        assert refusal().error.code == "archive_path"
        assert list(scratch.iterdir()) == []
    outside = {path.name for path in tmp_path.iterdir()}
    assert outside == {"upload", "scratch"}


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_links_and_devices_in_a_tar_are_refused(upload, refusal, scratch, kind):
    write_special(upload, kind, link="/etc/passwd")
    assert refusal().error.code == "archive_link"
    assert list(scratch.iterdir()) == []


def test_links_in_a_zip_are_refused(upload, refusal):
    info = zipfile.ZipInfo("config.json")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(upload, "w") as zipped:
        zipped.writestr(info, "/etc/passwd")
    assert refusal().error.code == "archive_link"


def test_a_zip_bomb_is_refused_while_it_unpacks(upload, refusal, scratch):
    write_zip(upload, {"model.safetensors": bytes(64 * 1024**2)})
    assert upload.stat().st_size < 100_000
    assert refusal().error.code == "archive_ratio"
    written = sum(path.stat().st_size for path in scratch.iterdir())
    assert written < 12 * 1024**2


def test_a_compressed_tar_bomb_is_refused_while_it_unpacks(upload, refusal):
    write_tar(upload, {"model.safetensors": bytes(64 * 1024**2)}, "w:gz")
    assert refusal().error.code == "archive_ratio"


def test_a_header_that_announces_a_huge_name_is_bounded(upload, refusal):
    header = tarfile.TarInfo("x")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 512 * 1024**2
    with gzip.open(upload, "wb") as zipped:
        zipped.write(header.tobuf())
        zipped.write(bytes(32 * 1024**2))
    assert refusal().error.code == "archive_ratio"


def test_the_size_limit_counts_real_bytes(upload, refusal):
    write_tar(upload, MODEL_FILES | {"model.safetensors": bytes(200_000)})
    assert refusal(max_bytes=100_000).error.code == "archive_size"


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_too_many_members_are_refused(upload, refusal, monkeypatch, form):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 10)
    files = {f"file-{index}": b"" for index in range(11)}
    write_tar(upload, files) if form == "tar" else write_zip(upload, files)
    assert refusal().error.code == "archive_members"


def test_a_file_given_twice_is_refused(upload, refusal):
    with tarfile.open(upload, "w") as tar:
        for data in (b"harmless", b"different"):
            member = tarfile.TarInfo("config.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert refusal().error.code == "archive_duplicate"


def test_a_file_used_as_a_directory_is_refused(upload, refusal):
    write_tar(upload, {"config.json": b"{}", "config.json/inner": b""})
    assert refusal().error.code == "archive_duplicate"


def test_a_directory_in_the_place_of_a_file_is_refused(upload, refusal):
    write_zip(upload, {"config.json": b"{}", "config.json/": b""})
    assert refusal().error.code == "archive_duplicate"


def test_a_path_longer_than_the_system_takes_is_refused(upload, refusal):
    write_zip(upload, {"/".join(["a" * 255] * 16): b""})
    assert refusal().error.code == "archive_path"


def test_names_that_are_not_utf_8_can_be_told(upload, refusal):
    write_tar(upload, {"lis\udcc9.md": b"", "other": b""})
    assert "lis\\udcc9.md" in refusal().error.message


@pytest.mark.parametrize("form", ["w", "w:gz"])
def test_a_cut_archive_is_damaged(upload, refusal, form):
    write_tar(
        upload, MODEL_FILES | {"model.safetensors": torch.rand(50_000).numpy().tobytes()}, form
    )
    upload.write_bytes(upload.read_bytes()[:100_000])
    assert refusal().error.code == "archive_damaged"


def test_a_zip_whose_bytes_do_not_match_is_damaged(upload, refusal):
    write_zip(upload, MODEL_FILES | {"tokenizer.json": b"A" * 1000}, zipfile.ZIP_STORED)
    data = bytearray(upload.read_bytes())
    data[data.index(b"A" * 1000) + 500] ^= 1
    upload.write_bytes(data)
    assert refusal().error.code == "archive_damaged"


def test_an_encrypted_zip_is_refused(upload, refusal):
    write_zip(upload, {"config.json": b"{}"}, zipfile.ZIP_STORED)
    data = bytearray(upload.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    upload.write_bytes(data)
    assert refusal().error.code == "archive_encrypted"


def test_a_full_disk_is_named(upload, refusal, monkeypatch):
    usage = archive.shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage)
    write_tar(upload, MODEL_FILES | {"model.safetensors": bytes(5000)})
    assert refusal().error.code == "disk_full"
