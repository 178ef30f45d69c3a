"""Every worker has its engine inside: nothing shared can fail, and capacity grows with each machine."""

from __future__ import annotations

from mvmci.cluster.deployment import Deployment, central, workers
from mvmci.cluster.topology import Topology


def plan(topology: Topology) -> Deployment:
    """A broker, a control plane, and workers that need nobody else."""
    return Deployment(units=(*central(topology), *workers(topology)))
