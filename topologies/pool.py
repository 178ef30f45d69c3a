"""Several engines behind whatever balances them: for those that are dear, or grow apart from workers."""

from __future__ import annotations

from mvmci.cluster.deployment import BROKER, LISTENS, Deployment, balancer, central, executors, workers
from mvmci.cluster.topology import ExecutorsSection, Topology


def plan(topology: Topology) -> Deployment:
    """N executors. The broker balances them, or a balancer that is started, or one behind the file's URL."""
    asked = topology.executors or ExecutorsSection()
    options = (LISTENS,) if asked.url or asked.balancer else ()
    pool = tuple(executors(topology, *options))
    if asked.balancer:
        front = balancer(topology, pool)
        pool, engine = (*pool, front), f"http://{{address:{front.name}}}"
    else:
        engine = asked.url.rstrip("/") if asked.url else BROKER
    return Deployment(units=(*central(topology), *pool, *workers(topology)), engine=engine)
