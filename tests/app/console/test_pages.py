"""What the pages show and do, over real services."""

import re

import msgspec
import pytest
from sqlalchemy import select

from app.console import live
from app.core import clock
from app.core.errors import StorageFull
from app.deployments.logs import LogFile, build_log_name
from app.deployments.optimisation_rows import enqueue, require_active
from app.deployments.tables import Deployment, Endpoint
from app.organizations.people import create_person, hashed
from app.organizations.service import create_organization
from app.organizations.tables import ApiKey
from app.registry.tables import Model, ModelVersion
from app.registry.uploads import UploadStore
from runtime.protocol import Check, Manifest
from tests.app.console.conftest import ORIGIN, Console
from tests.app.console.samples import (
    DECODER,
    EMBEDDER,
    OPTIMISED,
    RECEIPT,
    TENSOR,
    UNPAGED,
    add_model,
    add_usage,
    organization_id,
)

REFUSAL = "This is a pickled module. Export it instead:\n    torch.export.save(program, 'm.pt2')"


# --- models -----------------------------------------------------------------------------


async def test_the_empty_list_teaches(owned: Console) -> None:
    page = await owned.client.get("/console/models")
    assert "No models yet" in page.text
    assert "tapeout push ./model.pt2 --name my-model" in page.text
    assert f"TAPEOUT_URL={ORIGIN}" in page.text


async def test_the_list_tells_each_models_state(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "digits")
        await add_model(session, "waiting", "queued")
        await add_model(session, "running", "building", progress_permille=618)
        await add_model(session, "refused", "failed", error_message=REFUSAL)
    page = (await owned.client.get("/console/models")).text
    lamps = re.findall(r'<strong>(.+?)</strong>.*?class="lamp (\w*)">(.+?)<', page, re.DOTALL)
    assert sorted(lamps) == [
        ("digits", "good", "ready"),
        ("refused", "bad", "cannot be served"),
        ("running", "busy", "building, 61 %"),
        ("waiting", "busy", "waiting to build"),
    ]


async def test_a_tensor_models_page_has_schema_proof_endpoint_and_snippets(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "digits")
    page = (await owned.client.get("/console/models/digits")).text
    for shown in ("images", "1 \N{MULTIPLICATION SIGN} 8", "logits", "proven equal", "1.4e-06",
                  "412 MB", f"curl -sS {ORIGIN}/models/digits/predict", "2.31 ms",
                  "As uploaded"):  # fmt: skip
        assert shown in page, shown


async def test_a_receipt_shows_every_form_that_was_measured_and_why_it_won_or_lost(
    owned: Console,
) -> None:
    async with owned.database.write() as session:
        await add_model(session, "fast", receipt=OPTIMISED)
    page = (await owned.client.get("/console/models/fast")).text
    for shown in ("ONNX Runtime", "AOTInductor, bfloat16", "other answers", "loses accuracy",
                  "<svg class=\"chart lengths wide\"", "5.00x", "98.20 %", "189 MB"):  # fmt: skip
        assert shown in page, shown
    assert page.index("ONNX Runtime, int8") < page.index("No C++ compiler"), "measured ones first"


async def test_the_search_for_a_faster_form_is_shown_and_can_be_stopped_and_begun_again(
    owned: Console,
) -> None:
    async with owned.database.write() as session:
        version = await add_model(session, "searching")
        await enqueue(session, version, "asked")
    page = (await owned.client.get("/console/models/searching")).text
    assert "Looking for a faster form" in page
    assert "Waiting for its turn" in page
    path = "/console/models/searching"
    await owned.post(path, f"{path}/versions/1/optimise/cancel")
    async with owned.database.write() as session:
        row = await require_active(session, version.id)
        row.status = "cancelled"
    page = (await owned.client.get(path)).text
    assert "The search was stopped." in page
    assert "Look again" in page
    await owned.post(path, f"{path}/versions/1/optimise")
    assert owned.optimiser.told == [("cancel", version.id), ("ask", version.id)]


