"""The live map from endpoint names to replicas that answer, and the loop that keeps it true.

`resolve` is on every request's path: it looks only into memory.
"""

import asyncio
import logging
from collections.abc import Iterator

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from app.core.broadcast import Broadcast
from app.core.database import Database
from app.core.errors import InvalidRequest, NotFound, Unavailable
from app.core.storage import Storage
from app.deployments.desired import Desired, route
from app.deployments.launchers.base import Launcher
from app.deployments.link import Commit
from app.deployments.reconciler import Reconciler
from app.deployments.replica import Box, RunningReplica, Target, Timing
from app.deployments.service import CHANGED
from app.organizations.principal import Principal
from app.settings import Settings
from runtime.protocol import Stats

POLL_SECONDS = 1.0
MAX_STARTS_AT_ONCE = 4
DEFAULT_NAME = "default"

log = logging.getLogger(__name__)

__all__ = ["EndpointView", "Fleet", "LiveReplica", "Target"]


class EndpointView(msgspec.Struct, frozen=True):
    """An endpoint that a caller may use. `targets` answer now; `by_version` also names those that
    still answer for a version which is being replaced."""

    desired: Desired
    targets: list[Target]
    by_version: dict[int, list[Target]]
    detail: str  # why nothing answers, when nothing does

    @property
    def name(self) -> str:
        return self.desired.endpoint_name

    @property
    def is_ready(self) -> bool:
        return any(not target.link.closed for target in self.targets)

    def is_visible_to(self, principal: Principal) -> bool:
        desired = self.desired
        return desired.is_public or desired.organization_id == principal.organization_id


class LiveReplica(msgspec.Struct, frozen=True):
    """One replica as it is now, for pages and metrics."""

    replica_id: str
    version_number: int
    status: str
    detail: str
    memory_bytes: int
    attention: str
    form: str  # in which it serves, empty until it does
    num_outstanding: int
    stats: Stats


