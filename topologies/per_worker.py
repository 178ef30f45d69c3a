"""Every worker has its engine inside: nothing shared can fail, and capacity grows with each machine."""

from __future__ import annotations

from mvmci.cluster.deployment import Plan, central, workers
from mvmci.cluster.topology import Topology


def plan(topology: Topology) -> Plan:
    """A broker, a control plane, and workers that need nobody else."""
    return Plan(units=(*central(topology), *workers(topology)))
