"""Every form of a prediction's body and answer, and what is refused of each."""

import base64
import contextlib
import gzip
import io
import json
import zipfile
import zlib
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from app.api.npy import MAX_UNPACKED_BYTES, member_name, npz_of, read_npy, read_npz
from app.api.tensors import tensors_of_bytes
from app.billing.service import set_spending_limit
from app.core.errors import InvalidRequest, TooLarge
from runtime.protocol import ImageInput, Manifest, Predict, Schema, Tensor, TensorSpec, TextInput
from tests.app.api.conftest import ORGANIZATION, Box
from tests.app.api.scripted_worker import TENSOR

X = np.array([[1.5, 2], [3, -4]], "f4")
K = np.array([7, 8], "i8")
NPY = {"content-type": "application/x-npy"}
NPZ = {"content-type": "application/x-npz"}
RAW = {"content-type": "application/octet-stream"}
PNG = b"\x89PNG\r\n\x1a\n and so on"


def one_input(name: str, shape: list[int | None], **options: Any) -> Manifest:
    """A model with one float input and one float output of the same shape."""
    output_shape = options.pop("output_shape", shape)
    text = options.pop("text", None)
    schema = Schema(
        inputs=[TensorSpec(name=name, dtype="float32", shape=shape, **options)],
        outputs=[TensorSpec(name=name, dtype="float32", shape=output_shape)],
        is_batched=True,
    )
    return msgspec.structs.replace(TENSOR, schema=schema, text=text)


ECHO = one_input("x", [None, 2])
PICTURES = one_input(
    "pixels",
    [None, 1, 8, 8],
    output_shape=[None],
    image=ImageInput(height=8, width=8, channels=1, is_channels_first=True),
)
TEXTS = one_input(
    "ids",
    [None, None],
    output_shape=[None],
    text=TextInput(max_tokens=16, takes_pairs=True, token_ids="ids"),
)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def arrays_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    with np.load(io.BytesIO(response.content)) as file:
        return dict(file)


def message(response: httpx.Response) -> str:
    assert response.status_code in (400, 413, 415), response.text
    return response.json()["error"]["message"]


async def test_several_inputs_as_npz_and_back(box: Box) -> None:
    async with box.http() as http:
        response = await http.post(
            "/models/doubler/predict",
            content=npz(x=X.astype("f8"), k=K.astype(">i2")),
            headers={**NPZ, "accept": "application/x-npz, application/json"},
        )
        assert response.headers["content-type"].startswith("application/x-npz")
        arrays = arrays_of(response)
        np.testing.assert_array_equal(arrays["x"], X)
        np.testing.assert_array_equal(arrays["k"], K)
        assert arrays["k"].dtype == np.int64
        answered = await http.post("/models/doubler/predict", content=npz(x=X, k=K), headers=NPZ)
        assert answered.json()["outputs"] == {"x": X.tolist(), "k": [7, 8]}
        wrong = await http.post("/models/doubler/predict", content=npz(x=X), headers=NPZ)
        assert "inputs.k is required" in message(wrong)


async def test_one_input_as_npy_and_as_bytes(box: Box) -> None:
    await box.connect("echo", ECHO)
    async with box.http() as http:
        headers = {**NPY, "accept": "application/x-npy"}
        url = "/models/echo/predict"
        response = await http.post(url, content=npy(np.asfortranarray(X)), headers=headers)
        np.testing.assert_array_equal(np.load(io.BytesIO(response.content)), X)
        response = await http.post(url, content=X.tobytes(), headers=RAW)
        assert response.json()["outputs"] == {"x": X.tolist()}
        response = await http.post(url, content=X.tobytes()[:-4], headers=RAW)
        assert "a multiple of 8 bytes, but 12 were sent" in message(response)
        response = await http.post("/models/doubler/predict", content=npy(X), headers=NPY)
        assert "this model takes: x (float32), k (int64)" in message(response)