class Fleet:
    """All replicas of the box. `commit` makes a step's outputs durable before they are handed out:
    see `ReplicaLink`."""

    def __init__(
        self,
        database: Database,
        storage: Storage,
        launcher: Launcher,
        broadcast: Broadcast,
        settings: Settings,
        commit: Commit,
        *,
        timing: Timing | None = None,
    ) -> None:
        self._broadcast = broadcast
        self._launcher = launcher
        self._views: dict[str, EndpointView] = {}
        self._default: EndpointView | None = None
        self._is_closing = False
        self._loop_task: asyncio.Task[None] | None = None
        self._reconciler = Reconciler(
            database,
            Box(
                database=database,
                storage=storage,
                launcher=launcher,
                settings=settings,
                commit=commit,
                on_change=self._on_change,
                keeps_serving=self._keeps_serving,
                starts=asyncio.Semaphore(MAX_STARTS_AT_ONCE),
                timing=timing or Timing(),
            ),
        )

    # --- life -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts what should run; returns before it does."""
        await asyncio.to_thread(self._launcher.clean)
        await self._reconciler.begin()
        await self._reconciler.reconcile()
        self._refresh()
        self._loop_task = asyncio.create_task(self._loop(), name="fleet")

    async def close(self, drain_seconds: float) -> None:
        """Refuses new requests, lets running ones finish and ends every worker."""
        self._is_closing = True
        if self._loop_task is not None:
            self._broadcast.publish(CHANGED)
            await asyncio.wait([self._loop_task], timeout=POLL_SECONDS)
            self._loop_task.cancel()
        await self._reconciler.close(drain_seconds)

    async def _loop(self) -> None:
        """Looks when something changed and once a second: rows may be written by anyone."""
        async for _ in self._broadcast.listen(CHANGED, POLL_SECONDS):
            if self._is_closing:
                return
            try:
                await self._reconciler.reconcile()
                self._refresh()
            except SQLAlchemyError:
                log.exception("the fleet could not be reconciled; trying again")

    # --- finding a replica ----------------------------------------------------------------

    def resolve(self, principal: Principal, model_name: str) -> Target:
        """The ready replica with the fewest requests for `name`, `name@version` or `default`.
        Raises `NotFound` (also for other tenants' private endpoints) or `Unavailable`."""
        view = self._views.get(model_name)
        by_version = None
        if view is None or not view.is_visible_to(principal):
            view, by_version = self._find(principal, model_name)
        targets = view.targets if by_version is None else by_version
        best, fewest = None, 0
        for target in targets:
            link = target.link
            if not link.closed and (best is None or link.num_outstanding < fewest):
                best, fewest = target, link.num_outstanding
        if best is None or self._is_closing:
            raise self._unavailable(view, principal)
        return best

    def visible_endpoints(self, principal: Principal) -> list[EndpointView]:
        """What the caller may name as `model`, by name."""
        return sorted(
            (view for view in self._views.values() if view.is_visible_to(principal)),
            key=lambda view: view.name,
        )

    def endpoint_names(self) -> set[str]:
        """Of every organization."""
        return set(self._views)

    def live(self, deployment_id: str) -> list[LiveReplica]:
        """The deployment's replicas as they are now, oldest first."""
        return [_live(replica) for replica in self._reconciler.replicas(deployment_id)]

    def running(self) -> list[RunningReplica]:
        """Every replica of the box, those included that finish for a deleted model."""
        return self._reconciler.all_replicas()

    def all_live(self) -> Iterator[tuple[EndpointView, LiveReplica]]:
        """Every replica of every endpoint."""
        for view in self._views.values():
            for live in self.live(view.desired.deployment_id):
                yield view, live

    def _find(
        self, principal: Principal, model_name: str
    ) -> tuple[EndpointView, list[Target] | None]:
        """The slow half of `resolve`: other spellings, and names that do not exist."""
        name, at, version = model_name.partition("@")
        view = self._default if name == DEFAULT_NAME else self._views.get(name)
        if view is None or not view.is_visible_to(principal):
            hint = ""
            if name == DEFAULT_NAME:
                hint = " The operator of this box recommends none that is published."
            raise NotFound(
                f"There is no model {name[:80]!r} that you can call.{hint}",
                code="model_not_found",
                param="model",
            )
        if not at:
            return view, None
        if not (version.isascii() and version.isdecimal() and len(version) < 10):
            raise InvalidRequest(
                f"A version is a number, as in {name}@1.", code="invalid_version", param="model"
            )
        number = int(version)
        if number != view.desired.version_number and number not in view.by_version:
            raise NotFound(
                f"Version {number} of {name!r} is not deployed; "
                f"version {view.desired.version_number} is.",
                code="version_not_deployed",
                param="model",
            )
        return view, view.by_version.get(number, [])

    def _unavailable(self, view: EndpointView, principal: Principal) -> Unavailable:
        if self._is_closing:
            return Unavailable(
                "The box is shutting down.", code="shutting_down", retry_after_seconds=10
            )
        if view.desired.is_stopped:
            return Unavailable(
                f"{view.name!r} is stopped. Its owner can start it again.",
                code="endpoint_stopped",
                retry_after_seconds=60,
            )
        # What a worker said last is its owner's business.
        is_owner = view.desired.organization_id == principal.organization_id
        return Unavailable(
            f"{view.name!r} is not ready yet. {view.detail if is_owner else ''}".strip(),
            code="endpoint_not_ready",
            retry_after_seconds=2,
        )

    # --- the map --------------------------------------------------------------------------

    def _on_change(self) -> None:
        self._refresh()
        self._broadcast.publish(CHANGED)

    def _refresh(self) -> None:
        """Rebuilt whole: it has as many entries as the box has endpoints."""
        views: dict[str, EndpointView] = {}
        default = None
        for desired in self._reconciler.desired.values():
            view = _view(desired, self._reconciler.replicas(desired.deployment_id))
            views[view.name] = view
            if desired.is_default:
                default = view
        self._views, self._default = views, default

    def _keeps_serving(self, deployment_id: str) -> int | None:
        for replica in self._reconciler.replicas(deployment_id):
            if replica.is_ready:
                return replica.desired.version_number
        return None


def _view(desired: Desired, replicas: list[RunningReplica]) -> EndpointView:
    by_version: dict[int, list[Target]] = {}
    for replica in replicas:
        if replica.is_ready and not replica.is_retired and replica.target is not None:
            by_version.setdefault(replica.desired.version_number, []).append(replica.target)
    targets = [replica.target for replica in route(desired, replicas) if replica.target is not None]
    details = [replica.detail for replica in reversed(replicas) if replica.status == "failed"]
    return EndpointView(desired, targets, by_version, details[0] if details else "It is starting.")


def _live(replica: RunningReplica) -> LiveReplica:
    link = replica.link
    return LiveReplica(
        replica_id=replica.id,
        version_number=replica.desired.version_number,
        status=replica.status,
        detail=replica.detail,
        memory_bytes=replica.memory_bytes,
        attention=replica.attention,
        form=replica.form,
        num_outstanding=link.num_outstanding if link is not None else 0,
        stats=link.stats if link is not None else Stats(),
    )
