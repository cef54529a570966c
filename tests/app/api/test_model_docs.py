"""What a model's own documentation promises, held against what the box takes and answers."""

from typing import Any

import httpx
import msgspec
import pytest

from app.core import clock
from app.organizations.signins import COOKIE, SignIns
from app.organizations.tables import Membership, User
from runtime.protocol import Manifest, Schema, TensorSpec
from tests.app.api.conftest import ORGANIZATION, Box
from tests.app.api.schemas import check_document, fits
from tests.app.api.scripted_worker import TENSOR
from tests.app.api.test_inference_v2 import changed, request_body
from tests.app.api.test_predict import ROWS, WRONG
from tests.app.api.test_predict_bodies import PICTURES, TEXTS

PREDICT, INFER = "/models/{}/predict", "/v2/models/{}/infer"
# What no schema can say: that rows of two arrays are as many, and what overflows a float.
UNSAYABLE = ("different lengths", "too large for float32")


async def described(box: Box, name: str) -> dict[str, Any]:
    async with box.http() as http:
        response = await http.get(f"/models/{name}/openapi.json")
    assert response.status_code == 200, response.text
    check_document(response.json())
    return response.json()


def body_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    return content["application/json"]["schema"]


def answer_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    return content["application/json"]["schema"]


async def test_bodies_fit_exactly_if_the_box_takes_them(box: Box) -> None:
    document = await described(box, "doubler")
    path = PREDICT.format("doubler")
    sent, answered = body_schema(document, path), answer_schema(document, path)
    bodies: list[Any] = [
        {"inputs": inputs}
        for inputs, _, words in WRONG
        if not any(unsayable in words for unsayable in UNSAYABLE)
    ]
    bodies += [{"inputs": ROWS}, {}, {"texts": ["a"]}]
    async with box.http() as http:
        for body in bodies:
            response = await http.post(path, json=body)
            assert fits(body, sent, document) == response.is_success, (body, response.text)
            if response.is_success:
                assert fits(response.json(), answered, document)
            else:
                errors = document["paths"][path]["post"]["responses"][str(response.status_code)]
                error = errors["content"]["application/json"]["schema"]
                assert fits(response.json(), error, document)


async def test_bodies_of_the_open_protocol(box: Box) -> None:
    document = await described(box, "doubler")
    path = INFER.format("doubler")
    sent, answered = body_schema(document, path), answer_schema(document, path)
    good = [
        request_body(),
        request_body(id="a", outputs=[{"name": "k"}]),
        changed(0, data=[[1, 2], [3, 4]]),
    ]
    bad = [
        {},
        request_body(inputs=[]),
        changed(0, name="y"),
        changed(0, datatype="FP64"),
        changed(0, shape=[2, 3]),
        changed(0, shape=[5, 2]),
        request_body(outputs=[{"name": "z"}]),
        request_body(id="i" * 300),
    ]
    async with box.http() as http:
        for body in good + bad:
            response = await http.post(path, json=body)
            assert fits(body, sent, document) == response.is_success, (body, response.text)
            if response.is_success:
                assert fits(response.json(), answered, document)


async def test_examples_run(box: Box) -> None:
    small = msgspec.structs.replace(
        TENSOR,
        schema=Schema(
            inputs=[
                TensorSpec(name="a", dtype="float16", shape=[None, 2, 3], minimum=1, maximum=9),
                TensorSpec(name="b", dtype="bool", shape=[None]),
            ],
            outputs=[
                TensorSpec(name="a", dtype="float16", shape=[None, 2, 3]),
                TensorSpec(name="b", dtype="bool", shape=[None]),
            ],
            is_batched=True,
        ),
    )
    manifests: dict[str, Manifest] = {"texts": TEXTS, "small": small}
    for name, manifest in manifests.items():
        await box.connect(name, manifest)
        document = await described(box, name)
        path = PREDICT.format(name)
        media = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert fits(media["example"], media["schema"], document)
        async with box.http() as http:
            response = await http.post(path, json=media["example"])
        assert response.status_code == 200, response.text
        assert fits(response.json(), answer_schema(document, path), document)