async def test_an_answer_that_does_not_fit_is_refused_before_it_costs(box: Box) -> None:
    async with box.http() as http:
        response = await http.post(
            "/models/doubler/predict",
            json={"inputs": {"x": [[1, 2]], "k": [1]}},
            headers={"accept": "application/x-npy"},
        )
        assert "ask for application/x-npz" in message(response)
        assert (await http.get("/api/usage")).json()["rows"] == []


async def test_a_form_of_parts(box: Box) -> None:
    async with box.http() as http:
        files = {"x": ("x.npy", npy(X), "application/x-npy"), "k": (None, "[7, 8]")}
        response = await http.post("/models/doubler/predict", files=files)
        assert response.json()["outputs"] == {"x": X.tolist(), "k": [7, 8]}
        wrong: list[tuple[list[tuple[str, Any]], str]] = [
            ([("x", (None, "[1")), ("k", (None, "[1]"))], "is not valid JSON"),
            ([("x", (None, "[[1,2]]")), ("x", (None, "[[1,2]]"))], "comes twice"),
            ([("x", (None, b"\xff\xfe"))], "is not valid JSON"),
            ([("x", ("x.png", PNG, "image/png"))], "no input that images fit"),
        ]
        for parts, words in wrong:
            response = await http.post("/models/doubler/predict", files=parts)
            assert words in message(response)
        headers = {"content-type": "multipart/form-data; boundary=b"}
        response = await http.post("/models/doubler/predict", content=b"--c\r\n", headers=headers)
        assert response.status_code == 400


def part(name: str, content: bytes, *more: str) -> bytes:
    headers = [f'Content-Disposition: form-data; name="{name}"', *more]
    return b"--b\r\n" + "\r\n".join(headers).encode() + b"\r\n\r\n" + content + b"\r\n"


async def test_forms_that_cannot_be_read(box: Box) -> None:
    charsets = ["nope", "rot13", "undefined", "idna", "punycode", "utf-16"]
    bodies = [
        part("x", b"[[1, 2]]", f"Content-Type: text/plain; charset={name}") + b"--b--\r\n"
        for name in charsets
    ]
    wrong = [(body, 400, "must be text in UTF-8") for body in bodies]
    crowd = b"".join(part(f"x{number}", b"1") for number in range(1001)) + b"--b--\r\n"
    wrong.append((crowd, 413, "more than 1,000 parts"))
    wrong.append((part("x", b"[[1, 2]]"), 400, "every part whole"))
    wrong.append((b"--b\r\nX: y\r\n\r\n1\r\n--b--\r\n", 400, "every part whole"))
    async with box.http() as http:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        for body, status, words in wrong:
            response = await http.post("/models/doubler/predict", content=body, headers=headers)
            assert (response.status_code, words in message(response)) == (status, True), body[:200]


@pytest.mark.parametrize("charset", ["utf-8", "UTF8", "us-ascii", "ISO-8859-1", "latin1"])
async def test_charsets_that_clients_name(box: Box, charset: str) -> None:
    kind = f"Content-Type: text/plain; charset={charset}"
    body = part("x", b"[[1, 2]]", kind) + part("k", b"[1]", kind) + b"--b--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    async with box.http() as http:
        answer = await http.post("/models/doubler/predict", content=body, headers=headers)
        assert answer.status_code == 200, answer.text


async def test_an_image_goes_to_the_worker_as_it_came(box: Box) -> None:
    await box.connect("pictures", PICTURES)
    async with box.http() as http:
        url = "/models/pictures/predict"
        sent = [
            await http.post(url, content=PNG, headers={"content-type": "image/png"}),
            await http.post(url, files={"file": ("digit.png", PNG, "image/png")}),
            await http.post(url, json={"image": base64.b64encode(PNG).decode()}),
        ]
        assert [each.json()["outputs"] for each in sent] == [{"pixels": [float(len(PNG))]}] * 3
        received = [m for m in box.workers["pictures"].received if isinstance(m, Predict)]
        assert [(m.image, m.inputs, m.texts) for m in received] == [(PNG, None, None)] * 3
        assert {m.fairness_key for m in received} == {ORGANIZATION}
        response = await http.post(url, content=b"", headers={"content-type": "image/jpeg"})
        assert "empty" in message(response)
        response = await http.post(url, json={"image": "*"})
        assert "base64" in message(response)
        parts = {"a": ("a.png", PNG, "image/png"), "b": (None, "[1]")}
        assert "the only part" in message(await http.post(url, files=parts))
        response = await http.post(
            "/models/doubler/predict", content=PNG, headers={"content-type": "image/png"}
        )
        assert "no input that images fit" in message(response)


