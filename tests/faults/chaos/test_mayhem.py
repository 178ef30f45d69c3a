"""A real cluster under load, and everything in it killed, stopped and cut off at random: nothing is lost.

MVMCI_CHAOS_S says how long each run is harmed, MVMCI_CHAOS_SEED what the dice are made of, and
MVMCI_CHAOS_REPORT names a file for the figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from mvmci.runtimes.local.supervisor import SupervisorFiles
from tests.faults.chaos.conftest import Make, join
from tests.faults.chaos.judge import judge
from tests.faults.chaos.load import Client, Report
from tests.faults.chaos.outside import Outside
from tests.faults.chaos.units import Mayhem, pids
from tests.harness.cluster import Cluster
from tests.harness.places import GUESTS
from tests.harness.proxy import Proxy

KILLS_S = float(os.environ.get("MVMCI_CHAOS_S", "60"))
CUTS_S = float(os.environ.get("MVMCI_CHAOS_S", "25"))
SEED = int(os.environ.get("MVMCI_CHAOS_SEED", "0")) or time.time_ns() % 1_000_000
EVERY_S = 0.6  # between two submits
END_S = 120.0  # for whatever has not ended by then, once all is well
SLOW_S = 0.3
# Longer than a silence that means death. One worker's line at a time is out for so long, while the others
# are well: whoever is cut off himself declares nobody dead.
LONG_S = (9.0, 12.0)
STORM_S = 5.0
ROUNDS_MAX = 5  # a busy machine sees less happen in the same time: it goes on until there was enough
SHORT = {"quiet_s": 1.5, "longest_s": 2.0}
TOPOLOGY = """
cluster: demo
hosts: {{a: {{}}, b: {{}}}}
control_plane: {{hosts: [a, b]}}
workers: {{count: 3, slots: 3}}
allow: {{http: ["{allow}"]}}
"""


@pytest.fixture
async def outside(closing: AsyncExitStack) -> Outside:
    return await closing.enter_async_context(Outside(slow_s=SLOW_S, seed=SEED).serve())


async def start(make: Make, closing: AsyncExitStack, outside: Outside) -> tuple[Cluster, Client]:
    """A cluster that runs, and a client of it."""
    cluster = make(TOPOLOGY.format(allow=outside.allow))
    await asyncio.to_thread(cluster.up)
    joined = await join(cluster, closing)
    client = Client(joined.store, outside, random.Random(SEED))
    await client.prepare("script", "sleeper", "hello")
    return cluster, client


async def assess(cluster: Cluster, client: Client, report: Report, name: str) -> None:
    """Let it come to rest; then all must be well, and something must have happened."""
    await client.settle()
    faults = await judge(client.store, client.accepted, client.outside, END_S)
    report.counts["submits"] = client.submits
    report.counts["effects"] = client.outside.total
    await report.of_jobs(client.store, client.accepted)
    report.of_logs(cluster.folder)
    report.print(f"{name}, seed {SEED}")
    assert faults == []


def batch(path: Path, count: int) -> None:
    """A file for `submit --batch`."""
    line = {"module": str(GUESTS / "hello.wasm"), "attempts": 1000}
    path.write_text("".join(json.dumps({**line, "id": f"b-{number}"}) + "\n" for number in range(count)))


async def stop_for_long(client: Client, mayhem: Mayhem, seconds: float) -> None:
    """Now and again a worker that is in the middle of an effect, until others have surely taken over."""
    dice = random.Random(SEED)
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                async with client.witness() as unit:
                    await mayhem.stop(unit, dice.uniform(*LONG_S))
                await asyncio.sleep(dice.uniform(0, LONG_S[0]))


async def test_whatever_is_killed_or_stopped_every_job_ends_once_and_no_effect_happens_twice(
    make: Make, closing: AsyncExitStack, outside: Outside
) -> None:
    print(f"seed {SEED}")
    cluster, client = await start(make, closing, outside)
    mayhem = Mayhem(cluster.folder, random.Random(SEED))
    share = int(KILLS_S) // 10
    least = {"jobs": 5 * share, "operations": 50 * share, "effects": 10 * share}
    least |= {"kills": 2 * share, "stops": 2 * share, "recovered": share, "fenced": 1}
    for _ in range(ROUNDS_MAX):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(mayhem.run(KILLS_S))
            tasks.create_task(client.run(KILLS_S, EVERY_S))
            tasks.create_task(stop_for_long(client, mayhem, KILLS_S))
        async with client.witness() as unit:  # until now, whoever was stopped may have been killed as well
            await mayhem.stop(unit, LONG_S[1])
        report = Report(mayhem.counts.copy())
        for what in ("kill", "stop"):
            told = (count for name, count in mayhem.counts.items() if name.startswith(what))
            report.counts[f"{what}s"] = sum(told)
        await assess(cluster, client, report, "kills")
        if not report.few(**least):
            break
    report.assert_enough(**least)


async def put_behind_proxies(cluster: Cluster, closing: AsyncExitStack) -> dict[str, Proxy]:
    """Give each worker and control plane a line of its own to the broker, which can be cut."""
    proxies = {}
    for name, pid in pids(cluster.folder).items():
        if name.startswith("broker"):
            continue
        path = SupervisorFiles(cluster.folder).config(name)
        config = json.loads(path.read_bytes())
        login = config.get("identity", config)["login"]  # a control plane makes its own identity
        proxy = await closing.enter_async_context(Proxy(login["urls"][0]).serve())
        login["urls"] = [proxy.url]
        path.write_text(json.dumps(config))
        proxies[name] = proxy
        os.kill(pid, 9)  # it comes back and dials where the file says
    return proxies


async def cut_at_random(client: Client, proxies: dict[str, Proxy], seconds: float) -> None:
    """In turns: one worker alone for long, in the middle of an effect, and all units now and again."""
    dice = random.Random(SEED)
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                async with client.witness() as unit:
                    await proxies[unit].unplug(dice.uniform(*LONG_S))
                storm = (proxy.mischief(random.Random(dice.random()), **SHORT) for proxy in proxies.values())
                with suppress(TimeoutError):
                    async with asyncio.timeout(STORM_S):
                        await asyncio.gather(*storm)


async def test_however_the_connection_is_cut_every_job_ends_once_and_no_effect_happens_twice(
    make: Make, closing: AsyncExitStack, outside: Outside
) -> None:
    print(f"seed {SEED}")
    cluster, client = await start(make, closing, outside)
    proxies = await put_behind_proxies(cluster, closing)
    await asyncio.to_thread(cluster.all_ready)
    share = int(CUTS_S) // 10
    least = {"jobs": 5 * share, "operations": 50 * share, "effects": 10 * share, "cuts": 4 * share}
    least |= {"recovered": 1, "fenced": 1}
    for _ in range(ROUNDS_MAX):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(client.run(CUTS_S, EVERY_S))
            tasks.create_task(cut_at_random(client, proxies, CUTS_S))
        report = Report()
        for proxy in proxies.values():
            report.counts.update(proxy.counts)
        report.counts["cuts"] = report.counts.total()
        await assess(cluster, client, report, "cuts")
        if not report.few(**least):
            break
    report.assert_enough(**least)
