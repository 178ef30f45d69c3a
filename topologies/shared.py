"""One engine beside the control plane, which workers reach over HTTP by its name. For trying things out."""

from __future__ import annotations

from mvmci.cluster.deployment import LISTENS, Deployment, central, executors, planes, workers
from mvmci.cluster.topology import Topology


def plan(topology: Topology) -> Deployment:
    """One executor that listens, where the control plane is unless the file says otherwise."""
    (executor,) = executors(topology, LISTENS, hosts=planes(topology)[:1])
    return Deployment(
        units=(*central(topology), executor, *workers(topology)),
        engine=f"http://{{address:{executor.name}}}",
    )