async def test_texts_and_images_are_bodies_where_the_model_takes_them(box: Box) -> None:
    await box.connect("texts", TEXTS)
    await box.connect("pictures", PICTURES)
    texts, pictures = await described(box, "texts"), await described(box, "pictures")
    schema = body_schema(texts, PREDICT.format("texts"))
    for body, is_fit in (
        ({"texts": ["a", ["b", "c"]]}, True),
        ({"texts": [["a", "b", "c"]]}, False),
        ({"texts": []}, False),
        ({"inputs": {"ids": [[1.5]]}}, True),
        ({"inputs": [[1.5]]}, True),
        ({"inputs": [[1.5]], "texts": ["a"]}, False),
    ):
        assert fits(body, schema, texts) == is_fit, body
    paths = (PREDICT.format("pictures"), INFER.format("pictures"))
    content = pictures["paths"][paths[0]]["post"]["requestBody"]["content"]
    assert {"image/png", "image/jpeg", "application/x-npy", "application/x-npz"} <= set(content)
    assert "resized to 8 x 8, grey" in pictures["info"]["description"]
    given = {"name": "any", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    assert fits({"inputs": [given]}, body_schema(texts, INFER.format("texts")), texts)
    assert not fits({"inputs": [given]}, body_schema(pictures, paths[1]), pictures)


async def test_the_page_shows_the_model(box: Box) -> None:
    await box.connect("texts", TEXTS)
    await box.connect("pictures", PICTURES)
    async with box.http() as http:
        page = await http.get("/models/doubler/docs")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert page.headers["cache-control"] == "no-store"
        assert page.headers["content-type"].startswith("text/html")
        for words in ("/models/doubler/predict", "inputs.x", "float32 [any, 2]", "openapi.json"):
            assert words in page.text
        assert "--data-binary @image.png" in (await http.get("/models/pictures/docs")).text
        assert "texts" in (await http.get("/models/texts/docs")).text


@pytest.mark.parametrize("page", ["openapi.json", "docs"])
async def test_only_callers_see_it(box: Box, page: str) -> None:
    async with box.http() as http:
        assert (await http.get(f"/models/absent/{page}")).status_code == 404
        response = await http.get(f"/models/tiny/{page}")
        assert (response.status_code, response.json()["error"]["code"]) == (
            400,
            "wrong_kind_of_model",
        )
        response = await http.get(f"/models/doubler/{page}", headers={"authorization": ""})
        assert response.status_code == 401


async def test_types_that_the_protocol_lacks_are_left_out(box: Box) -> None:
    spec = TensorSpec(name="z", dtype="complex64", shape=[None])
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    await box.connect("waves", msgspec.structs.replace(TENSOR, schema=schema))
    document = await described(box, "waves")
    assert list(document["paths"]) == [PREDICT.format("waves")]
    async with box.http() as http:
        response = await http.post(INFER.format("waves"), json={"inputs": []})
        assert response.json()["code"] == "unsupported_datatype"


async def test_labels_are_part_of_a_classifier_s_answer(box: Box) -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=[None, 3])
    schema = Schema(inputs=[spec], outputs=[spec], is_batched=True)
    labels = ["cat", "dog", "eel"]
    await box.connect("pets", msgspec.structs.replace(TENSOR, schema=schema, labels=labels))
    document, path = await described(box, "pets"), PREDICT.format("pets")
    answered = answer_schema(document, path)
    async with box.http() as http:
        answer = (await http.post(path, json={"inputs": [[0.0, 2.0, 1.0]]})).json()
    assert fits(answer, answered, document)
    assert answer["labels"][0][0]["label"] == "dog"
    answer["labels"][0][0]["label"] = 1
    assert not fits(answer, answered, document)


async def test_who_is_signed_in_at_the_console_may_read_it(box: Box) -> None:
    user = User(id="usr_1", email="ada@example.com", password_hash="", created_at=clock.now())
    async with box.database.write() as session:
        session.add(user)
        await session.flush()
        session.add(
            Membership(
                id="mem_1",
                user_id=user.id,
                organization_id=ORGANIZATION,
                role="member",
                created_at=clock.now(),
            )
        )
    signed_in = await SignIns(box.database, session_days=1).open(user)
    async with httpx.AsyncClient(base_url=box.url, cookies={COOKIE: signed_in.token}) as browser:
        assert (await browser.get("/models/doubler/docs")).status_code == 200
        asked = await browser.post("/models/doubler/predict", json={"inputs": ROWS})
        assert asked.status_code == 401
    async with httpx.AsyncClient(base_url=box.url, cookies={COOKIE: "forged"}) as browser:
        assert (await browser.get("/models/doubler/docs")).status_code == 401
