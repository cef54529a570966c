"""Rows that a page shows: models in every state, and a day's usage."""

from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.ids import new_id
from app.deployments.service import deploy_version
from app.deployments.tables import Deployment, Replica
from app.metering.hours import hour_of
from app.metering.series import SeriesKey
from app.metering.tables import UsageEvent, UsageHour, UsageLine, UsageSeries
from app.organizations.tables import Organization
from app.registry.tables import Model, ModelVersion
from runtime.protocol import (
    BuildReceipt,
    CandidateReport,
    Check,
    DecoderInfo,
    EmbedderInfo,
    Manifest,
    Schema,
    TensorSpec,
)

DECODER = Manifest(
    kind="decoder",
    format="huggingface",
    num_parameters=3_412_736,
    weight_bytes=13_650_944,
    decoder=DecoderInfo(
        architecture="LlamaForCausalLM",
        vocab_size=4096,
        max_context_tokens=1024,
        num_layers=4,
        kv_bytes_per_token=8192,
        dtype="float32",
        has_tokenizer=True,
        has_chat_template=True,
    ),
)
EMBEDDER = Manifest(
    kind="embedder",
    format="huggingface",
    num_parameters=22_713_216,
    weight_bytes=90_852_864,
    embedder=EmbedderInfo(
        architecture="BertModel",
        dimensions=384,
        vocab_size=30_522,
        max_tokens=256,
        dtype="float32",
        pooling="mean",
        is_normalized=True,
        special_tokens=2,
        batching="padded",
    ),
)
TENSOR = Manifest(
    kind="tensor",
    format="pt2",
    num_parameters=52_138,
    weight_bytes=208_552,
    schema=Schema(
        inputs=[TensorSpec(name="images", dtype="float32", shape=[None, 1, 8, 8])],
        outputs=[TensorSpec(name="logits", dtype="float32", shape=[None, 10])],
        is_batched=True,
    ),
)
UNPAGED = Manifest(
    kind="decoder",
    format="pt2",
    num_parameters=44_160,
    weight_bytes=176_640,
    decoder=DecoderInfo(
        architecture="MambaForCausalLM",
        vocab_size=96,
        max_context_tokens=256,
        num_layers=3,
        kv_bytes_per_token=0,
        dtype="float32",
        has_tokenizer=False,
        has_chat_template=False,
        is_paged=False,
        unpaged_reason="It keeps a recurrent state.",
    ),
)
RECEIPT = BuildReceipt(
    verdict="equal",
    checks=[
        Check(
            name="batched against single",
            is_equal=True,
            detail="64 rows",
            error=1.4e-6,
            tolerance=4.2e-5,
        )
    ],
    candidates=[
        CandidateReport(
            name="eager", is_chosen=True, reason="the only form", p50_ms={1: 2.31, 8: 4.9}
        )
    ],
    phase_seconds={"import": 1.9, "prove": 6.3},
    torch_version="2.13.0",
    device="cpu",
)
OPTIMISED = msgspec.structs.replace(
    RECEIPT,
    environment="torch 2.13.0, onnxruntime 1.31.1, AMD EPYC, 2 threads",
    candidates=[
        CandidateReport(
            name="eager",
            is_chosen=False,
            fate="slower",
            reason="as uploaded, what the others are compared with",
            precision="float32",
            p50_ms={1: 0.19, 8: 0.47, 32: 1.3, 128: 4.8},
            p99_ms={1: 0.25, 8: 0.6, 32: 1.9, 128: 6.1},
            memory_bytes=402_000_000,
            error=0.0,
        ),
        CandidateReport(
            name="onnxruntime",
            is_chosen=True,
            fate="chosen",
            reason="5.0 times as fast as uploaded (at least 4.8 with 95 % certainty).",
            precision="float32",
            p50_ms={1: 0.038, 8: 0.094, 32: 0.26, 128: 0.96},
            p99_ms={1: 0.05, 8: 0.13, 32: 0.4, 128: 1.3},
            memory_bytes=189_000_000,
            error=0.21,
            prepare_seconds=3.1,
        ),
        CandidateReport(
            name="aot_inductor_bfloat16",
            is_chosen=False,
            fate="differs",
            reason="gives other answers than it may: 14 times what is allowed at a batch of 8",
            precision="bfloat16",
            p50_ms={1: 0.1, 8: 0.2, 32: 0.6, 128: 2.2},
            error=14.0,
        ),
        CandidateReport(
            name="onnxruntime_int8",
            is_chosen=False,
            fate="lossy",
            reason="changes the answers, which the owner has not allowed",
            precision="int8",
            p50_ms={1: 0.03, 8: 0.08, 32: 0.2, 128: 0.7},
            error=310.0,
            top_1_agreement=0.982,
        ),
        CandidateReport(
            name="inductor",
            is_chosen=False,
            fate="unavailable",
            reason="No C++ compiler is on this box.",
        ),
    ],
)


