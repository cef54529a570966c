"""The Open Inference Protocol as Triton's own client speaks it, and byte by byte where no client
would go."""

import asyncio
import contextlib
import gzip
import json
import struct
import zlib
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from app.api.compression import accepted_encoding, packed, unpacked
from app.api.inference_v2_requests import read_infer
from app.core.errors import InvalidRequest, TooLarge, UnsupportedMediaType
from runtime.protocol import Predict, Schema, Stats, TensorSpec
from tests.app.api.conftest import ORGANIZATION, OTHER, Box
from tests.app.api.scripted_worker import TENSOR
from tests.app.api.test_predict_bodies import TEXTS

X = np.array([[1.5, 2], [3, -4]], "f4")
K = np.array([7, 8], "i8")
DTYPES = [
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64"),
]
EVERY = [TensorSpec(name=dtype, dtype=dtype, shape=[None, 3]) for dtype in DTYPES]
ALL_TYPES = msgspec.structs.replace(
    TENSOR, schema=Schema(inputs=EVERY, outputs=EVERY, is_batched=True)
)


def given(name: str, array: Any, datatype: str, **options: Any) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    return made.set_data_from_numpy(array, **options)


def both(**options: Any) -> list[triton.InferInput]:
    return [given("x", X, "FP32", **options), given("k", K, "INT64", **options)]


class Client:
    """Triton's client with a key; `sync` runs its calls as a program without a loop would."""

    def __init__(self, box: Box, key: str = ORGANIZATION) -> None:
        self.address = box.url.removeprefix("http://")
        self.headers = {"Authorization": f"Bearer {box.keys[key]}"}

    async def sync(self, method: str, *arguments: Any, **options: Any) -> Any:
        def call() -> Any:
            with triton.InferenceServerClient(self.address) as client:
                options.setdefault("headers", dict(self.headers))  # it adds to them
                return getattr(client, method)(*arguments, **options)

        return await asyncio.to_thread(call)

    async def aio(self, method: str, *arguments: Any, **options: Any) -> Any:
        async with triton_aio.InferenceServerClient(self.address) as client:
            options.setdefault("headers", dict(self.headers))  # it adds to them
            return await getattr(client, method)(*arguments, **options)


@pytest.fixture
async def client(box: Box) -> Client:
    return Client(box)


async def test_health_and_metadata(box: Box, client: Client) -> None:
    for call in (client.sync, client.aio):
        assert await call("is_server_live", headers={})
        assert await call("is_server_ready", headers={})
        assert await call("is_model_ready", "doubler")
        assert await call("is_model_ready", "doubler", "3")
        assert not await call("is_model_ready", "doubler", "4")
        assert not await call("is_model_ready", "absent")
    server = await client.sync("get_server_metadata", headers={})
    assert server["name"] == "tapeout"
    assert "binary_tensor_data" in server["extensions"]
    tensors = [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "k", "datatype": "INT64", "shape": [-1]},
    ]
    assert await client.sync("get_model_metadata", "doubler", "3") == {
        "name": "doubler",
        "versions": ["3"],
        "platform": "pytorch_export",
        "inputs": tensors,
        "outputs": tensors,
    }
    config = await client.sync("get_model_config", "doubler")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (4, [2])
    assert config["input"][1] == {"name": "k", "data_type": "TYPE_INT64", "dims": []}
    index = await client.sync("get_model_repository_index")
    assert {"name": "tiny", "version": "3", "state": "READY", "reason": ""} in index


