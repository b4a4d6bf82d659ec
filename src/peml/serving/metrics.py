"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        in_flight: requests that the engine has now.
        cache_free: share of its cache that is free.
    """

    def __init__(self, in_flight: Callable[[], float], cache_free: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "peml_requests", "Requests answered, by path, model and status.", ["path", "model", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter("peml_tokens", "Tokens read and written.", ["model", "kind"], registry=self.registry)
        self.first = Histogram("peml_first_token_seconds", "Until the first token.", registry=self.registry)
        self.whole = Histogram("peml_request_seconds", "Until the last token.", registry=self.registry)
        Gauge("peml_requests_in_flight", "Running and waiting.", registry=self.registry).set_function(in_flight)
        Gauge("peml_cache_free_ratio", "Of the paged cache.", registry=self.registry).set_function(cache_free)

    def page(self) -> bytes:
        """All of it, in Prometheus' text form."""
        page: bytes = generate_latest(self.registry)
        return page
