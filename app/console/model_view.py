"""What a model's page shows: one read of the database, as plain values.

Reads registry and deployments together, which neither area does for itself. Changes nothing.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer

from app.console.candidates_view import CandidatesView, candidates_view
from app.console.form_names import title_of
from app.console.lamps import Lamp
from app.console.proof_view import FormProof, proofs_by_form
from app.console.templating import format_bytes, format_short
from app.core.errors import NotFound
from app.deployments.optimisation_view import OptimisationView, read_optimisations
from app.deployments.tables import Deployment, Endpoint, Replica, Revision
from app.registry.input_hints import show_inputs
from app.registry.service import version_hints
from app.registry.tables import Model, ModelVersion
from runtime.protocol import BuildReceipt, Manifest

NUM_VERSIONS = 20  # listed at once
NEEDS_INPUTS = "needs_inputs"  # the build's code for a file that does not say what it takes
ASKING_CODES = (NEEDS_INPUTS, "inputs")
LIVE_REPLICAS = ("starting", "ready", "draining")

# What a running build does now, for people: a phase's name, and what it means.
PHASES = {
    "": ("Starting", "A sandboxed process is being made for this build."),
    "unpack": ("Unpacking", "Reading the upload under strict limits."),
    "import": ("Importing", "Turning the upload into a program of its own form."),
    "prove": ("Proving", "Comparing what will be served with the original."),
    "measure": ("Measuring", "Timing the program at the batch sizes that matter."),
    "package": ("Packaging", "Writing the files that a replica loads."),
}
KINDS = {"decoder": "Decoder", "embedder": "Embedder", "tensor": "Tensor program"}


VERDICTS = {
    "equal": Lamp("good", "proven equal"),
    "lossy": Lamp("busy", "lossy, measured"),
    "different": Lamp("bad", "differs"),
    "unproved": Lamp("busy", "not proven"),
}
REPLICA_LAMPS = {
    "starting": Lamp("busy", "starting"),
    "ready": Lamp("good", "ready"),
    "draining": Lamp("busy", "finishing"),
    "stopped": Lamp("", "stopped"),
    "failed": Lamp("bad", "failed"),
}


class VersionLine(msgspec.Struct, frozen=True):
    """A version in its model's history."""

    number: int
    filename: str
    upload_bytes: int
    created_at: datetime
    lamp: Lamp
    can_roll_back: bool


class VersionWindow(msgspec.Struct, frozen=True):
    """The versions that are listed, newest first, and where those beside them begin."""

    numbers: list[int]
    newer: int | None
    older: int | None


def version_window(newest_first: list[int], shown: int) -> VersionWindow:
    """The newest, or those from the shown one on."""
    place = newest_first.index(shown)
    start = 0 if place < NUM_VERSIONS else place
    end = start + NUM_VERSIONS
    return VersionWindow(
        newest_first[start:end],
        newest_first[max(0, start - NUM_VERSIONS)] if start else None,
        newest_first[end] if end < len(newest_first) else None,
    )


class ReplicaLine(msgspec.Struct, frozen=True):
    id: str
    lamp: Lamp
    detail: str
    memory_bytes: int


class EndpointView(msgspec.Struct, frozen=True):
    """An endpoint and what stands behind it. `version_number` is what it is meant to serve."""

    name: str
    is_public: bool
    is_stopped: bool
    version_id: str | None
    version_number: int | None
    replicas: list[ReplicaLine]
    lamp: Lamp