async def organization_id(session: AsyncSession, name: str = "default") -> str:
    found = await session.scalar(select(Organization.id).where(Organization.name == name))
    assert found is not None
    return found


async def add_model(
    session: AsyncSession,
    name: str,
    status: str = "ready",
    *,
    owner: str = "default",
    manifest: Manifest = TENSOR,
    receipt: BuildReceipt = RECEIPT,
    **version: Any,
) -> ModelVersion:
    """A model with one version; a ready one has an endpoint with one ready replica."""
    model = Model(
        id=new_id("model"),
        organization_id=await organization_id(session, owner),
        name=name,
        created_at=clock.now(),
    )
    session.add(model)
    await session.flush()
    is_ready = status == "ready"
    made = ModelVersion(
        id=new_id("version"),
        model_id=model.id,
        number=1,
        upload_id=new_id("upload"),
        filename=f"{name}.pt2",
        upload_bytes=214_000,
        sha256="0" * 64,
        status=status,
        manifest=msgspec.to_builtins(manifest) if is_ready else None,
        # Through JSON, where a batch size becomes text, as in the database.
        receipt=msgspec.json.decode(msgspec.json.encode(receipt)) if is_ready else None,
        created_at=clock.now(),
        **version,
    )
    session.add(made)
    await session.flush()
    if is_ready:
        endpoint = await deploy_version(session, made)
        deployment = await session.get_one(Deployment, endpoint.deployment_id)
        session.add(
            Replica(
                id=new_id("replica"),
                deployment_id=deployment.id,
                revision_id=deployment.revision_id or "",
                version_id=made.id,
                status="ready",
                memory_bytes=412_000_000,
                created_at=clock.now(),
            )
        )
    return made


async def add_usage(
    session: AsyncSession, *, owner: str = "default", model: str = "llama", cached: int = 1000
) -> str:
    """One settled request of today; returns its id."""
    request_id = new_id("req")
    moment = clock.now()
    lines = [
        ("input", 500, 100_000_000, 1_000_000),
        ("cached_input", cached, 10_000_000, 1_000_000),
        ("output", 100, 400_000_000, 1_000_000),
        ("request", 1, 100_000_000, 1_000_000),
    ]
    event = UsageEvent(
        id=f"{request_id}:1",
        request_id=request_id,
        organization_id=await organization_id(session, owner),
        api_key_id="key_1",
        api_key_name="Web shop",
        endpoint_name=model,
        version_number=1,
        route="/v1/chat/completions",
        service_class="standard",
        outcome="completed",
        finish_reason="stop",
        price_book_id="book_1",
        currency="usd",
        amount_nano=sum(quantity * price // scale for _, quantity, price, scale in lines),
        started_at=moment - timedelta(seconds=1),
        finished_at=moment,
        duration_ns=1_000_000_000,
        first_token_ns=40_000_000,
    )
    session.add(event)
    await session.flush()
    for dimension, quantity, price, scale in lines:
        session.add(
            UsageLine(
                event_id=event.id,
                dimension=dimension,
                quantity=quantity,
                price_nano=price,
                unit_scale=scale,
                amount_nano=quantity * price // scale,
                disposition="billed",
            )
        )
        at_input_price = quantity * 100 if dimension == "cached_input" else 0
        await _add_to_hour(session, event, (dimension, quantity, price, scale), at_input_price)
    return request_id


async def _add_to_hour(
    session: AsyncSession,
    event: UsageEvent,
    line: tuple[str, int, int, int],
    at_input_price: int,
) -> None:
    """As settling does it."""
    dimension, quantity, price_nano, unit_scale = line
    key = SeriesKey(
        event.organization_id,
        event.api_key_id,
        event.endpoint_name,
        event.version_number,
        event.service_class,
        dimension,
        "billed",
        event.price_book_id,
        price_nano,
        unit_scale,
    )
    names = UsageSeries(id=key.id, api_key_name=event.api_key_name)
    for name in type(key).__struct_fields__:
        setattr(names, name, getattr(key, name))
    await session.merge(names)
    hour = hour_of(event.finished_at)
    row = await session.get(UsageHour, (key.id, hour))
    if row is None:
        row = UsageHour(series_id=key.id, hour=hour, quantity=0, amount_nano=0, saved_nano=0)
        session.add(row)
    amount_nano = quantity * price_nano // unit_scale
    row.quantity += quantity
    row.amount_nano += amount_nano
    row.saved_nano += max(0, at_input_price - amount_nano)