async def test_texts(box: Box) -> None:
    await box.connect("texts", TEXTS)
    async with box.http() as http:
        url = "/models/texts/predict"
        response = await http.post(url, json={"texts": ["abc", ["d", "efgh"]]})
        assert response.json()["outputs"] == {"ids": [3.0, 5.0]}
        (received,) = [m for m in box.workers["texts"].received if isinstance(m, Predict)]
        assert received.texts == [["abc"], ["d", "efgh"]]
        wrong: list[tuple[Any, str]] = [
            ({"texts": []}, "a request takes 1 to 2048"),
            ({"texts": ["a"] * 2049}, "a request takes 1 to 2048"),
            ({"texts": [["a", "b", "c"]]}, "texts[0] has 3 texts"),
            ({"texts": ["a", []]}, "texts[1] has 0 texts"),
            ({"texts": [1]}, "texts[0]"),
            ({"texts": ["a"], "inputs": [[1]]}, "exclude each other"),
        ]
        for body, words in wrong:
            assert words in message(await http.post(url, json=body))
        response = await http.post("/models/doubler/predict", json={"texts": ["a"]})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "no_texts")


async def test_money_for_every_row_of_texts_is_held(box: Box) -> None:
    """Nine rows fill three of the build's largest batches of four, at 11 ms each."""
    await box.connect("texts", TEXTS)
    async with box.database.write() as session:
        await set_spending_limit(session, ORGANIZATION, 3_200, "usd")
    async with box.http() as http:
        few = await http.post("/models/texts/predict", json={"texts": ["a"] * 4})
        assert few.status_code == 200
        many = await http.post("/models/texts/predict", json={"texts": ["a"] * 9})
        assert many.status_code == 402


async def test_other_kinds_of_bodies_are_named(box: Box) -> None:
    async with box.http() as http:
        url = "/models/doubler/predict"
        for kind in ("image/gif", "application/xml"):
            response = await http.post(url, content=b"x", headers={"content-type": kind})
            assert response.status_code == 415
            assert kind in response.json()["error"]["message"]
        body = json.dumps({"inputs": {"x": [[1, 2]], "k": [1]}})
        form = {"content-type": "application/x-www-form-urlencoded"}  # as curl says of `-d`
        assert (await http.post(url, content=body, headers=form)).status_code == 200


async def test_bodies_may_be_packed(box: Box) -> None:
    body = json.dumps({"inputs": {"x": [[1, 2]], "k": [1]}}).encode()
    async with box.http() as http:
        url = "/models/doubler/predict"
        for encoding, content, status in (
            ("gzip", gzip.compress(body), 200),
            ("deflate", zlib.compress(body), 200),
            ("gzip", gzip.compress(bytes(64 << 20)), 413),
            ("br", body, 415),
        ):
            response = await http.post(url, content=content, headers={"content-encoding": encoding})
            assert response.status_code == status, response.text


