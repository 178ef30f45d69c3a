"""What an executor counts, and what units tell of themselves, in the text that Prometheus reads.

The executor counts jobs, whichever door they came through; what is here reads that when it is asked, and
counts requests itself. Labels come from lists of ours, so that nobody outside can make new ones. What units
tell has the same names whether one is asked alone, or all of a cluster at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mvmci import __version__
from mvmci.api.engine import JobRunner
from mvmci.cluster import metrics
from mvmci.cluster.metrics import BrokerMetrics, UnitMetrics, edges_us
from mvmci.system.usage import PRESSURES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("ended", "released", "held", "fenced", "failed")
METHODS = frozenset({"GET", "HEAD", "POST"})
BUCKETS_S = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 600.0)
_US = 1_000_000


class Metrics:
    """The metrics of one executor, with those of `unit`, the unit that it is."""

    def __init__(self, executor: JobRunner, unit: Callable[[], UnitMetrics] | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Jobs(executor))
        if unit is not None:
            self._registry.register(_Told(lambda: _of_units([unit()])))
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


class _Told(Collector):
    """What `collect` makes whenever somebody asks."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def describe(self) -> list[Metric]:
        """Nothing, so that none is made only to learn its name."""
        return []

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def text_of(units: Iterable[UnitMetrics], broker: BrokerMetrics | None = None) -> bytes:
    """What several units told, and their broker."""
    registry = CollectorRegistry()
    found = [*_of_units(list(units)), *(_of_broker(broker) if broker is not None else ())]
    registry.register(_Told(lambda: found))
    return generate_latest(registry)


_LABELS = ("unit", "role", "host")
_COUNTERS: dict[str, tuple[str, Callable[[UnitMetrics], float]]] = {
    "slot_seconds": ("For how long slots were taken, summed over them.", lambda one: one.slot_us / _US),
    "orders_refused": ("Orders that found no free slot.", lambda one: one.refused),
    "loop_run_seconds": ("Its event loop at work.", lambda one: one.process.loop_ran_us / _US),
    "loop_wait_seconds": (
        "Its event loop waiting for a processor.",
        lambda one: one.process.loop_waited_us / _US,
    ),
    "cpu_seconds": ("Its process.", lambda one: one.process.cpu_us / _US),
    "children_cpu_seconds": ("Its guests and helpers.", lambda one: one.process.children_us / _US),
    "throttled_seconds": ("Held back by its cgroup.", lambda one: one.cgroup.throttled_us / _US),
    "oom_kills": ("Processes of its cgroup that were killed for memory.", lambda one: one.cgroup.killed),
}
_GAUGES: dict[str, tuple[str, Callable[[UnitMetrics], float]]] = {
    "slots": ("Jobs that may run at once.", lambda one: one.slots),
    "memory_bytes": ("Of its process, its guests and helpers.", lambda one: one.process.memory_bytes),
    "open_files": ("Of its process.", lambda one: one.process.files),
    "memory_limit_bytes": ("Of its cgroup; 0 for none.", lambda one: one.cgroup.memory_bytes_max),
}
_HISTOGRAMS: dict[str, tuple[str, Callable[[UnitMetrics], metrics.Histogram]]] = {
    "write_seconds": ("Writes to journals, until they were on disk.", lambda one: one.writes),
    "order_seconds": ("To an executor and back.", lambda one: one.orders),
    "round_trip_seconds": ("To the broker and back.", lambda one: one.round_trips),
    "late_seconds": ("How late its event loop came.", lambda one: one.late),
}


def _of_units(units: Sequence[UnitMetrics]) -> Iterator[Metric]:
    told = [((one.unit, one.role, one.host), one) for one in units]
    for name, (about, value) in _COUNTERS.items():
        counter = CounterMetricFamily(f"mvmci_unit_{name}", about, labels=_LABELS)
        for labels, one in told:
            counter.add_metric(labels, value(one))
        yield counter
    for name, (about, value) in _GAUGES.items():
        gauge = GaugeMetricFamily(f"mvmci_unit_{name}", about, labels=_LABELS)
        for labels, one in told:
            gauge.add_metric(labels, value(one))
        yield gauge
    for name, (about, pick) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(f"mvmci_unit_{name}", about, labels=_LABELS)
        for labels, one in told:
            histogram.add_metric(labels, _buckets(pick(one)), pick(one).total_us / _US)
        yield histogram
    runs = CounterMetricFamily("mvmci_unit_runs", "Runs, by how they came out.", labels=(*_LABELS, "outcome"))
    for labels, one in told:
        for outcome in OUTCOMES:
            runs.add_metric((*labels, outcome), one.jobs.get(outcome, 0))
    yield runs
    yield from _of_machines(units)


def _buckets(found: metrics.Histogram) -> list[tuple[str, float]]:
    """As Prometheus counts: each has those before it, and the last has all."""
    total, buckets = 0, []
    for place, count in enumerate(found.buckets):
        total += count
        edge = str(edges_us(place)[1] / _US) if place < len(found.buckets) - 1 else "+Inf"
        buckets.append((edge, float(total)))
    return buckets


def _of_machines(units: Sequence[UnitMetrics]) -> Iterator[Metric]:
    machines = {one.machine.boot: (one.host, one.machine) for one in units}
    busy = CounterMetricFamily("mvmci_machine_busy_seconds", "Of all processors.", labels=("host",))
    processors = GaugeMetricFamily("mvmci_machine_processors", "That it has.", labels=("host",))
    free = GaugeMetricFamily("mvmci_machine_free_bytes", "Memory that is available.", labels=("host",))
    about = "While some, or all, waited for a resource: pressure stall information."
    stalled = CounterMetricFamily("mvmci_machine_stalled_seconds", about, labels=("host", "resource", "who"))
    for host, machine in machines.values():
        busy.add_metric((host,), machine.busy_us / _US)
        processors.add_metric((host,), machine.processors)
        free.add_metric((host,), machine.free_bytes)
        for resource, who in product(PRESSURES, ("some", "full")):
            us = machine.stalled.get(f"{resource}.{who}")
            if us is not None:
                stalled.add_metric((host, resource, who), us / _US)
    yield from (busy, processors, free, stalled)


def _of_broker(told: BrokerMetrics) -> Iterator[Metric]:
    gauges = {
        "cores": ("Processors that it uses.", told.cores),
        "memory_bytes": ("Of its process.", told.memory_bytes),
        "connections": ("That it has.", told.connected),
        "stored_messages": ("In all streams.", told.stored_messages),
        "stored_bytes": ("In all streams.", told.stored_bytes),
        "stored_limit_bytes": ("That it may store.", told.stored_bytes_max),
        "pending_bytes": ("On their way to units.", sum(one.pending_bytes for one in told.connections)),
    }
    counters = {
        "slow_connections": ("That were cut because they took too little.", told.slow),
        "messages_in": ("That it got.", told.messages_in),
        "messages_out": ("That it sent.", told.messages_out),
        "bytes_in": ("That it got.", told.bytes_in),
        "bytes_out": ("That it sent.", told.bytes_out),
        "requests": ("To JetStream.", told.requests),
        "requests_failed": ("To JetStream.", told.requests_failed),
    }
    for name, (about, value) in gauges.items():
        yield GaugeMetricFamily(f"mvmci_broker_{name}", about, value=value)
    for name, (about, value) in counters.items():
        yield CounterMetricFamily(f"mvmci_broker_{name}", about, value=value)