@pytest.mark.parametrize("packing", [None, "gzip", "deflate"])
@pytest.mark.parametrize("is_binary", [True, False])
async def test_inference(client: Client, is_binary: bool, packing: str | None) -> None:
    outputs = [triton.InferRequestedOutput(name, binary_data=is_binary) for name in ("k", "x")]
    options: dict[str, Any] = {
        "request_id": "mine",
        "request_compression_algorithm": packing,
        "response_compression_algorithm": packing,
    }
    for call in (client.sync, client.aio):
        for wanted in (None, outputs):
            answer = await call("infer", "doubler", both(binary_data=is_binary), "3", wanted,
                                **options)  # fmt: skip
            np.testing.assert_array_equal(answer.as_numpy("x"), X)
            np.testing.assert_array_equal(answer.as_numpy("k"), K)
            told = answer.get_response()
            assert (told["id"], told["model_name"], told["model_version"]) == (
                "mine", "doubler", "3",
            )  # fmt: skip
            names = [output["name"] for output in told["outputs"]]
            assert names == (["k", "x"] if wanted else ["x", "k"])


async def test_large_answers_are_packed(box: Box) -> None:
    schema = Schema(inputs=EVERY[-2:-1], outputs=EVERY[-2:-1], is_batched=True)
    await box.connect("wide", msgspec.structs.replace(TENSOR, schema=schema))
    client = Client(box)
    rows = np.tile(np.arange(3, dtype="f4"), (20_000, 1))
    for packing in ("gzip", "deflate"):
        answer = await client.sync(
            "infer",
            "wide",
            [given("float32", rows, "FP32")],
            request_compression_algorithm=packing,
            response_compression_algorithm=packing,
        )
        np.testing.assert_array_equal(answer.as_numpy("float32"), rows)
    body = {"inputs": [{"name": "float32", "datatype": "FP32", "shape": [200, 3],
                        "data": [1.0] * 600}]}  # fmt: skip
    async with box.http() as http:
        for wanted, got in (("gzip;q=0, deflate", "deflate"), ("br", None), ("gzip", "gzip")):
            headers = {"accept-encoding": wanted}
            response = await http.post("/v2/models/wide/infer", json=body, headers=headers)
            assert response.headers.get("content-encoding") == got
            assert response.json()["outputs"][0]["data"] == [1.0] * 600


async def test_every_datatype_both_ways(box: Box) -> None:
    await box.connect("all", ALL_TYPES)
    client = Client(box)
    metadata = await client.sync("get_model_metadata", "all")
    datatypes = {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]}
    assert len(set(datatypes.values())) == len(DTYPES)
    values = {dtype: np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype) for dtype in DTYPES}
    for dtype in DTYPES[1:]:
        limits = np.finfo(dtype) if "float" in dtype else np.iinfo(dtype)
        values[dtype][0, 1:] = [limits.min, limits.max]
    for is_binary in (True, False):
        inputs = [
            given(dtype, values[dtype], datatypes[dtype], binary_data=is_binary) for dtype in DTYPES
        ]
        outputs = [triton.InferRequestedOutput(dtype, binary_data=is_binary) for dtype in DTYPES]
        answer = await client.sync("infer", "all", inputs, outputs=outputs)
        for dtype in DTYPES:
            got = answer.as_numpy(dtype)
            assert got.dtype == values[dtype].dtype
            np.testing.assert_array_equal(got, values[dtype])


async def test_bfloat16_is_widened(box: Box, client: Client) -> None:
    x = X.astype(ml_dtypes.bfloat16)
    answer = await client.sync("infer", "doubler", [given("x", x, "BF16"), both()[1]])
    np.testing.assert_array_equal(answer.as_numpy("x"), X)
    assert answer.get_output("x")["datatype"] == "FP32"
    spec = TensorSpec(name="b", dtype="bfloat16", shape=[None, 2])
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    await box.connect("brain", msgspec.structs.replace(TENSOR, schema=schema))
    answer = await client.sync("infer", "brain", [given("b", x, "BF16")])
    assert answer.as_numpy("b").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(answer.as_numpy("b"), x)