class ModelView(msgspec.Struct, frozen=True):
    """A model's page, about one of its versions (`shown`)."""

    name: str
    shown: ModelVersion
    versions: list[VersionLine]
    window: VersionWindow
    endpoint: EndpointView | None
    manifest: Manifest | None
    receipt: BuildReceipt | None
    optimisation: OptimisationView | None = None

    @property
    def lamp(self) -> Lamp:
        """The one state that matters: a build under way, else the endpoint, else the version."""
        if self.shown.status in ("queued", "building") or self.endpoint is None:
            return version_lamp(self.shown)
        return self.endpoint.lamp

    @property
    def about(self) -> str:
        return about(self.manifest) if self.manifest else ""

    @property
    def asks_for_inputs(self) -> bool:
        """Whether its owner can mend the failed build by saying what the model takes."""
        return self.shown.status == "failed" and self.shown.error_code in ASKING_CODES

    @property
    def suggested_inputs(self) -> str:
        """What was said, and the lines that the build suggests for the rest."""
        said = show_inputs(version_hints(self.shown).inputs)
        if self.shown.error_code != NEEDS_INPUTS:
            return said
        lines = (self.shown.error_message or "").splitlines()
        suggested = [line.strip() for line in lines if line.startswith("    ")]
        return "\n".join([*said.splitlines(), *suggested])

    @property
    def accepts_loss(self) -> bool:
        return version_hints(self.shown).accepts_loss

    @property
    def verdict(self) -> Lamp:
        assert self.receipt is not None
        return VERDICTS[self.receipt.verdict]

    @property
    def proofs(self) -> list[FormProof]:
        return proofs_by_form(self.receipt.checks) if self.receipt else []

    @property
    def has_forms(self) -> bool:
        return any(proof.name for proof in self.proofs)

    @property
    def judges_tokens(self) -> bool:
        return any(proof.judges_tokens for proof in self.proofs)

    @property
    def form(self) -> str:
        """What the version is served in, for people."""
        return title_of(self.manifest.form) if self.manifest else ""

    @property
    def judged(self) -> str:
        """What a proof counts that must be the same."""
        return "tokens" if self.manifest is not None and self.manifest.decoder else "values"

    @property
    def candidates(self) -> CandidatesView:
        return candidates_view(self.receipt.candidates if self.receipt else [])

    @property
    def phase(self) -> str:
        if self.shown.status == "queued":
            return "Waiting for its turn"
        return PHASES.get(self.shown.phase, (self.shown.phase.capitalize(), ""))[0]

    @property
    def phase_hint(self) -> str:
        if self.shown.status == "queued":
            return "Builds run one after the other."
        return PHASES.get(self.shown.phase, ("", ""))[1]

    @property
    def is_steady(self) -> bool:
        """Whether nothing is under way that would change the page by itself."""
        states = [version.lamp.tone for version in self.versions]
        states += [replica.lamp.tone for replica in self.endpoint.replicas] if self.endpoint else []
        is_optimising = self.optimisation is not None and self.optimisation.is_active
        return "busy" not in states and not is_optimising


# --- reading ----------------------------------------------------------------------------


async def read_model(
    session: AsyncSession, organization_id: str, name: str, number: int | None = None
) -> ModelView:
    """Everything of one model's page; about the newest version unless `number` says which.
    Raises `NotFound`."""
    model = await session.scalar(
        select(Model).where(Model.organization_id == organization_id, Model.name == name)
    )
    if model is None:
        raise NotFound(f"You have no model named {name!r}. It may have been deleted.")
    rows = await session.execute(
        select(ModelVersion.number, ModelVersion.id)
        .where(ModelVersion.model_id == model.id)
        .order_by(ModelVersion.number.desc())
    )
    numbers: dict[int, str] = {row[0]: row[1] for row in rows}
    shown_id = numbers.get(max(numbers, default=0) if number is None else number)
    if shown_id is None:
        raise NotFound(f"The model {name!r} has no version {number}.")
    shown = await session.get_one(ModelVersion, shown_id, populate_existing=True)
    names = {id: number for number, id in numbers.items()}
    endpoint = await _read_endpoint(session, model.id, names)
    optimisations = await read_optimisations(session, [shown])
    window = version_window(list(numbers), shown.number)
    return ModelView(
        name=model.name,
        shown=shown,
        versions=await _version_lines(session, model.id, window.numbers, endpoint),
        window=window,
        endpoint=endpoint,
        manifest=msgspec.convert(shown.manifest, Manifest) if shown.manifest else None,
        receipt=msgspec.convert(shown.receipt, BuildReceipt, str_keys=True)
        if shown.receipt
        else None,
        optimisation=optimisations.get(shown.id),
    )


async def _version_lines(
    session: AsyncSession, model_id: str, numbers: list[int], endpoint: EndpointView | None
) -> list[VersionLine]:
    rows = await session.scalars(
        select(ModelVersion)
        .where(ModelVersion.model_id == model_id, ModelVersion.number.in_(numbers))
        .order_by(ModelVersion.number.desc())
        .options(*(defer(getattr(ModelVersion, name)) for name in ("manifest", "receipt", "hints")))
    )
    return [_version_line(version, endpoint) for version in rows]