@pytest.mark.parametrize(
    ("manifest", "is_offered"), [(TENSOR, True), (EMBEDDER, True), (DECODER, False)]
)
async def test_a_faster_form_is_offered_for_what_has_one(
    owned: Console, manifest: Manifest, is_offered: bool
) -> None:
    async with owned.database.write() as session:
        await add_model(session, "m", manifest=manifest)
    page = (await owned.client.get("/console/models/m")).text
    assert ("Look for a faster form" in page) == is_offered


async def test_a_decoders_page_has_its_facts_and_an_openai_snippet(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "llama", manifest=DECODER)
    page = (await owned.client.get("/console/models/llama")).text
    for shown in ("LlamaForCausalLM", "1,024", "from openai import OpenAI", "8.2 kB"):
        assert shown in page, shown


async def test_an_embedders_page_has_its_facts_and_the_route_for_it(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "minilm", manifest=EMBEDDER)
    page = (await owned.client.get("/console/models/minilm")).text
    for shown in ("BertModel", "384", "256", "mean, to length 1", "texts of similar lengths",
                  "/v1/embeddings", "client.embeddings.create"):  # fmt: skip
        assert shown in page, shown
    assert "Embedder, 22.7M parameters" in (await owned.client.get("/console/models")).text


async def test_a_refused_model_says_what_to_run_instead(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "refused", "failed", error_message=REFUSAL)
    page = (await owned.client.get("/console/models/refused")).text
    assert "<p>This is a pickled module. Export it instead:</p>" in page
    assert "<pre>torch.export.save(program, &#39;m.pt2&#39;)</pre>" in page


async def test_what_a_build_prints_is_shown_and_never_interpreted(owned: Console) -> None:
    async with owned.database.write() as session:
        version = await add_model(session, "running", "building", phase="prove", phase_detail="<b>")
    log = LogFile(owned.storage.log(build_log_name(version.id)))
    log.write(b"<script>alert(1)</script>\n")
    log.close()
    page = (await owned.client.get("/console/models/running")).text
    assert "Proving" in page
    assert "&lt;b&gt;" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>" not in page
    whole = await owned.client.get("/console/models/running/versions/1/log")
    assert whole.headers["content-type"].startswith("text/plain")
    assert "<script>alert(1)</script>" in whole.text


async def test_another_organizations_model_is_not_there(owned: Console) -> None:
    async with owned.database.write() as session:
        await create_organization(session, "other")
        await add_model(session, "theirs", owner="other")
        request_id = await add_usage(session, owner="other")
    for path in ("models/theirs", "models/theirs/versions/1", "models/theirs/versions/1/events",
                 "models/theirs/versions/1/log", "models/theirs/delete",
                 f"receipts/{request_id}"):  # fmt: skip
        assert (await owned.client.get(f"/console/{path}")).status_code == 404, path
    for path in ("versions/1/cancel", "endpoint/stop", "endpoint/publish", "delete"):
        target = f"/console/models/theirs/{path}"
        done = await owned.post("/console/keys", target, confirmation="theirs")
        assert done.status == 404, path
    assert "theirs" not in (await owned.client.get("/console/models")).text
    assert "No requests in this period" in (await owned.client.get("/console/usage")).text


async def test_a_build_can_be_cancelled(owned: Console) -> None:
    async with owned.database.write() as session:
        version = await add_model(session, "running", "building")
    done = await owned.post("/console/models/running", "/console/models/running/versions/1/cancel")
    assert (done.status, owned.builder.cancelled) == (303, [version.id])