async def test_texts_are_bytes(box: Box) -> None:
    await box.connect("texts", TEXTS)
    client = Client(box)
    singles = np.array(["abc", "größe"], dtype=object)
    pairs = np.array([[b"a", b"bc"], [b"", b"d"]], dtype=object)
    for is_binary in (True, False):
        for texts, lengths in ((singles, [3, 5]), (pairs, [3, 1])):
            inputs = [given("text", texts, "BYTES", binary_data=is_binary)]
            answer = await client.sync("infer", "texts", inputs)
            assert answer.as_numpy("ids").tolist() == lengths
    received = [m.texts for m in box.workers["texts"].received if isinstance(m, Predict)]
    assert received[:2] == [[["abc"], ["größe"]], [["a", "bc"], ["", "d"]]]
    assert received[2:] == received[:2]
    metadata = await client.sync("get_model_metadata", "texts")
    assert metadata["alternative_inputs"][0]["datatype"] == "BYTES"


async def test_classification(box: Box) -> None:
    schema = Schema(inputs=EVERY[-2:-1], outputs=EVERY[-2:-1], is_batched=True)
    labels = ["cat", "dog", "eel"]
    await box.connect("pets", msgspec.structs.replace(TENSOR, schema=schema, labels=labels))
    scores = np.array([[0.1, 0.7, 0.2], [3, 2, 1]], "f4")
    for is_binary in (True, False):
        answer = await Client(box).sync(
            "infer",
            "pets",
            [given("float32", scores, "FP32")],
            outputs=[triton.InferRequestedOutput("float32", binary_data=is_binary, class_count=2)],
        )
        texts = [
            each.decode() if isinstance(each, bytes) else each
            for each in answer.as_numpy("float32").reshape(-1)
        ]
        assert texts == ["0.700000:1:dog", "0.200000:2:eel", "3.000000:0:cat", "2.000000:1:dog"]
        assert answer.as_numpy("float32").shape == (2, 2)


async def test_it_costs_what_a_prediction_costs(box: Box, client: Client) -> None:
    async with box.http() as http:
        body = request_body()
        response = await http.post("/v2/models/doubler/infer", json=body)
        receipt = await box.receipt(response.headers["x-request-id"])
        assert (receipt["route"], receipt["outcome"]) == ("/v2/models/infer", "completed")
        assert receipt["amount_nano"] == 556 + 100
        body["inputs"][1]["data"] = [13, 1]
        response = await http.post("/v2/models/doubler/infer", json=body)
        assert (response.status_code, response.json()["code"]) == (500, "unlucky")
        receipt = await box.receipt(response.headers["x-request-id"])
        assert (receipt["outcome"], receipt["amount_nano"]) == ("failed", 0)


async def test_statistics_are_the_owner_s(box: Box, client: Client) -> None:
    box.fleet.targets["doubler"].link.stats = Stats(requests=3, rows=5, runs=2, device_ns=70)
    (stats,) = (await client.sync("get_inference_statistics", "doubler"))["model_stats"]
    assert (stats["inference_count"], stats["execution_count"]) == (5, 2)
    assert stats["inference_stats"]["compute_infer"] == {"count": 3, "ns": 70}
    everything = await client.sync("get_inference_statistics")
    assert {each["name"] for each in everything["model_stats"]} == {"doubler", "tiny"}
    with pytest.raises(InferenceServerException, match="owner") as refused:
        await Client(box, OTHER).sync("get_inference_statistics", "doubler")
    assert refused.value.status() == "403"


async def test_what_is_not_there_says_so(client: Client) -> None:
    calls: list[tuple[str, tuple[Any, ...], str, str]] = [
        ("get_system_shared_memory_status", (), "501", "binary data"),
        ("register_system_shared_memory", ("a", "/k", 8), "501", "binary data"),
        ("unregister_cuda_shared_memory", (), "501", "binary data"),
        ("get_trace_settings", (), "501", "operator"),
        ("update_trace_settings", ("doubler",), "501", "operator"),
        ("get_log_settings", (), "501", "operator"),
        ("load_model", ("doubler",), "501", "uploading"),
        ("get_model_metadata", ("absent",), "404", "does not exist"),
        ("get_model_metadata", ("tiny",), "400", "/v1/completions"),
        ("infer", ("tiny", []), "400", "/v1/completions"),
    ]
    for method, arguments, status, words in calls:
        with pytest.raises(InferenceServerException, match=words) as refused:
            await client.sync(method, *arguments)
        assert refused.value.status() == status, method
    with pytest.raises(InferenceServerException, match="API key") as refused:
        await client.sync("get_model_metadata", "doubler", headers={})
    assert refused.value.status() == "401"
    shared = triton.InferInput("x", [2, 2], "FP32")
    shared.set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match="shared memory"):
        await client.sync("infer", "doubler", [shared, both()[1]])


