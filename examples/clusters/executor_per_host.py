"""One executor on each host that is present; the broker balances them."""

from mvmci.cluster.deployment import BROKER, Deployment, Unit, central, executor_options, hosts_of, workers
from mvmci.cluster.topology import Topology


def plan(topology: Topology) -> Deployment:
    told = executor_options(topology)
    executors = (
        Unit(name=f"executor-{host}", role="executor", host=host, options=told) for host in hosts_of(topology)
    )
    return Deployment(units=(*central(topology), *executors, *workers(topology)), engine=BROKER)