async def test_an_endpoint_is_stopped_started_and_published(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "digits")
    for verb in ("stop", "publish"):
        done = await owned.post("/console/models/digits", f"/console/models/digits/endpoint/{verb}")
        assert done.status == 303
    async with owned.database.read() as session:
        assert (await session.scalars(select(Deployment))).one().is_stopped
        assert (await session.scalars(select(Endpoint))).one().is_public
    page = (await owned.client.get("/console/models/digits")).text
    assert "Make private" in page
    assert ">Start<" in page
    refused = await owned.post("/console/models/digits", "/console/models/digits/endpoint/explode")
    assert refused.status == 400


async def test_an_older_version_can_be_served_again(owned: Console) -> None:
    async with owned.database.write() as session:
        first = await add_model(session, "digits")
        second = ModelVersion(
            **{c.key: getattr(first, c.key) for c in ModelVersion.__table__.columns}
            | {"id": "version_2", "number": 2}
        )
        session.add(second)
    page = "/console/models/digits"
    for number in ("", "-1", "9" * 5000):
        refused = await owned.post(page, f"{page}/endpoint/rollback", version=number)
        assert refused.status == 400
    done = await owned.post(page, f"{page}/endpoint/rollback", version="2")
    assert done.status == 303
    shown = (await owned.client.get(page)).text
    assert re.search(r"Serves</dt><dd>version 2", shown)


async def test_a_model_is_deleted_once_its_name_was_typed(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "digits")
    path = "/console/models/digits/delete"
    refused = await owned.post(path, path, confirmation="digit")
    assert refused.status == 400
    assert "exactly as it is written" in refused.text
    done = await owned.post(path, path, confirmation="digits")
    assert done.location == "/console/models?notice=deleted"
    async with owned.database.read() as session:
        assert (await session.scalars(select(Model))).all() == []


async def test_htmx_gets_a_redirect_it_understands_and_errors_as_a_part(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "digits")
    token = await owned.csrf_token("/console/models/digits")
    headers = {"Origin": ORIGIN, "HX-Request": "true", "X-CSRF-Token": token}
    done = await owned.client.post("/console/models/digits/endpoint/stop", headers=headers)
    assert done.status_code == 204
    assert done.headers["hx-redirect"].startswith("/console/models/digits")
    refused = await owned.client.post("/console/models/nothing/endpoint/stop", headers=headers)
    assert refused.status_code == 404
    assert "<html" not in refused.text
    assert "data-message" in refused.text


# --- live -------------------------------------------------------------------------------


async def test_the_stream_sends_what_the_page_does_not_show_yet(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_SECONDS", 0)  # one look, then the end
    async with owned.database.write() as session:
        version = await add_model(session, "running", "building", progress_permille=100)
    page = (await owned.client.get("/console/models/running")).text
    found = re.search(r'sse-connect="([^"]+)"', page)
    assert found
    events = re.compile(r"^event: (\S+)", re.MULTILINE)
    nothing_new = await owned.client.get(found[1])
    assert nothing_new.headers["content-type"].startswith("text/event-stream")
    assert events.findall(nothing_new.text) == ["done"]
    async with owned.database.write() as session:
        (await session.get_one(ModelVersion, version.id)).progress_permille = 750
    news = await owned.client.get(found[1])
    assert events.findall(news.text) == ["build", "status", "versions", "done"]
    assert "building, 75 %" in news.text


# --- keys -------------------------------------------------------------------------------


async def test_a_key_is_shown_once_and_revoked(owned: Console) -> None:
    made = await owned.post(
        "/console/keys", "/console/keys", name="CI", scope=["read", "write"], expiry="30"
    )
    found = re.search(r'id="secret" readonly value="(tp-[^"]+)"', made.text)
    assert found
    page = (await owned.client.get("/console/keys")).text
    assert found[1] not in page
    assert found[1][:10] in page
    async with owned.database.read() as session:
        key = (await session.scalars(select(ApiKey).where(ApiKey.name == "CI"))).one()
    assert set(key.scopes) == {"read", "write"}
    assert key.expires_at is not None
    assert 29 <= (key.expires_at - clock.now()).days <= 30
    path = f"/console/keys/{key.id}/revoke"
    assert (await owned.post(path, path)).location == "/console/keys?notice=revoked"
    assert "revoked" in (await owned.client.get("/console/keys")).text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "", "scope": "read"}, "needs a name"),
        ({"name": "x"}, "one or more scopes"),
        ({"name": "x", "scope": "everything"}, "one or more scopes"),
        ({"name": "x", "scope": "read", "expiry": "9e9"}, "from the list"),
    ],
)
async def test_a_key_that_cannot_be_made_says_why(
    owned: Console, fields: dict[str, str], message: str
) -> None:
    refused = await owned.post("/console/keys", "/console/keys", **fields)
    assert refused.status == 400
    assert message in refused.text


