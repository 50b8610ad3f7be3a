"""What is counted, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Figures:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "avalab_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.tokens = Counter("avalab_tokens", "Tokens by kind", ["kind"], registry=self.registry)
        self.seconds = Histogram(
            "avalab_request_seconds", "Seconds to the end of an answer", buckets=BUCKETS, registry=self.registry
        )
        self.first = Histogram(
            "avalab_first_token_seconds", "Seconds to the first token", buckets=BUCKETS, registry=self.registry
        )
        self.gauges: dict[str, Gauge] = {}

    def text(self, now: dict) -> bytes:
        """Everything that is counted, and the numbers of `now` as gauges."""
        for name, value in now.items():
            if isinstance(value, int | float):
                if name not in self.gauges:
                    self.gauges[name] = Gauge(f"avalab_{name}", name.replace("_", " "), registry=self.registry)
                self.gauges[name].set(value)
        return generate_latest(self.registry)