# --- byte by byte -----------------------------------------------------------------------


def request_body(**changes: Any) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]},
            {"name": "k", "datatype": "INT64", "shape": [2], "data": [1, 2]},
        ],
        **changes,
    }


def changed(index: int, **changes: Any) -> dict[str, Any]:
    body = request_body()
    body["inputs"][index] |= changes
    for name in [name for name, value in body["inputs"][index].items() if value is None]:
        del body["inputs"][index][name]
    return body


WRONG: list[tuple[Any, str]] = [
    ({}, "inputs is required"),
    ([], "Expected"),
    (request_body(inputs=[]), "'x' is missing: FP32 of shape [-1, 2]"),
    (request_body(inputs=request_body()["inputs"][:1]), "'k' is missing"),
    (request_body(inputs=request_body()["inputs"] * 2), "inputs[2] is the second 'x'"),
    (changed(0, name="y"), "inputs[0] is called 'y', but this model takes x, k"),
    (changed(0, datatype="FP64"), "is of datatype 'FP64'; 'x' is FP32"),
    (changed(1, datatype="BF16"), "is of datatype 'BF16'; 'k' is INT64"),
    (changed(0, datatype="FP33"), "is of datatype 'FP33'"),
    (changed(0, datatype="BYTES"), "must be the only one"),
    (changed(0, shape=[2, 3]), "the model takes [any, 2]"),
    (changed(0, shape=[-1, 2]), "a shape that no data has"),
    (changed(0, shape=[5, 2]), "at most 4"),
    (changed(0, shape=[2] * 40), "a shape that no data has"),
    (changed(0, shape=[10**4000, 10**4000]), "a shape that no data has"),
    (changed(0, shape=[2**62] * 32), "the model takes [any, 2]"),
    (changed(0, shape=[1, 2]), "holds 4 values; its shape needs 2"),
    (changed(0, shape="2, 2"), "inputs[0].shape"),
    (changed(0, data=["a"] * 4), "numbers only"),
    (changed(0, data=[[1, 2], [3]]), "ragged"),
    (changed(0, data=None), "neither data nor the parameter binary_data_size"),
    (changed(0, parameters={"binary_data_size": 16}), "both data and binary_data_size"),
    (changed(0, data=None, parameters={"binary_data_size": 16}), "announces 16 bytes, but 0"),
    (changed(0, data=None, parameters={"binary_data_size": -1}), "no number of bytes"),
    (changed(0, data=None, parameters={"binary_data_size": True}), "no number of bytes"),
    (changed(1, data=[1.5, 2]), "whole numbers"),
    (request_body(outputs=[{"name": "z"}]), "outputs[0] asks for 'z'"),
    (request_body(outputs=[{"name": "x"}, {"name": "x"}]), "outputs[1] asks for 'x' (again)"),
    (request_body(outputs=[{"name": "x", "parameters": {"binary_data": 1}}]), "true nor false"),
    (request_body(outputs=[{"name": "x", "parameters": {"classification": -1}}]), "classes"),
    (request_body(outputs=[{"name": "x", "parameters": {"shared_memory_region": "r"}}]), "shared"),
    (request_body(parameters={"sequence_id": 7}), "stateful"),
    (request_body(id="i" * 300), "256 characters"),
]