# --- usage ------------------------------------------------------------------------------


async def test_usage_adds_up_and_leads_to_receipts(owned: Console) -> None:
    async with owned.database.write() as session:
        request_id = await add_usage(session)
        await add_usage(session, cached=0)
    page = (await owned.client.get("/console/usage?period=7d")).text
    # 500 in at $0.10/M, 1,000 cached at $0.01/M, 100 out at $0.40/M, twice but for the cache.
    for shown in ("$0.000190", "2,000", "1,000 from the cache, 50 %", "$0.000090", "Web shop"):
        assert shown in page, shown
    assert page.count('class="chart wide"') == 1
    assert f"/console/receipts/{request_id}" in page
    receipt = (await owned.client.get(f"/console/receipts/{request_id}")).text
    for shown in ("$0.000100100", "$0.000010000", "after 40 ms"):
        assert shown in receipt, shown


async def test_what_is_served_uncached_says_so_on_its_page_and_receipts(owned: Console) -> None:
    async with owned.database.write() as session:
        await add_model(session, "state", manifest=UNPAGED)
        request_id = await add_usage(session, model="state")
    said = "Served uncached: every token recomputes the whole sequence."
    for path in ("models/state", f"receipts/{request_id}"):
        page = (await owned.client.get(f"/console/{path}")).text
        assert said in page, path
        assert "It keeps a recurrent state." in page, path


async def test_a_proof_is_shown_by_the_forms_it_was_about(owned: Console) -> None:
    checks = [
        Check(
            name=name,
            form=form,
            is_equal=name != "batched",
            detail="all prompts",
            error=3e-6 if name != "batched" else 0.5,
            tolerance=4e-5,
            num_judged=90,
            num_same=90 if name != "batched" else 13,
            seconds=1.5,
        )
        for form, names in (("eager, float32", ["paged"]), ("fused, float32", ["paged", "batched"]))
        for name in names
    ]
    receipt = msgspec.structs.replace(
        RECEIPT, checks=checks, route="Paged by rewriting its graph.", notes=["A note."]
    )
    async with owned.database.write() as session:
        await add_model(session, "llama", manifest=DECODER, receipt=receipt)
    page = " ".join((await owned.client.get("/console/models/llama")).text.split())
    assert "Paged by rewriting its graph." in page
    assert "1 of 1 checks equal, 90 of 90 tokens, error at most 3e-06 of 4e-05 allowed" in page
    assert "1 of 2 checks equal, 103 of 180 tokens, error at most 0.5 of 4e-05 allowed" in page
    assert page.count("differs</span>") == 1
    assert "A note." in page


async def test_usage_before_the_first_call_teaches(owned: Console) -> None:
    page = (await owned.client.get("/console/usage?period=12345")).text
    assert "No requests in this period" in page
    assert "30 days" in page


# --- uploads ----------------------------------------------------------------------------


