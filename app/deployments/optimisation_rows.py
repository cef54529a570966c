"""The rows of optimisations: queued, claimed, put in force, taken back.

Every verb takes an open session. Which process runs when, and what a result must be, is
`optimiser.py`'s.
"""

import asyncio
from collections.abc import Collection, Iterable
from typing import Any, Literal

import msgspec
from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer

from app.core.clock import now
from app.core.errors import Conflict
from app.core.ids import new_id
from app.deployments import job_rows
from app.deployments.acceptance import read_receipt, receipt_json
from app.deployments.job_rows import OPTIMISATIONS, begin, change_status
from app.registry.service import named_artifacts
from app.registry.tables import Artifact, ModelVersion, Optimisation
from runtime.protocol import BuildReceipt, CandidateReport, Manifest

Cause = Literal["built", "asked", "environment"]

OPTIMISATIONS_TOPIC = "optimisations"  # told that one is queued
KINDS = ("tensor", "embedder")  # of models that have other forms than eager to choose from
ACTIVE = ("queued", "running")
MAX_INTERRUPTIONS = 2
INTERRUPTED = (
    "The box went down twice while this ran, so it is not tried again by itself. What was built "
    "serves on. If the box ran out of memory, limit TAPEOUT_BUILD_MEMORY before you ask again."
)
PASSING = ("failed", "out_of_time")  # fates that may have had their reason in the box


class Result(msgspec.Struct, frozen=True):
    """What an optimisation found, as stored. Without an artifact, what was built stays."""

    manifest: dict[str, Any]
    receipt: dict[str, Any]
    artifact_id: str | None


def is_optimisable(manifest: Manifest) -> bool:
    return manifest.kind in KINDS


def is_repeatable(receipt: BuildReceipt) -> bool:
    """Whether looking again would find the same, so that the result may be reused: not where a
    candidate's process failed or its time was over, which another moment may not repeat."""
    eager = next((each for each in receipt.candidates if each.name == "eager"), None)
    is_measured = eager is not None and bool(eager.p50_ms)
    return is_measured and not any(each.fate in PASSING for each in receipt.candidates)


async def enqueue(session: AsyncSession, version: ModelVersion, cause: Cause) -> Optimisation:
    """Raises `Conflict` for a version that has no other forms, or is being optimised already."""
    if version.status != "ready" or (version.manifest or {}).get("kind") not in KINDS:
        raise Conflict(
            "Only a tensor model or an embedder that is built has other forms to choose from; a "
            "decoder's are chosen by its build.",
            code="not_optimisable",
        )
    if await _active(session, version.id) is not None:
        raise Conflict("This version is being optimised already.", code="optimisation_running")
    row = Optimisation(
        id=new_id("opt"),
        version_id=version.id,
        cause=cause,
        status="queued",
        phase="",
        phase_detail="",
        progress_permille=0,
        created_at=now(),
    )
    session.add(row)
    await session.flush()
    return row


async def require_active(session: AsyncSession, version_id: str) -> Optimisation:
    """The one that waits or runs. Raises `Conflict` if there is none."""
    row = await _active(session, version_id)
    if row is None:
        raise Conflict("This version is not being optimised.", code="not_optimising")
    return row


async def _active(session: AsyncSession, version_id: str) -> Optimisation | None:
    return await session.scalar(
        select(Optimisation)
        .where(Optimisation.version_id == version_id, Optimisation.status.in_(ACTIVE))
        .limit(1)
    )


async def newest(session: AsyncSession, version_ids: Iterable[str]) -> dict[str, Optimisation]:
    """The last attempt of each version that has one, without what it found."""
    rows = await session.scalars(
        select(Optimisation)
        .options(
            defer(Optimisation.manifest),
            defer(Optimisation.receipt),
            defer(Optimisation.base_manifest),
            defer(Optimisation.base_receipt),
        )
        .where(Optimisation.version_id.in_(list(version_ids)))
        .order_by(Optimisation.created_at, Optimisation.id)
    )
    return {row.version_id: row for row in rows}