async def _read_endpoint(
    session: AsyncSession, model_id: str, numbers: dict[str, int]
) -> EndpointView | None:
    statement = (
        select(Endpoint, Deployment, Revision.version_id)
        .join(Deployment, Endpoint.deployment_id == Deployment.id)
        .outerjoin(Revision, Revision.id == Deployment.revision_id)
        .where(Deployment.model_id == model_id)
    )
    row = (await session.execute(statement)).one_or_none()
    if row is None:
        return None
    endpoint, deployment, version_id = row
    latest = await session.scalars(
        select(Replica)
        .where(Replica.deployment_id == deployment.id)
        .order_by(Replica.created_at.desc())
        .limit(10)
    )
    replicas = _worth_showing(list(latest))
    return EndpointView(
        name=endpoint.name,
        is_public=endpoint.is_public,
        is_stopped=deployment.is_stopped,
        version_id=version_id,
        version_number=numbers.get(version_id or ""),
        replicas=[_replica_line(replica, numbers) for replica in replicas],
        lamp=endpoint_lamp(deployment, replicas),
    )


async def live_replicas(
    session: AsyncSession, deployment_ids: Iterable[str]
) -> dict[str, list[Replica]]:
    """Replicas that run, and the failed one that explains why none does."""
    rows = await session.scalars(
        select(Replica)
        .where(
            Replica.deployment_id.in_(list(deployment_ids)),
            Replica.status.in_((*LIVE_REPLICAS, "failed")),
        )
        .order_by(Replica.created_at.desc())
    )
    found: dict[str, list[Replica]] = {}
    for replica in rows:
        found.setdefault(replica.deployment_id, []).append(replica)
    return {deployment_id: _worth_showing(rows) for deployment_id, rows in found.items()}


def _worth_showing(newest_first: list[Replica]) -> list[Replica]:
    """Those that run; if none does, the last one, which says why."""
    live = [replica for replica in newest_first if replica.status in LIVE_REPLICAS]
    return live or newest_first[:1]


# --- states -----------------------------------------------------------------------------


def version_lamp(version: ModelVersion) -> Lamp:
    """The state of a version, apart from whether it serves."""
    if version.status == "building":
        return Lamp("busy", f"building, {version.progress_permille // 10} %")
    return {
        "queued": Lamp("busy", "waiting to build"),
        "ready": Lamp("good", "built"),
        "failed": Lamp("bad", "cannot be served"),
        "cancelled": Lamp("", "cancelled"),
    }[version.status]


def endpoint_lamp(deployment: Deployment, replicas: Sequence[Replica]) -> Lamp:
    """The state callers meet: whether a call would be answered now."""
    states = {replica.status for replica in replicas}
    if deployment.is_stopped:
        return Lamp("busy", "stopping") if states & set(LIVE_REPLICAS) else Lamp("", "stopped")
    if "ready" in states:
        return Lamp("good", "ready")
    if states == {"failed"}:
        return Lamp("bad", "not running, retrying")
    return Lamp("busy", "starting")


def about(manifest: Manifest) -> str:
    """`Decoder, 2.5M parameters, 9.8 MB`."""
    kind = KINDS.get(manifest.kind, manifest.kind)
    size = format_short(manifest.num_parameters)
    return f"{kind}, {size} parameters, {format_bytes(manifest.weight_bytes)}"


def _version_line(version: ModelVersion, endpoint: EndpointView | None) -> VersionLine:
    is_serving = endpoint is not None and endpoint.version_id == version.id
    return VersionLine(
        number=version.number,
        filename=version.filename,
        upload_bytes=version.upload_bytes,
        created_at=version.created_at,
        lamp=Lamp("good", "serving") if is_serving else _idle_lamp(version),
        can_roll_back=endpoint is not None and not is_serving and version.status == "ready",
    )


def _idle_lamp(version: ModelVersion) -> Lamp:
    return Lamp("", "built") if version.status == "ready" else version_lamp(version)


def _replica_line(replica: Replica, numbers: dict[str, int]) -> ReplicaLine:
    lamp = REPLICA_LAMPS[replica.status]
    number = numbers.get(replica.version_id)
    return ReplicaLine(
        id=replica.id,
        lamp=Lamp(lamp.tone, f"{lamp.text}, version {number}" if number else lamp.text),
        detail=replica.detail,
        memory_bytes=replica.memory_bytes,
    )