async def test_tus_goes_on_from_the_offset(owned: Console) -> None:
    token = await owned.csrf_token("/console/upload")
    headers = {"Origin": ORIGIN, "X-CSRF-Token": token, "Tus-Resumable": "1.0.0"}
    metadata = "filename YS5wdDI=,name YS1tb2RlbA=="  # a.pt2, a-model
    made = await owned.client.post(
        "/console/uploads",
        headers=headers | {"Upload-Length": "8", "Upload-Metadata": metadata},
    )
    assert made.status_code == 201
    path = made.headers["location"]
    patch = headers | {"Content-Type": "application/offset+octet-stream"}
    first = await owned.client.patch(path, content=b"abcd", headers=patch | {"Upload-Offset": "0"})
    assert (first.status_code, first.headers["upload-offset"]) == (204, "4")
    wrong = await owned.client.patch(path, content=b"xx", headers=patch | {"Upload-Offset": "2"})
    assert wrong.status_code == 409
    head = await owned.client.head(path, headers=headers)
    assert (head.headers["upload-offset"], head.headers["upload-length"]) == ("4", "8")
    last = await owned.client.patch(path, content=b"efgh", headers=patch | {"Upload-Offset": "4"})
    assert last.headers["upload-offset"] == "8"
    upload_id = path.rsplit("/", 1)[1]
    assert owned.storage.upload(upload_id).read_bytes() == b"abcdefgh"

    refused = await owned.client.post(
        "/console/versions", headers=headers, data={"upload_id": upload_id, "name": "a-model"}
    )
    assert refused.status_code == 422
    assert "torch.export.save" in refused.text
    gone = await owned.client.head(path, headers=headers)
    assert gone.status_code == 404  # it does not keep its place


async def test_an_upload_without_the_sessions_token_is_refused(owned: Console) -> None:
    refused = await owned.client.post(
        "/console/uploads", headers={"Origin": ORIGIN, "Upload-Length": "8"}
    )
    assert refused.status_code == 403


@pytest.mark.parametrize("header", ["Upload-Length", "Upload-Metadata"])
async def test_a_malformed_tus_header_is_named(owned: Console, header: str) -> None:
    token = await owned.csrf_token("/console/upload")
    headers = {"Origin": ORIGIN, "X-CSRF-Token": token, "Tus-Resumable": "1.0.0",
               "Upload-Length": "8", "Upload-Metadata": "name YQ=="}  # fmt: skip
    refused = await owned.client.post("/console/uploads", headers=headers | {header: "name !!"})
    assert refused.status_code == 400
    assert header in refused.text


# --- errors -----------------------------------------------------------------------------


async def test_an_error_is_a_page_that_says_what_to_do(
    owned: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise StorageFull("The disk is full. Delete models you no longer need.")

    monkeypatch.setattr(UploadStore, "create", full)
    token = await owned.csrf_token("/console/upload")
    answer = await owned.client.post(
        "/console/uploads",
        headers={"Origin": ORIGIN, "X-CSRF-Token": token, "Tus-Resumable": "1.0.0",
                 "Upload-Length": "8", "Upload-Metadata": "name YQ=="},
    )  # fmt: skip
    assert answer.status_code == 507
    assert "Delete models you no longer need." in answer.text


async def test_a_fault_shows_an_id_and_nothing_of_the_inside(
    owned: Console, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("app.console.models.read_models", broken)
    answer = await owned.client.get("/console/models")
    assert answer.status_code == 500
    assert "secret detail" not in answer.text
    assert "Traceback" not in answer.text
    found = re.search(r"err_\w{26}", answer.text)
    assert found
    assert found[0] in caplog.text


async def test_a_member_may_not_manage_keys(owned: Console) -> None:
    async with owned.database.write() as session:
        await create_person(
            session, await organization_id(session), "bob@example.com",
            await hashed("some other words"), "member",
        )  # fmt: skip
    owned.client.cookies.clear()
    done = await owned.post(
        "/console/sign-in", "/console/sign-in", email="bob@example.com", password="some other words"
    )
    assert done.status == 303
    refused = await owned.client.get("/console/keys")
    assert refused.status_code == 403
    assert "may not manage keys" in refused.text
    assert (await owned.client.get("/console/models")).status_code == 200
