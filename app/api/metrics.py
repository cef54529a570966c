"""`GET /metrics`: what the box counts, in Prometheus' text format.

Owns what is read at the moment of asking; what is counted as requests end is `metering/meters.py`.
Names and meanings are in docs/operations.md, which a test compares with what is answered.
"""

from collections.abc import Iterator
from typing import Any

from litestar import Request, Response, Router, get
from litestar.datastructures import State
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from app.api.auth import bearer_principal
from app.api.health import problem_of
from app.core.errors import Forbidden
from app.deployments.fleet import EndpointView, Fleet, LiveReplica
from app.metering.meters import Meters

LABELS = ("endpoint", "version", "replica")
# Gauges and counters of each replica: name, meaning, and where the engine's counters have it.
REPLICA_GAUGES = (
    ("tapeout_replica_running", "Sequences or rows that run", "num_running"),
    ("tapeout_replica_waiting", "Sequences or rows that wait", "num_waiting"),
    ("tapeout_replica_free_blocks", "KV blocks that hold nothing", "free_blocks"),
    ("tapeout_replica_cached_blocks", "KV blocks kept for later prompts", "cached_blocks"),
    ("tapeout_replica_used_blocks", "KV blocks of running sequences", "used_blocks"),
)
REPLICA_COUNTERS = (
    ("tapeout_engine_prompt_tokens", "Prompt tokens, by the engine's count", "prompt_tokens"),
    ("tapeout_engine_cached_tokens", "Of these found in its cache", "cached_tokens"),
    ("tapeout_engine_output_tokens", "Output tokens, by the engine's count", "output_tokens"),
    ("tapeout_engine_preemptions", "Sequences that had to make room", "preemptions"),
    ("tapeout_engine_rows", "Rows of tensor programs that ran", "rows"),
    ("tapeout_engine_runs", "Batches they ran in", "runs"),
)


class BoxCollector(Collector):
    """Reads the running parts. In memory only: a scrape never waits for the database."""

    def __init__(self, state: State, problem: str) -> None:
        self._state = state
        self._problem = problem

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("tapeout_ready", "1 while requests can be served")
        ready.add_metric([], 0 if self._problem else 1)
        yield ready
        fleet: Fleet = self._state.fleet
        replicas = list(fleet.all_live())
        status = GaugeMetricFamily(
            "tapeout_replica_status", "1 for the status a replica is in", labels=(*LABELS, "status")
        )
        for view, live in replicas:
            status.add_metric([*_labels(view, live), live.status], 1)
        yield status
        memory = GaugeMetricFamily(
            "tapeout_replica_memory_bytes", "Memory that it said it needs", labels=LABELS
        )
        for view, live in replicas:
            memory.add_metric(_labels(view, live), live.memory_bytes)
        yield memory
        yield from self._engine_metrics(replicas)
        unsettled = GaugeMetricFamily(
            "tapeout_unsettled_requests", "Requests that ended and are not in the database yet"
        )
        unsettled.add_metric([], self._state.accounts.num_unsettled)
        yield unsettled

    def _engine_metrics(self, replicas: list[tuple[EndpointView, LiveReplica]]) -> Iterator[Metric]:
        for families, kind in (
            (REPLICA_GAUGES, GaugeMetricFamily),
            (REPLICA_COUNTERS, CounterMetricFamily),
        ):
            for name, meaning, field in families:
                family = kind(name, meaning, labels=LABELS)
                for view, live in replicas:
                    family.add_metric(_labels(view, live), getattr(live.stats, field))
                yield family


def _labels(view: EndpointView, live: LiveReplica) -> list[str]:
    return [view.name, str(live.version_number), live.replica_id]


@get("/metrics", summary="Metrics for Prometheus")
async def show_metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
    """For keys with the scope `read` of the organization that operates the box, since they name
    every organization's endpoints."""
    principal = await bearer_principal(request)
    principal.require("read")
    if not principal.is_operator:
        raise Forbidden(
            "Metrics are of the whole box; only its operator may read them.", code="operator_only"
        )
    state = request.app.state
    meters: Meters = state.meters
    now = CollectorRegistry()
    now.register(BoxCollector(state, await problem_of(state)))
    text = generate_latest(meters.registry) + generate_latest(now)
    fleet: Fleet = state.fleet
    meters.keep(fleet.endpoint_names())  # what a model counted to its end is in one more scrape
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


router = Router("", route_handlers=[show_metrics], tags=["Health"])