async def test_bad_requests_are_named(box: Box) -> None:
    async with box.http() as http:
        url = "/v2/models/doubler/infer"
        for body, words in WRONG:
            response = await http.post(url, json=body)
            assert response.status_code == 400, (body, response.text)
            assert words in response.json()["error"], response.text
            assert len(response.text) < 1_000
        response = await http.post(url, content=b"{")
        assert (response.status_code, "JSON" in response.json()["error"]) == (400, True)
        assert (await http.get("/api/usage")).json()["rows"] == []
        nested = changed(0, data=[[1, 2], [3, 4]])
        assert (await http.post(url, json=nested)).json()["outputs"][0]["data"] == [1, 2, 3, 4]


def binary_body(*sizes: int, rest: bytes) -> tuple[bytes, dict[str, str]]:
    body = request_body()
    for given, size in zip(body["inputs"], sizes, strict=True):
        del given["data"]
        given["parameters"] = {"binary_data_size": size}
    head = json.dumps(body).encode()
    return head + rest, {"Inference-Header-Content-Length": str(len(head))}


async def test_binary_bodies_of_wrong_lengths(box: Box) -> None:
    whole = X.tobytes() + K.tobytes()
    async with box.http() as http:
        url = "/v2/models/doubler/infer"
        content, headers = binary_body(16, 16, rest=whole)
        response = await http.post(url, content=content, headers=headers)
        assert response.status_code == 200, response.text
        wrong = [
            (binary_body(16, 16, rest=whole[:-1]), "announces 16 bytes, but 15 are left"),
            (binary_body(16, 16, rest=whole + b"x"), "1 bytes after the JSON"),
            (binary_body(12, 20, rest=whole), "has 12 bytes of data"),
            (binary_body(16, 2**70, rest=whole), "inputs[1]"),
        ]
        for (content, headers), words in wrong:
            response = await http.post(url, content=content, headers=headers)
            assert (response.status_code, words in response.json()["error"]) == (400, True)
        content, _ = binary_body(16, 16, rest=whole)
        for length in ("", "-1", "abc", "1e3", "99999", "9" * 30, "1.5", "٣"):
            headers = {"Inference-Header-Content-Length": length}
            raw = {name.encode(): value.encode() for name, value in headers.items()}
            response = await http.post(url, content=content, headers=raw)
            assert response.status_code == 400, (length, response.text)


async def test_texts_cut_short(box: Box) -> None:
    await box.connect("texts", TEXTS)
    one = struct.pack("<I", 3) + b"abc"
    wrong: list[tuple[bytes, list[int], str]] = [
        (one[:2], [1], "cut short"),
        (one[:-1], [1], "cut short"),
        (struct.pack("<I", 2**32 - 1), [1], "cut short"),
        (struct.pack("<I", 1) + b"\xff", [1], "UTF-8"),
        (one, [2], "holds 1 texts; its shape is [2]"),
        (one, [1, 1, 1], "texts are [rows]"),
        (one * 3, [1, 3], "texts[0] has 3 texts"),
        (b"", [0], "texts are [rows]"),
    ]
    async with box.http() as http:
        for chunk, shape, words in wrong:
            given = {"name": "t", "datatype": "BYTES", "shape": shape,
                     "parameters": {"binary_data_size": len(chunk)}}  # fmt: skip
            head = json.dumps({"inputs": [given]}).encode()
            headers = {"Inference-Header-Content-Length": str(len(head))}
            response = await http.post(
                "/v2/models/texts/infer", content=head + chunk, headers=headers
            )
            assert (response.status_code, words in response.json()["error"]) == (400, True), words
        for data in ([1], "a", [["a", 2]], [[["a"]]]):
            given = {"name": "t", "datatype": "BYTES", "shape": [1], "data": data}
            response = await http.post("/v2/models/texts/infer", json={"inputs": [given]})
            assert (response.status_code, "texts" in response.json()["error"]) == (400, True)
        given = {"name": "t", "datatype": "BYTES", "shape": [1], "data": ["a"]}
        response = await http.post("/v2/models/doubler/infer", json={"inputs": [given]})
        assert (response.status_code, response.json()["code"]) == (400, "no_texts")


