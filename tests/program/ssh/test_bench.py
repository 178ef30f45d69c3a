"""`mvmci bench` on hosts where a cluster of the user's runs: beside it, and nothing of it is left."""

from __future__ import annotations

import asyncio

from mvmci.bench.report import decode
from tests.program.ssh.conftest import Farm

OPTIONS = ("--profile", "light", "--workers", "1,2", "--budget", "4m", "--json")


async def test_it_measures_on_hosts_beside_the_users_cluster_and_leaves_nothing(farm: Farm) -> None:
    done = await farm.up()
    assert done.code == 0, done
    pids = {name: unit["pid"] for name, unit in (await farm.units()).items()}
    kept = farm.settled()
    farm.more = "access: peer\nexecutors: {slots: 1}"
    measured = await asyncio.to_thread(farm.mvmci, "bench", farm.write(), *OPTIONS)
    assert measured.code == 0, measured
    report = decode(measured.out)
    assert {one.name: one.runtime for one in report.candidates} == {"demo": "ssh", "control": "ssh"}
    assert report.counted.submitted == report.counted.ended_once > 100
    assert all(one.evidence.units for one in report.diagnoses)
    (machine,) = report.machines  # all hosts of the farm are on it
    assert set(machine.hosts) >= {host for one in report.candidates for host in one.hosts} > set()
    assert {name: unit["pid"] for name, unit in (await farm.units()).items()} == pids
    assert farm.settled() == kept
    assert not (farm.mvmci.state / "_bench").exists()
