"""One engine for a handful of workers. Both only dial out: no port is open, and a NAT does not matter."""

from __future__ import annotations

from mvmci.cluster.deployment import BROKER, Deployment, central, executors, workers
from mvmci.cluster.topology import Topology


def plan(topology: Topology) -> Deployment:
    """One executor, which takes its work from the broker."""
    return Deployment(units=(*central(topology), *executors(topology), *workers(topology)), engine=BROKER)
