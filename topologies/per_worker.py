"""Every worker has its engine inside: nothing shared can fail, and capacity grows with each machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mvmci.plan import LOCAL_HOST, Plan, Unit, deal
from mvmci.topology import Topology


def plan(topology: Topology) -> Plan:
    """A broker (unless there is one), a control plane, and the workers."""
    hosts = [name for name, host in topology.hosts.items() if host.state == "present"] or [LOCAL_HOST]
    return Plan(units=tuple(_units(topology, hosts)))


def _units(topology: Topology, hosts: Sequence[str]) -> Iterator[Unit]:
    workers = topology.workers
    if topology.broker.url is None:
        brokers = topology.broker.hosts or hosts[:1]
        yield from deal("broker", "broker", len(brokers), brokers, ())
    planes = topology.control_plane.hosts or hosts[:1]
    yield from deal("control-plane", "control-plane", len(planes), planes, ())
    yield from deal("worker", "worker", workers.count, workers.hosts or hosts, tuple(_options(topology)))


def _options(topology: Topology) -> Iterator[str]:
    """What each worker is told, beyond its name."""
    workers = topology.workers
    if workers.slots is not None:
        yield f"--slots={workers.slots}"
    yield from (f"--queue={queue}" for queue in workers.queues)
    yield from (f"--label={key}={value}" for key, value in sorted(workers.labels.items()))
    if topology.min_isolation != "process":
        yield f"--min-isolation={topology.min_isolation}"
    if topology.isolation != "reuse":
        yield f"--isolation={topology.isolation}"
