"""A cluster on many hosts, MVMCI_HOSTS of them: each takes 150 MiB of memory, and as much of the disk."""

from __future__ import annotations

import dataclasses
import os
import resource
import time

from tests.harness.hosts import Host
from tests.program.hosts.conftest import HostsCluster, ours

COUNT = int(os.environ.get("MVMCI_HOSTS", "4"))
# What `up` is to take, on a machine with nothing else to do: the first time, and again with no change.
FIRST_S, AGAIN_S = (8, 3) if COUNT <= 4 else (60, 10)
# The seconds of a processor that it has, on all hosts and here: beside others they hardly grow.
FIRST_CPU_S, AGAIN_CPU_S = 1 + 2.5 * COUNT, 0.5 + 0.1 * COUNT
BUSY = 5  # times as much, where it has
IS_ALONE = "PYTEST_XDIST_WORKER" not in os.environ


@dataclasses.dataclass
class Took:
    """What an `up` took."""

    text: str
    wall_s: float
    cpu_s: float


def up(cluster: HostsCluster, made: list[Host]) -> Took:
    """`up --detach`, which has to succeed."""

    def cpu_s() -> float:
        here = resource.getrusage(resource.RUSAGE_CHILDREN)
        return here.ru_utime + here.ru_stime + sum(host.group.cpu_s() for host in made)

    begin, before = time.monotonic(), cpu_s()
    done = cluster.mvmci.start("up", cluster.file, "--detach", "--within", "30m").end()
    took = Took(done.text, time.monotonic() - begin, cpu_s() - before)
    assert done.code == 0, done
    return took


def test_many_hosts_come_up_and_nothing_is_left_of_them(cluster: HostsCluster) -> None:
    made = cluster.made.add(*(f"n{number}" for number in range(1, COUNT + 1)), systemd=False)
    cluster.put(
        made,
        broker={"hosts": ["n1"]},
        control_plane={"hosts": ["n2"]},
        workers={"count": COUNT, "slots": 1},
    )
    cold = up(cluster, made)
    assert {unit["host"] for unit in cluster.units().values()} == {host.name for host in made}
    assert set(cluster.states().values()) == {"ready"}

    before = cluster.pids()
    warm = up(cluster, made)
    assert warm.text.startswith("nothing to change")
    assert cluster.pids() == before

    cluster.down("--purge")
    assert {host.name: ours(host) for host in made if ours(host)} == {}
    for name, took in (("up", cold), ("again", warm)):
        print(f"{COUNT} hosts: {name} in {took.wall_s:.1f} s, {took.cpu_s:.1f} s of a processor")
    assert cold.cpu_s < BUSY * FIRST_CPU_S
    assert warm.cpu_s < BUSY * AGAIN_CPU_S
    if IS_ALONE:
        assert cold.wall_s < BUSY * FIRST_S
        assert warm.wall_s < BUSY * AGAIN_S
