"""Five hosts under load: whatever is done to them, every job ends once, and no effect happens twice."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.faults.chaos.conftest import join
from tests.faults.chaos.judge import judge
from tests.faults.chaos.load import Client, Report
from tests.faults.chaos.outside import Outside, once
from tests.harness.hosts import Host
from tests.harness.program import other_build
from tests.harness.waiting import LONG_S, until, until_true
from tests.program.hosts.conftest import HostsCluster, ours

SEED = 13
# MVMCI_HARMED=all: each of the hosts is, and not only that of the broker and the one without systemd.
HARMED = os.environ.get("MVMCI_HARMED", "")
EVERY_S = 0.7  # between two submits
ROUND_S = 5.0
# Longer than a silence that means death.
AWAY_S = 12.0
WORKERS, SLOTS = 6, 2
LONG, PAUSE = 12, {"sleep": 800}  # effects of a job that takes longer than harm does


@asynccontextmanager
async def load(client: Client) -> AsyncIterator[None]:
    """Submit jobs as long as the block lasts."""
    over = asyncio.Event()

    async def submit() -> None:
        while not over.is_set():
            await client.run(ROUND_S, EVERY_S)

    submitting = asyncio.create_task(submit())
    try:
        yield
    finally:
        over.set()
        await submitting


class Life:
    """What is done to a cluster of these hosts, one after the other, under load."""

    def __init__(self, cluster: HostsCluster, present: list[Host], allow: str) -> None:
        self.cluster, self.present = cluster, present
        self.client: Client
        self.sections: dict[str, object] = {
            "broker": {"hosts": ["h1"]},
            "control_plane": {"hosts": ["h2"]},
            "workers": {"count": WORKERS, "slots": SLOTS},
            "allow": {"http": [allow]},
        }
        self.took_s: dict[str, float] = {}

    async def up(self, step: str, *, absent: tuple[Host, ...] = (), **sections: object) -> str:
        """Put it up as it is to be now; what `up` says."""
        self.sections = {key: value for key, value in (self.sections | sections).items() if value}
        present = [host for host in self.present if host not in absent]
        self.cluster.put(present, absent=absent, **self.sections)
        begin = time.monotonic()
        done = await asyncio.to_thread(self.cluster.up)
        self.took_s[step] = time.monotonic() - begin
        return done.text

    async def well(self) -> None:
        await asyncio.to_thread(self.cluster.all_well)

    async def at_work(self) -> None:
        """Have every worker be at a job that will be so for a while."""
        for _ in range(WORKERS * SLOTS):
            job = self.client.fresh("l")
            steps = [
                step for number in range(LONG) for step in (once(self.client.outside, job, number), PAUSE)
            ]
            await self.client.workflow(steps, job)

        async def busy() -> bool:
            members = await self.client.store.presence.members()
            workers = [one for one in members if one.about.role == "worker"]
            return len(workers) == WORKERS and all(one.holds or one.keeps for one in workers)

        await until_true(busy)

    async def unplug(self, host: Host) -> None:
        host.unplug()
        await asyncio.sleep(AWAY_S)
        host.plug()

    async def cut_power(self, host: Host) -> None:
        await asyncio.to_thread(host.power_cut)
        await asyncio.to_thread(host.boot)

    async def reboot(self, host: Host) -> None:
        await asyncio.to_thread(host.reboot)

    async def go_over_to(self, step: str, zipapp: Path) -> None:
        """Put it up with another build, under which all but the broker run then."""
        mvmci = dataclasses.replace(self.cluster.mvmci, zipapp=zipapp)
        self.cluster = dataclasses.replace(self.cluster, mvmci=mvmci)
        before = self.cluster.pids()
        await self.up(step)
        after = self.cluster.pids()
        assert {name for name in before if before[name] == after[name]} == {"broker-1"}
        digest = hashlib.sha256(zipapp.read_bytes()).hexdigest()
        builds = {unit["build"] for unit in self.cluster.ps()["units"] if unit["role"] != "broker"}
        assert len(builds) == 1 and digest.startswith(*builds)


async def test_hosts_live_through_all_that_is_done_to_them(
    cluster: HostsCluster, zipapp: Path, tmp_path: Path
) -> None:
    made = cluster.made
    systemd = await asyncio.to_thread(made.add, "h1", "h2", "h3", "h4", systemd=True)
    (bare,) = await asyncio.to_thread(made.add, "b1", systemd=False)
    async with AsyncExitStack() as closing:
        outside = await closing.enter_async_context(Outside(slow_s=0.3, seed=SEED).serve(made.address))
        life = Life(cluster, systemd, outside.allow)
        await life.up("cold")
        life.client = client = Client((await join(cluster, closing)).store, outside, random.Random(SEED))
        await client.prepare("script", "sleeper", "hello")
        async with load(client):
            assert (await life.up("warm")).startswith("nothing to change")
            life.present.append(bare)
            started = re.search("@reboot .*", await life.up("a fifth host"))
            assert started, "nothing says what starts it after a boot"
            bare.write("/var/spool/cron/crontabs/root", f"{started[0]}\n", 0o600)
            for host in life.present if HARMED == "all" else (systemd[0], bare):
                for harm in (life.unplug, life.cut_power, life.reboot):
                    await life.at_work()
                    await harm(host)
                    await life.well()
            await life.go_over_to("the next build", other_build(zipapp, tmp_path))
            await life.go_over_to("the build before", zipapp)
            await life.up("access", access="pool", executors={"count": 3, "slots": 4})
            await life.up("access back", access="per-worker", executors=None)
            await life.up("absent", absent=(systemd[3],))
            assert ours(systemd[3]) == []
            assert (await asyncio.to_thread(cluster.mvmci, "revoke", "worker-1")).code == 0
            await asyncio.to_thread(until, lambda: cluster.states()["worker-1"] == "down", cluster.ps)
            await life.up("after a key was revoked", absent=(systemd[3],))
            await life.well()
        await client.settle()
        faults = await judge(client.store, client.accepted, outside, LONG_S)
        report = Report()
        report.counts["effects"] = outside.total
        await report.of_jobs(client.store, client.accepted)
        report.print(f"hosts, seed {SEED}, seconds of up: {life.took_s}")
        assert faults == []
        harmed = 5 if HARMED == "all" else 2
        report.assert_enough(jobs=40 * harmed, succeeded=40 * harmed, recovered=harmed // 2)
    cluster.down("--purge")
    assert {host.name: ours(host) for host in made.hosts.values() if ours(host)} == {}