def bomb() -> bytes:
    """A megabyte that announces more than the whole request may hold."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(8):
            archive.writestr(f"x{number}.npy", bytes(MAX_UNPACKED_BYTES // 7))
    return file.getvalue()


def lying(size: int) -> bytes:
    """A member whose entry announces another size than it has."""
    data = bytearray(npz(x=np.zeros(1000, "f4")))
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = size.to_bytes(4, "little")
    return bytes(data)


def twice() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", npy(X))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", npy(X))
    return file.getvalue()


def test_npz_files_that_are_none() -> None:
    whole = npz(x=X)
    pickled = npz(x=np.array([{}], dtype=object))
    refused = [b"", b"PK", whole[:-30], whole[:40] + whole[50:], pickled, twice(), lying(100)]
    packed = bytearray(whole)
    packed[packed.rindex(b"PK\x01\x02") + 10] = 12  # bzip2
    locked = bytearray(whole)
    locked[locked.rindex(b"PK\x01\x02") + 8] |= 1  # encrypted
    for body in (*refused, bytes(packed), bytes(locked), lying(4_000_000)):
        with pytest.raises(InvalidRequest, match=r"not an np[yz] file"):
            read_npz(body)
    with pytest.raises(TooLarge, match="unpacked"):
        read_npz(bomb())
    np.testing.assert_array_equal(read_npz(whole)["x"], X)


HEADERS = [
    "{'descr': (), 'fortran_order': False, 'shape': (1,)}",
    "{'descr': [()], 'fortran_order': False, 'shape': (1,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 9223372036854775808)}",
    "{'descr': ('<f4', (9223372036854775808,)), 'fortran_order': False, 'shape': (0,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': 1}",
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_npy_files_that_describe_nothing(header: str) -> None:
    body = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with pytest.raises(InvalidRequest, match="not an npy file"):
        read_npy(body)


def test_names_of_outputs_lead_nowhere_when_unpacked() -> None:
    names = ["../../etc/passwd", "/root/x", "a/../b", "..", "C:\\x", "\\x", "%2E", "a\0b", "a\nb"]
    encoded = [member_name(name) for name in names]
    assert encoded[0] == "%2E%2E%2F%2E%2E%2Fetc%2Fpasswd"
    for name in encoded:
        assert not {"/", "\\", ":", "\0", "\n"} & set(name), name
        assert not name.startswith(".")
    assert len(set(encoded)) == len(names)
    plain = ["logits", "output:0", "layer.0/add", "état", "...x", "a b"]
    assert [member_name(name) for name in plain] == plain
    ones = [
        Tensor(name=name, dtype="float32", shape=[1], data=bytes(4)) for name in (names[0], "y")
    ]
    with np.load(io.BytesIO(npz_of(ones))) as file:
        assert set(file) == {encoded[0], "y"}


def test_broken_npz_files_are_refused_whatever_is_broken() -> None:
    random = np.random.default_rng(0)
    whole = npz(x=X, k=K)
    for _ in range(300):
        broken = bytearray(whole)
        for at in random.integers(0, len(broken), 2):
            broken[at] = random.integers(0, 256)
        with contextlib.suppress(InvalidRequest, TooLarge):
            read_npz(bytes(broken))


def test_bytes_tell_one_axis_at_most() -> None:
    def schema(shape: list[int | None], **options: Any) -> Schema:
        spec = TensorSpec(name="x", dtype="int16", shape=shape, **options)
        return Schema(inputs=[spec], outputs=[spec], is_batched=True)

    (tensor,) = tensors_of_bytes(bytes(24), schema([None, 3]))
    assert tensor.shape == [4, 3]
    (tensor,) = tensors_of_bytes(bytes(12), schema([2, 3]))
    assert tensor.shape == [2, 3]
    wrong = [(schema([None, None]), 12), (schema([2, 3]), 24), (schema([None, 0]), 12)]
    for each, size in (*wrong, (schema([None, 3], max_shape=[2, 3]), 24)):
        with pytest.raises(InvalidRequest):
            tensors_of_bytes(bytes(size), each)


def test_compressed_arrays_of_nothing_cost_nothing() -> None:
    """Only what the entries announce is ever unpacked."""
    data = npz(x=np.zeros(1_000_000, "f4"))
    assert len(data) < 10_000
    assert zlib.crc32(read_npz(data)["x"].tobytes()) == zlib.crc32(bytes(4_000_000))
