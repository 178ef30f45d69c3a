"""What an executor counts, in the text that Prometheus reads.

The executor counts jobs, whichever door they came through; what is here reads that when it is asked, and
counts requests itself. Labels come from lists of ours, so that nobody outside can make new ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from mvmci import __version__
from mvmci.api.engine import JobRunner

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("ended", "released", "held", "fenced", "failed")
METHODS = frozenset({"GET", "HEAD", "POST"})
BUCKETS_S = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 600.0)


class Metrics:
    """The metrics of one executor."""

    def __init__(self, executor: JobRunner) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Jobs(executor))
        ProcessCollector(registry=self._registry)
        self._requests = Histogram(
            "mvmci_http_request_duration_seconds",
            "How long requests took to be answered in full.",
            ("method", "route", "status"),
            buckets=BUCKETS_S,
            registry=self._registry,
        )

    def count(self, method: str, route: str, status: int, took_s: float) -> None:
        """One request more. `route` is empty for what is no route."""
        name = method if method in METHODS else "other"
        self._requests.labels(name, route or "none", str(status)).observe(took_s)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)


class _Jobs(Collector):
    def __init__(self, executor: JobRunner) -> None:
        self._executor = executor

    def collect(self) -> Iterator[Metric]:
        executor = self._executor
        about = {"version": __version__, "unit": executor.unit}
        yield InfoMetricFamily("mvmci", "Which executor this is.", value=about)
        yield GaugeMetricFamily("mvmci_slots", "Jobs that may run at once.", value=executor.slots)
        busy = executor.slots - executor.free
        yield GaugeMetricFamily("mvmci_slots_busy", "Slots that run a job.", value=busy)
        yield GaugeMetricFamily("mvmci_draining", "1 while no jobs are taken.", value=int(executor.draining))
        taken, refused = "Jobs that were taken.", "Jobs that were refused because no slot was free."
        yield CounterMetricFamily("mvmci_jobs_taken", taken, value=executor.counts["taken"])
        yield CounterMetricFamily("mvmci_jobs_refused", refused, value=executor.counts["refused"])
        runs = CounterMetricFamily("mvmci_runs", "Runs of jobs, by how they came out.", labels=["outcome"])
        for outcome in OUTCOMES:
            runs.add_metric([outcome], executor.counts[outcome])
        yield runs
