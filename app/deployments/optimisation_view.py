"""How the search for a version's faster form stands, as the API and the console show it."""

import statistics
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from app.deployments import optimisation_rows
from app.registry.tables import ModelVersion, Optimisation


class OptimisationError(msgspec.Struct, frozen=True):
    """Why no form was put in force, or why it was taken back. What was built serves meanwhile."""

    code: str
    message: str


class OptimisationView(msgspec.Struct, frozen=True, kw_only=True):
    """The last attempt. `status` is `queued`, `running`, `done`, `failed` or `cancelled`; `cause`
    says why it was queued: the version was `built`, somebody `asked`, or the `environment` of the
    form before is not this box's any more. `progress` is of the whole attempt, 0 to 1. `form` is
    what the version serves in, `speed_up` how many times as fast as eager it was measured to be
    (the geometric mean over batch sizes), null where nothing was."""

    status: str
    cause: str
    phase: str
    phase_detail: str
    progress: float
    form: str
    speed_up: float | None
    error: OptimisationError | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def is_active(self) -> bool:
        return self.status in optimisation_rows.ACTIVE


async def read_optimisations(
    session: AsyncSession, versions: list[ModelVersion]
) -> dict[str, OptimisationView]:
    """The last attempt of each version that has one, by version id."""
    rows = await optimisation_rows.newest(session, [version.id for version in versions])
    return {
        version.id: optimisation_view(version, rows[version.id])
        for version in versions
        if version.id in rows
    }


def optimisation_view(version: ModelVersion, row: Optimisation) -> OptimisationView:
    error = None
    if row.error_message:
        error = OptimisationError(row.error_code or row.status, row.error_message)
    return OptimisationView(
        status=row.status,
        cause=row.cause,
        phase=row.phase,
        phase_detail=row.phase_detail,
        progress=row.progress_permille / 1000,
        form=str((version.manifest or {}).get("form", "eager")),
        speed_up=speed_up(version.receipt),
        error=error,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def speed_up(receipt: dict[str, Any] | None) -> float | None:
    """Of the chosen form against eager, from a stored receipt."""
    candidates: list[dict[str, Any]] = (receipt or {}).get("candidates", [])
    eager = next((each for each in candidates if each["name"] == "eager"), None)
    chosen = next((each for each in candidates if each["is_chosen"]), None)
    if eager is None or chosen is None or len(candidates) < 2:
        return None
    before, after = eager.get("p50_ms", {}), chosen.get("p50_ms", {})
    ratios = [
        before[size] / after[size] for size in before if before[size] > 0 and after.get(size, 0) > 0
    ]
    return statistics.geometric_mean(ratios) if ratios else None