async def test_errors_keep_the_protocol_s_form(box: Box) -> None:
    async with box.http() as http:
        wrong = [
            (await http.get("/v2/nothing/here"), 404),
            (await http.post("/v2/models/doubler/infer", content=b"x" * (11 << 20)), 413),
            (await http.post("/v2/models/doubler/versions/x/infer", json=request_body()), 404),
        ]
        for response, status in wrong:
            assert (response.status_code, type(response.json()["error"])) == (status, str)
        box.fleet.targets["doubler"].link.close("was stopped")
        response = await http.post("/v2/models/doubler/infer", json=request_body())
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["code"] == "worker_lost"


async def test_packed_bodies_are_bounded(box: Box) -> None:
    body = json.dumps(request_body()).encode()
    async with box.http() as http:
        url = "/v2/models/doubler/infer"
        cases = [
            (gzip.compress(body), "gzip", 200),
            (zlib.compress(body), "deflate", 200),
            (zlib.compress(body)[2:-4], "deflate", 200),
            (body, "identity", 200),
            (gzip.compress(body)[:-9], "gzip", 400),
            (gzip.compress(body) * 2, "gzip", 400),
            (body, "gzip", 400),
            (body, "deflate", 400),
            (body, "br", 415),
            (gzip.compress(bytes(64 << 20)), "gzip", 413),
        ]
        for content, encoding, status in cases:
            headers = {"content-encoding": encoding}
            response = await http.post(url, content=content, headers=headers)
            assert response.status_code == status, (encoding, response.text)


def test_packing() -> None:
    for encoding in ("gzip", "deflate"):
        assert unpacked(packed(b"abc", encoding), encoding, 3) == b"abc"
        with pytest.raises(TooLarge):
            unpacked(packed(b"abcd", encoding), encoding, 3)
        with pytest.raises(InvalidRequest):
            unpacked(b"", encoding, 3)
    with pytest.raises(UnsupportedMediaType):
        unpacked(b"", "zstd", 3)
    headers = {"": "", "br": "", "br, gzip": "gzip", "GZIP;q=0.5": "gzip", "gzip; q=0.0": "",
               "deflate, gzip": "deflate", "*": ""}  # fmt: skip
    assert {header: accepted_encoding(header) for header in headers} == headers


@pytest.mark.parametrize("manifest", [TENSOR, TEXTS], ids=["numbers", "texts"])
def test_whatever_is_broken_is_refused_in_words(manifest: Any) -> None:
    """Bytes anywhere, lengths anywhere: a typed refusal or a request, never another error."""
    random = np.random.default_rng(0)
    content, headers = binary_body(16, 16, rest=X.tobytes() + K.tobytes())
    length = int(headers["Inference-Header-Content-Length"])
    texts = json.dumps({"inputs": [{"name": "t", "datatype": "BYTES", "shape": [2],
                                    "parameters": {"binary_data_size": 10}}]}).encode()  # fmt: skip
    bodies = [(content, length), (texts + struct.pack("<IbIb", 1, 97, 1, 98), len(texts))]
    num_taken = 0
    for body, json_length in bodies:
        for _ in range(1500):
            broken = bytearray(body)
            for at in random.integers(0, len(broken), random.integers(0, 4)):
                broken[at] = random.choice(np.frombuffer(b'0129-.[]{}",:eE \xff\x00', "u1"))
            moved = json_length + int(random.choice([0, 0, 0, 0, 1, -1, 50]))
            with contextlib.suppress(InvalidRequest):
                asked = read_infer(bytes(broken), str(moved), manifest, manifest.schema)
                assert (asked.given.inputs is None) != (asked.given.texts is None)
                num_taken += 1
    assert 100 < num_taken < 2500
