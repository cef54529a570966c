"""`examples.npz`: what it gives, and the files that would run code, lie, or take all memory."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.importing import examples
from runtime.importing.examples import keep_examples, match_examples, read_examples
from runtime.importing.program import ImportFailure
from runtime.protocol import Schema, TensorSpec

IDS = TensorSpec(
    name="ids", dtype="int64", shape=[None, None], min_shape=[1, 1], max_shape=[None, 9]
)
IMAGE = TensorSpec(name="image", dtype="float32", shape=[None, 8], min_shape=[1, 8], max_shape=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "examples.npz"


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_arrays_are_read_whatever_their_order_in_memory(path: Path) -> None:
    arrays = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "scalar": np.array(True),
        "empty": np.zeros((0, 3), np.float16),
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]
    found = read_examples(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(found[name].numpy(), array)
        assert found[name].shape == array.shape
    np.savez_compressed(path, c=arrays["c"])
    assert np.array_equal(read_examples(path)["c"].numpy(), arrays["c"])


def lying_header() -> bytes:
    data = npy(np.zeros((2, 2), np.float32))
    return data.replace(b"(2, 2)", b"(2, 9)")


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({}, "no arrays"),
        ({"x.npy": npy(np.array([{"a": 1}], dtype=object))}, "never unpickled"),
        ({"x.npy": npy(np.array(["a"]))}, "save it as numbers"),
        ({"x.npy": npy(np.zeros(2, [("a", "f4")]))}, "save it as numbers"),
        ({"x.npy": npy(np.zeros(2, "M8[s]"))}, "save it as numbers"),
        ({"x.npy": lying_header()}, "do not agree"),
        ({"x.npy": npy(np.zeros(4))[:-3]}, "do not agree"),
        ({"x.npy": b"\x93NUMPY\x01\x00\xff\xff{"}, "damaged"),
        ({"x.npy": b""}, "damaged"),
        ({"x.npy": b"\x93NUMPY\x03\x00" + bytes(64)}, "unknown version"),
        ({"notes.txt": b"hello"}, "no array"),
        ({f"x{index}.npy": npy(np.zeros(1)) for index in range(300)}, "more than 256"),
    ],
)
def test_other_files_are_refused(path: Path, members: dict[str, bytes], says: str) -> None:
    with pytest.raises(ImportFailure) as caught:
        read_examples(write(path, members))
    assert caught.value.error.code == "examples"
    assert says in caught.value.error.message


def test_what_unpacks_to_too_much_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MAX_BYTES", 10_000)
    write(path, {"x.npy": npy(np.zeros(10_000, np.uint8))}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ImportFailure, match="10,000 bytes"):
        read_examples(path)


def test_a_file_that_is_no_zip_is_refused(path: Path) -> None:
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ImportFailure, match="damaged"):
        read_examples(path)


def test_arrays_are_matched_by_name_or_else_by_order() -> None:
    ids, image = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 8)
    for arrays in ({"image": image, "ids": ids}, {"arr_0": ids, "arr_1": image}):
        first, second = match_examples(arrays, [IDS, IMAGE])
        assert first is ids
        assert second is image


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"idz": torch.ones(2, 3, dtype=torch.long)}, "the model's inputs are ids"),
        ({"arr_0": torch.ones(1), "arr_1": torch.ones(1)}, "the model's inputs are ids"),
        ({"ids": torch.ones(2, 3)}, ".astype('int64')"),
        ({"ids": torch.ones(2, 30, dtype=torch.long)}, "the shape [2, 30]"),
        ({"ids": torch.ones(2, dtype=torch.long)}, "the shape [2]"),
    ],
)
def test_wrong_names_dtypes_and_shapes_are_refused(
    arrays: dict[str, torch.Tensor], says: str
) -> None:
    with pytest.raises(ImportFailure) as caught:
        match_examples(arrays, [IDS])
    assert says in caught.value.error.message


def test_an_artifact_keeps_as_many_rows_as_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "MAX_KEPT_BYTES", 128)
    rows = torch.arange(80, dtype=torch.float32).reshape(10, 8)
    keep_examples([rows], Schema(inputs=[IMAGE], outputs=[], is_batched=True), tmp_path)
    assert torch.equal(read_examples(tmp_path / "examples.npz")["image"], rows[:4])
    (tmp_path / "examples.npz").unlink()
    keep_examples([rows], Schema(inputs=[IMAGE], outputs=[], is_batched=False), tmp_path)
    assert not list(tmp_path.iterdir())