async def claim(session: AsyncSession, answering: Collection[str]) -> Optimisation | None:
    """Takes the oldest queued one whose version is among those that answer, or was asked for. None
    while a build waits or runs: builds go first."""
    building = select(ModelVersion.id).where(ModelVersion.status.in_(("queued", "building")))
    if await session.scalar(building.limit(1)) is not None:
        return None
    row = await session.scalar(
        select(Optimisation)
        .where(
            Optimisation.status == "queued",
            Optimisation.version_id.in_(answering) | (Optimisation.cause == "asked"),
        )
        .order_by(Optimisation.created_at, Optimisation.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if row is not None:
        begin(row, OPTIMISATIONS)
        row.started_at = now()
    return row


async def requeue_interrupted(session: AsyncSession) -> None:
    """Those of an app that ended without a word begin anew, but for one that ran when that
    happened before: it may be what takes the box down."""
    is_running = Optimisation.status == OPTIMISATIONS.running
    num_interruptions = Optimisation.num_interruptions + 1
    await session.execute(
        update(Optimisation).where(is_running).values(num_interruptions=num_interruptions)
    )
    await session.execute(
        update(Optimisation)
        .where(is_running, Optimisation.num_interruptions >= MAX_INTERRUPTIONS)
        .values(
            status="failed",
            error_code="interrupted",
            error_message=INTERRUPTED,
            finished_at=now(),
        )
    )
    await job_rows.requeue_interrupted(session, OPTIMISATIONS)


async def find_cached(session: AsyncSession, cache_key: str) -> Optimisation | None:
    """The newest result of this key."""
    return await session.scalar(
        select(Optimisation)
        .where(Optimisation.cache_key == cache_key, Optimisation.status == "done")
        .order_by(Optimisation.finished_at.desc())
        .limit(1)
    )


async def put_in_force(
    session: AsyncSession, row: Optimisation, cache_key: str | None, result: Result, note: str = ""
) -> None:
    """The version gets the result in this transaction, and what it had is kept to go back to.
    Without a key nobody reuses it. Raises `CancelledError` if the row is not running any more."""
    is_done = await change_status(
        session,
        OPTIMISATIONS,
        row.id,
        since=(OPTIMISATIONS.running,),
        status="done",
        phase="done",
        phase_detail=note,
        progress_permille=1000,
        cache_key=cache_key,
        artifact_id=result.artifact_id,
        manifest=result.manifest,
        receipt=result.receipt,
        finished_at=now(),
    )
    if not is_done:
        raise asyncio.CancelledError
    await _forget_earlier(session, row)
    version = await session.get_one(
        ModelVersion, row.version_id, with_for_update=True, populate_existing=True
    )
    if result.artifact_id is not None and result.artifact_id != version.artifact_id:
        await session.execute(
            update(Optimisation)
            .where(Optimisation.id == row.id)
            .values(
                base_artifact_id=version.artifact_id,
                base_manifest=version.manifest,
                base_receipt=version.receipt,
            )
        )
        version.artifact_id, version.manifest = result.artifact_id, result.manifest
    version.receipt = result.receipt


async def _forget_earlier(session: AsyncSession, row: Optimisation) -> None:
    """Earlier results of the version are neither gone back to nor reused any more."""
    await session.execute(
        update(Optimisation)
        .where(Optimisation.version_id == row.version_id, Optimisation.id != row.id)
        .values(
            artifact_id=None,
            base_artifact_id=None,
            base_manifest=None,
            base_receipt=None,
            cache_key=None,
        )
    )


# --- after the swap -----------------------------------------------------------------------


async def unconfirmed(session: AsyncSession) -> list[Optimisation]:
    """Those whose result has not answered for long enough yet."""
    rows = await session.scalars(
        select(Optimisation).where(
            Optimisation.status == "done", Optimisation.base_artifact_id.is_not(None)
        )
    )
    return list(rows)


async def confirm(session: AsyncSession, row_id: str) -> None:
    """The result answers: there is no going back any more."""
    await session.execute(
        update(Optimisation)
        .where(Optimisation.id == row_id)
        .values(base_artifact_id=None, base_manifest=None, base_receipt=None)
    )


async def fall_back(session: AsyncSession, row_id: str, reason: str) -> bool:
    """The version gets back what it had. Whether there was something to go back to."""
    row = await session.get(Optimisation, row_id, with_for_update=True, populate_existing=True)
    if row is None or row.base_artifact_id is None or row.base_manifest is None:
        return False
    version = await session.get_one(
        ModelVersion, row.version_id, with_for_update=True, populate_existing=True
    )
    form = str((row.manifest or {}).get("form", ""))
    base_form = str(row.base_manifest.get("form", "eager"))
    note = f"The form {form} was chosen, but cannot be served here, so {base_form} is. {reason}"
    receipt = without_form(read_receipt(row.receipt), form, base_form, note)
    version.artifact_id, version.manifest = row.base_artifact_id, row.base_manifest
    version.receipt = receipt_json(receipt)
    row.status, row.error_code, row.error_message = "failed", "form_cannot_be_served", note
    row.artifact_id = row.base_artifact_id = row.cache_key = None
    row.base_manifest = row.base_receipt = None
    return True


def without_form(receipt: BuildReceipt, form: str, base_form: str, note: str) -> BuildReceipt:
    """The receipt of a version whose chosen form turned out not to run: nothing that was measured
    is lost, and what serves is what it says."""

    def judged(candidate: CandidateReport) -> CandidateReport:
        if candidate.name == form:
            return msgspec.structs.replace(candidate, is_chosen=False, fate="failed", reason=note)
        if candidate.name == base_form:
            reason = f"It serves, because {form} cannot be served here."
            return msgspec.structs.replace(candidate, is_chosen=True, fate="chosen", reason=reason)
        return candidate

    candidates = [judged(candidate) for candidate in receipt.candidates]
    return msgspec.structs.replace(receipt, candidates=candidates, notes=[*receipt.notes, note])


async def distrust(session: AsyncSession, artifact_id: str) -> None:
    """A result that holds in another environment is not reused."""
    await session.execute(
        update(Optimisation).where(Optimisation.artifact_id == artifact_id).values(cache_key=None)
    )


# --- artifacts that nothing names ---------------------------------------------------------


async def remove_unused_rows(
    session: AsyncSession, in_use: Collection[str]
) -> tuple[set[str], int]:
    """Deletes the rows of artifacts that no version and no optimisation names, but for those `in
    use`. Returns their ids, for their files, and how many in use are left for later."""
    named = await named_artifacts(session)
    unused = set(await session.scalars(select(Artifact.id))) - named
    removed = unused.difference(in_use)
    if removed:
        await session.execute(delete(Artifact).where(Artifact.id.in_(removed)))
    return removed, len(unused) - len(removed)
