"""Counters of what was served since this process started, for `/metrics`.

Owns what is counted of each request that ends. Nothing is billed from them: that is the ledger's.
"""

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Histogram

from app.metering.records import Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
NANO_PER_SECOND = 1e9


MAX_ENDPOINTS = 1000  # names that are counted apart, at some kilobytes each


class Meters:
    """One per process. An endpoint's name is the only label that people choose: of more than
    `MAX_ENDPOINTS`, the one that was idle for longest is forgotten, whether anybody scrapes or
    not."""

    def __init__(self) -> None:
        self._endpoints: dict[str, None] = {}  # the one that served last is the last
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "tapeout_requests",
            "Requests that have ended, by how",
            ("endpoint", "outcome"),
            registry=self.registry,
        )
        self._tokens = Counter(
            "tapeout_tokens",
            "Tokens of requests that have ended: input (not found in the cache), cached, output",
            ("endpoint", "kind"),
            registry=self.registry,
        )
        self._device_seconds = Counter(
            "tapeout_device_seconds",
            "Device time of requests that have ended",
            ("endpoint",),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "tapeout_request_seconds",
            "From a request's arrival to its end",
            ("endpoint",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._first_token_seconds = Histogram(
            "tapeout_first_token_seconds",
            "From a request's arrival to its first token",
            ("endpoint",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._refusals = Counter(
            "tapeout_refusals",
            "Requests for which no money could be held, by the error's code",
            ("code",),
            registry=self.registry,
        )

    def observe(self, usage: Usage) -> None:
        """Counts a request that has ended."""
        endpoint = usage.admitted.endpoint_name
        self._endpoints.pop(endpoint, None)
        self._endpoints[endpoint] = None
        if len(self._endpoints) > MAX_ENDPOINTS:
            self._forget(next(iter(self._endpoints)))
        self._requests.labels(endpoint, usage.outcome).inc()
        for kind, count in (
            ("input", usage.input_tokens),
            ("cached", usage.cached_tokens),
            ("output", usage.output_tokens),
        ):
            if count:
                self._tokens.labels(endpoint, kind).inc(count)
        self._device_seconds.labels(endpoint).inc(usage.device_ms / 1000)
        duration_ns = usage.finished_at_ns - usage.admitted.started_at_ns
        self._seconds.labels(endpoint).observe(duration_ns / NANO_PER_SECOND)
        if usage.first_token_ns is not None:
            seconds = usage.first_token_ns / NANO_PER_SECOND
            self._first_token_seconds.labels(endpoint).observe(seconds)

    def keep(self, endpoints: Collection[str]) -> None:
        """Forgets all others: names that no longer serve would fill every scrape for good."""
        for gone in self._endpoints.keys() - set(endpoints):
            self._forget(gone)

    def _forget(self, endpoint: str) -> None:
        del self._endpoints[endpoint]
        for metric in (
            self._requests,
            self._tokens,
            self._device_seconds,
            self._seconds,
            self._first_token_seconds,
        ):
            metric.remove_by_labels({"endpoint": endpoint})

    def refuse(self, code: str) -> None:
        """Counts a request that was refused for want of money."""
        self._refusals.labels(code).inc()
