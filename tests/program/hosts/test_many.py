"""A cluster on many hosts, MVMCI_HOSTS of them: each takes 150 MiB of memory, and as much of the disk."""

from __future__ import annotations

import os
import time

from tests.program.hosts.conftest import HostsCluster, ours

COUNT = int(os.environ.get("MVMCI_HOSTS", "4"))
# What `up` is to take, on a machine with nothing else to do: the first time, and again with no change.
FIRST_S, AGAIN_S = (8, 3) if COUNT <= 4 else (60, 10)
BUSY = 5  # times as long, where it has


def test_many_hosts_come_up_and_nothing_is_left_of_them(cluster: HostsCluster) -> None:
    made = cluster.made.add(*(f"n{number}" for number in range(1, COUNT + 1)), systemd=False)
    cluster.put(
        made,
        broker={"hosts": ["n1"]},
        control_plane={"hosts": ["n2"]},
        workers={"count": COUNT, "slots": 1},
    )
    begin = time.monotonic()
    cluster.up("--within", "30m")
    cold_s = time.monotonic() - begin
    assert {unit["host"] for unit in cluster.units().values()} == {host.name for host in made}
    assert set(cluster.states().values()) == {"ready"}

    before, begin = cluster.pids(), time.monotonic()
    assert cluster.up().text.startswith("nothing to change")
    warm_s = time.monotonic() - begin
    assert cluster.pids() == before

    cluster.down("--purge")
    assert {host.name: ours(host) for host in made if ours(host)} == {}
    print(f"{COUNT} hosts: up in {cold_s:.1f} s, again in {warm_s:.1f} s")
    assert cold_s < BUSY * FIRST_S
    assert warm_s < BUSY * AGAIN_S
