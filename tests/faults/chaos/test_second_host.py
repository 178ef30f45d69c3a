"""A second host that has Python and the file: it joins over TLS, works, and comes back after its cable."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
from contextlib import AsyncExitStack
from pathlib import Path

from mvmci.cluster.identity import decode_ticket
from mvmci.store import Store
from tests.faults.chaos.conftest import Make, join
from tests.faults.chaos.hosts import Host
from tests.faults.chaos.judge import judge
from tests.faults.chaos.load import Client, Report
from tests.faults.chaos.outside import Outside, once
from tests.faults.chaos.test_stopped_worker import unit_of
from tests.harness.cluster import Cluster
from tests.harness.network import Network
from tests.harness.waiting import LONG_S, until_journal

SECOND = "second"
UNPLUGGED_S = 20.0
EVERY_S = 0.5
AROUND_S = 3.0  # under load with the cable in, before and after
TOPOLOGY = """
cluster: demo
broker: {{listen: 0.0.0.0}}
workers: {{count: 2, slots: 2}}
allow: {{http: ["{allow}"]}}
"""


async def members(store: Store) -> set[str]:
    return {member.unit for member in await store.presence.members()}


async def drain(cluster: Cluster, *options: str) -> None:
    """Let the workers of this machine take no jobs; `--undo`: let them."""
    for name in ("worker-1", "worker-2"):
        done = await asyncio.to_thread(cluster.mvmci, "drain", name, *options)
        assert done.code == 0, done


async def runs_on_the_second(client: Client, cluster: Cluster) -> None:
    """A command and a workflow, both with what they need fetched and compiled there."""
    await drain(cluster)
    await client.command("hello", job=(command := client.fresh("c")))
    await client.workflow([once(client.outside, (flow := client.fresh("f")), 0)], flow)
    for job in (command, flow):
        journal = await until_journal(client.store, job, lambda journal: journal.state.done)
        assert unit_of(journal) == SECOND
    await drain(cluster, "--undo")


async def unplug_at_work(client: Client, host: Host) -> None:
    """Draw the cable of the second host in the middle of a job that would keep it for long."""
    async with asyncio.timeout(LONG_S):
        while True:
            async with client.witness() as unit:
                if unit == SECOND:
                    host.namespace.unplug()
                    return


async def test_a_second_host_joins_over_tls_and_comes_back_after_its_cable_was_out(
    make: Make, closing: AsyncExitStack, lan: Network, zipapp: Path, tmp_path: Path
) -> None:
    outside = await closing.enter_async_context(Outside(slow_s=0.3, seed=1).serve(lan.address))
    cluster = make(TOPOLOGY.format(allow=outside.allow))
    await asyncio.to_thread(cluster.up)
    joined = await join(cluster, closing)
    client = Client(joined.store, outside, random.Random(1))
    await client.prepare("script", "sleeper", "hello")

    host = Host(lan.add(SECOND), tmp_path / SECOND)
    there = host.program(zipapp)
    ticket = shutil.copy(cluster.folder / "ticket", host.home / "ticket")
    login = decode_ticket(Path(ticket).read_text()).login
    assert login.ca
    assert any(url.startswith(f"tls://{lan.address}:") for url in login.urls)
    assert {path.name for path in host.home.iterdir()} == {"mvmci.pyz", "ticket"}
    worker = there.start("worker", "--join", f"@{ticket}", "--name", SECOND, "--slots", "2")
    try:
        await asyncio.to_thread(worker.hears, f"{SECOND} has joined demo", "err")
        await runs_on_the_second(client, cluster)

        loading = asyncio.create_task(client.run(UNPLUGGED_S + 2 * AROUND_S, EVERY_S))
        await asyncio.sleep(AROUND_S)
        try:
            await unplug_at_work(client, host)
            await asyncio.sleep(UNPLUGGED_S / 2)
            assert SECOND not in await members(client.store)
            await asyncio.sleep(UNPLUGGED_S / 2)
        finally:
            host.namespace.plug()
        async with asyncio.timeout(LONG_S):
            while SECOND not in await members(client.store):  # noqa: ASYNC110 (nobody tells of it)
                await asyncio.sleep(0.1)
        await loading
        await runs_on_the_second(client, cluster)
        await client.settle()
        assert await judge(client.store, client.accepted, outside, LONG_S) == []
        assert worker.alive
        report = Report()
        await report.of_jobs(client.store, client.accepted)
        report.print("unplugged")
        report.assert_enough(jobs=20, operations=200, recovered=1)
    finally:
        worker.signal(signal.SIGTERM)
        done = await asyncio.to_thread(worker.end)
    assert done.code == 128 + signal.SIGTERM, done
