"""Hosts that lose their power for good, and come back after all."""

from __future__ import annotations

import re

import pytest

from tests.harness.hosts import Host
from tests.harness.waiting import until
from tests.program.hosts.conftest import HostsCluster, ours

DIRECTORY = "/var/lib/mvmci"  # of root
WORKERS = {"workers": {"count": 3, "slots": 1}}


@pytest.mark.soak
def test_hosts_without_power_are_given_up_and_take_no_part_until_they_are_taken_back(
    cluster: HostsCluster,
) -> None:
    (h1, b1), (s1,) = cluster.made.add("h1", "b1", systemd=False), cluster.made.add("s1", systemd=True)
    dead = {"worker-2": b1, "worker-3": s1}
    said = up(cluster, [h1, b1, s1])
    (started,) = re.findall("b1: .*(@reboot .*)", said)
    b1.write("/var/spool/cron/crontabs/root", f"{started}\n", 0o600)
    for host in dead.values():
        host.power_cut()

    said = up(cluster, [h1], lost=(b1, s1))
    for unit, host in dead.items():
        assert f"* host {host.name} is lost: what ran there is given up ({unit})" in said
    assert {unit["host"] for unit in cluster.ps()["units"]} == {"h1"}

    for unit, host in dead.items():  # a boot starts what was there, and the broker refuses it
        host.boot()
        log = ("sh", "-c", f"cat {DIRECTORY}/demo/units/{unit}/log || true")
        until(lambda host=host, log=log: "was revoked" in host.run(*log))
    cluster.all_well()
    assert up(cluster, [h1], lost=(b1, s1)).startswith("nothing to change")

    said = up(cluster, [h1, b1, s1])
    assert all(f"* host {host.name} is back" in said for host in dead.values())
    cluster.all_well()
    where = {unit["name"]: unit["host"] for unit in cluster.ps()["units"]}
    assert {name: where[name] for name in dead} == {"worker-2": "b1", "worker-3": "s1"}

    for host in dead.values():
        host.power_cut()
    cluster.put([h1], lost=(b1, s1), **WORKERS)
    told = cluster.down("--purge").err
    assert ours(h1) == []
    for host in dead.values():
        (command,) = re.findall(rf"{host.name} is lost, and was not asked: .* `mvmci (host .*)`", told)
        host.boot()
        host.run("sh", "-c", f"SHIV_ROOT={DIRECTORY}/_cache python3 -I {DIRECTORY}/bin/*.pyz {command}")
        # What the boot has only just begun finds that nothing is wanted, and ends.
        until(lambda host=host: not [one for one in ours(host) if not one.startswith(DIRECTORY)])
        assert {*host.run("ls", "-A", DIRECTORY).split()} <= {"_cache", "_host", "bin"}  # of no cluster


def up(cluster: HostsCluster, present: list[Host], *, lost: tuple[Host, ...] = ()) -> str:
    """Have the cluster on these hosts; what `up` says."""
    cluster.put(present, lost=lost, **WORKERS)
    return cluster.up().text
