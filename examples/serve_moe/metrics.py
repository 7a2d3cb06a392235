"""What the server counts, for Prometheus."""

from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class _ExpertRows(Collector):
    """A counter for each expert, added to as one array: a step costs the engine no loop."""

    def __init__(self, num_experts: int):
        self.rows = np.zeros(num_experts, np.int64)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yields the counters."""
        family = CounterMetricFamily(
            "serve_moe_expert_rows", "rows of each expert, in all layers", labels=["expert"]
        )
        for expert, rows in enumerate(self.rows):
            family.add_metric([str(expert)], rows)
        yield family


class _Seconds(Collector):
    """A histogram that takes the values of a step at once."""

    def __init__(self, name: str, text: str):
        self._name, self._text = name, text
        self._counts, self._sum = np.zeros(len(_SECONDS) + 1, np.int64), 0.0

    def observe(self, values: list[float]) -> None:
        """Adds values, in seconds."""
        buckets = np.searchsorted(_SECONDS, values)
        self._counts += np.bincount(buckets, minlength=self._counts.size)
        self._sum += sum(values)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yields the histogram."""
        bounds = [*map(str, _SECONDS), "+Inf"]
        buckets = list(zip(bounds, np.cumsum(self._counts).tolist(), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """The counters of one server, and nothing else's."""

    def __init__(self, num_experts: int):
        self._registry = registry = CollectorRegistry()
        self._expert_rows = _ExpertRows(num_experts)
        registry.register(self._expert_rows)
        self._tokens = Counter("serve_moe_tokens", "generated tokens", registry=registry)
        self._steps = Counter("serve_moe_steps", "programs run", registry=registry)
        self._dropped = Counter("serve_moe_dropped_rows", "should be 0", registry=registry)
        self._ended = Counter(
            "serve_moe_requests", "ended requests, by reason", ["reason"], registry=registry
        )
        self._occupied = Gauge("serve_moe_occupied_slots", "of the cache", registry=registry)
        self._waiting = Gauge("serve_moe_queue", "requests without a slot", registry=registry)
        self._first = _Seconds(
            "serve_moe_time_to_first_token_seconds", "from a request's arrival, waiting included"
        )
        self._between = _Seconds("serve_moe_inter_token_seconds", "between a request's tokens")
        registry.register(self._first)
        registry.register(self._between)

    def set_load(self, *, occupied: int, waiting: int) -> None:
        """Says how many slots are occupied, and how many requests wait."""
        self._occupied.set(occupied)
        self._waiting.set(waiting)

    def count_step(
        self,
        expert_rows: np.ndarray,
        dropped: np.ndarray,
        first: list[float],
        between: list[float],
    ) -> None:
        """Adds what a program returned.

        Args:
            expert_rows: [.., E], of each EP group.
            dropped: rows that found no room, of each device.
            first: seconds that the first tokens of requests took, from their arrival.
            between: seconds that the other tokens took, from the one before.
        """
        self._steps.inc()
        self._dropped.inc(int(dropped.sum()))
        self._expert_rows.rows += expert_rows.reshape(-1, self._expert_rows.rows.size).sum(axis=0)
        self._tokens.inc(len(first) + len(between))
        self._first.observe(first)
        self._between.observe(between)

    def count_end(self, reason: str) -> None:
        """Counts the end of a request."""
        self._ended.labels(reason).inc()

    def text(self) -> bytes:
        """The counters in Prometheus's text format."""
        return generate_latest(self._registry)
