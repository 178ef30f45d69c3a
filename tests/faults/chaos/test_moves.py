"""A live cluster is moved from every access to every other while jobs run: nothing shows it but the plan."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager

import pytest

from mvmci.cluster.deployment import EMBEDDED
from mvmci.jobs.journal import Journal
from mvmci.journals.reader import load
from mvmci.runtime import GRACE_S
from mvmci.store import Store
from tests.faults.chaos.conftest import Make, join
from tests.faults.chaos.judge import Job, judge
from tests.faults.chaos.load import Client, Report
from tests.faults.chaos.outside import Outside, path_of
from tests.harness.cluster import BUSY, Cluster
from tests.harness.places import need
from tests.harness.waiting import until_true

# Each pair of two comes once: twelve moves.
CIRCUIT = (
    "per-worker", "peer", "per-worker", "pool", "per-worker", "shared", "peer",
    "pool behind haproxy", "peer", "shared", "pool behind haproxy", "shared", "per-worker",
)  # fmt: skip
ACCESSES = {
    "per-worker": "access: per-worker",
    "peer": "access: peer\nexecutors: {slots: 6}",
    "pool": "access: pool\nexecutors: {count: 2, slots: 3}",
    "pool behind haproxy": "access: pool\nexecutors: {count: 2, slots: 3, balancer: haproxy}",
    "shared": "access: shared\nexecutors: {slots: 6}",
}
EXECUTORS = {"per-worker": 0, "pool": 2, "pool behind haproxy": 2}  # one, where nothing is said
TOPOLOGY = """
cluster: demo
{access}
workers: {{count: 2, slots: 3}}
allow: {{http: ["{allow}"]}}
"""
LOAD_S, EVERY_S = 2.0, 0.15  # of submits while a move is on
END_S = 90.0
BY_HAND = "by-hand"


def write(cluster: Cluster, outside: Outside, access: str) -> None:
    cluster.write(TOPOLOGY.format(access=ACCESSES[access], allow=outside.allow))


@contextmanager
def worker_by_hand(cluster: Cluster) -> Iterator[None]:
    """A worker that joined with the ticket, and that `up` does not know."""
    worker = cluster.mvmci.start("worker", "--join", f"@{cluster.folder / 'ticket'}", "--name", BY_HAND)
    try:
        worker.hears("has joined", "err")
        yield
    finally:
        if worker.alive:
            worker.process.terminate()
        worker.end()


async def engines(store: Store) -> set[str]:
    """What workers use now, and `drains` while one does; nothing while not all of them are seen."""
    workers = [one.about for one in await store.presence.members() if one.about.role == "worker"]
    if len(workers) != 3:
        return set()
    return {about.engine if about.state == "ready" else "drains" for about in workers}


async def until_all_use(store: Store, cluster: Cluster, access: str) -> None:
    """Also those of which `up` knows nothing follow."""
    kinds = {"per-worker": EMBEDDED, "peer": "broker", "pool": "broker"}
    async with asyncio.timeout(END_S):
        while True:
            found = await engines(store)
            if len(found) == 1 and "drains" not in found:
                break
            await asyncio.sleep(0.05)
    (engine,) = found
    assert engine == kinds.get(access, engine)
    assert engine.startswith("http://127.0.0.1:") == (access not in kinds)


async def until_executors(cluster: Cluster, count: int) -> None:
    """One whose farewell was lost is seen for a while."""

    def are_there() -> bool:
        return [unit["role"] for unit in cluster.ps()["units"]].count("executor") == count

    await until_true(are_there)


def assert_in_order(said: Sequence[str]) -> None:
    """What workers go to was ready before the first of them drained; what they left went after the last."""

    def places(role: str, state: str) -> list[int]:
        return [at for at, line in enumerate(said) if line.startswith(role) and line.endswith(f" is {state}")]

    gone = [at for at, line in enumerate(said) if line.endswith(" is gone")]
    left = {said[at].split()[0] for at in gone}
    serving = {line.split()[0] for line in said if line.startswith(("executor-", "balancer-"))} - left
    drained = places("worker-", "draining")
    come = {unit for unit in serving if drained and any(at < drained[0] for at in places(unit, "starting"))}
    for unit in come:
        assert places(f"{unit} ", "ready")[0] < drained[0], f"workers were sent away before {unit} was there"
    switched = places("worker-", "ready")[-1]
    assert all(at > switched for at in gone), "an engine went before its workers had left"


async def move(cluster: Cluster, client: Client, access: str) -> float:
    """`up` to another access, while jobs are submitted and run; how long it took, in s."""
    write(cluster, client.outside, access)

    async def up() -> float:
        await asyncio.sleep(LOAD_S / 4)
        began = time.monotonic()
        done = await asyncio.to_thread(cluster.up)
        assert "engine becomes" in done.text
        assert_in_order(done.text.splitlines())
        return time.monotonic() - began

    async with asyncio.TaskGroup() as tasks:
        moving = tasks.create_task(up())
        tasks.create_task(client.run(LOAD_S, EVERY_S))
    await until_executors(cluster, EXECUTORS.get(access, 1))
    roles = [unit["role"] for unit in cluster.ps()["units"]]
    assert roles.count("balancer") == access.endswith("haproxy")
    await until_all_use(client.store, cluster, access)
    return moving.result()


def waited_s(journal: Journal) -> float:
    """From the submit to the lease."""
    assert journal.state.spec is not None
    return ((journal.state.started_at or 0) - journal.state.spec.at) / 1000


async def assess(cluster: Cluster, client: Client, name: str) -> Report:
    """All jobs succeed, every effect happened exactly once, and nobody waited longer than a drain."""
    jobs = [Job(job.id, job.steps) for job in client.accepted]
    faults = await judge(client.store, jobs, client.outside, END_S)
    report = Report()
    await report.of_jobs(client.store, jobs)
    report.of_logs(cluster.folder)
    report.counts["effects"] = client.outside.total
    journals = [await load(client.store, job.id) for job in jobs]
    longest = max(waited_s(journal) for journal in journals)
    report.counts["longest wait, ms"] = int(longest * 1000)
    report.counts["executors"] = len({lease.unit for one in journals if (lease := one.state.lease)})
    report.print(name)
    assert faults == []
    assert client.unknown == []
    assert longest < GRACE_S
    return report


def asked(jobs: Sequence[Job], outside: Outside) -> list[int]:
    """How often each effect was asked for outside."""
    steps = itertools.chain.from_iterable(job.steps or () for job in jobs)
    return [len(outside.asked[path_of(step)]) for step in steps if "http" in step]


@pytest.fixture
def haproxy() -> None:
    need(shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin"), "no haproxy: apt-get install it")


def test_the_circuit_has_every_move_once() -> None:
    accesses = [access.partition(" ")[0] for access in CIRCUIT]
    moves = set(itertools.pairwise(accesses))
    assert len(moves) == len(CIRCUIT) - 1 == 12
    assert all(was != becomes for was, becomes in moves)


async def test_a_cluster_under_load_moves_from_every_access_to_every_other_and_nothing_is_lost(
    haproxy: None, make: Make, closing: AsyncExitStack
) -> None:
    outside = await closing.enter_async_context(Outside(slow_s=0.2, seed=1).serve())
    cluster = make(TOPOLOGY.format(access=ACCESSES[CIRCUIT[0]], allow=outside.allow))
    await asyncio.to_thread(cluster.up)
    client = Client((await join(cluster, closing)).store, outside, random.Random(1))
    await client.prepare("script", "sleeper", "hello")
    closing.enter_context(worker_by_hand(cluster))
    took = {}
    for was, becomes in itertools.pairwise(CIRCUIT):
        took[f"{was} -> {becomes}"] = await move(cluster, client, becomes)
    print("\n".join(f"{name}: {seconds:.1f} s" for name, seconds in took.items()))
    report = await assess(cluster, client, "twelve moves")
    assert set(asked(client.accepted, outside)) == {1}
    assert report.counts["recovered"] == 0, "a move costs nobody an attempt"
    report.assert_enough(jobs=100, effects=200, resumed=5, executors=4)


# Where `up` is killed: what it said last, on the way to an access.
INTERRUPTED = {
    "pool behind haproxy": ("+ start executor-1", "executor-1 is starting", "worker-1 is draining"),
    "peer": ("worker-1 is draining", "executor-1 is draining"),
    "shared": ("executor-1 is draining", "worker-1 is draining"),
    "per-worker": ("worker-1 is draining", "executor-1 is draining"),
}


def up_until(cluster: Cluster, said: str) -> bool:
    """Begin an `up`, and kill it when it has said so; whether it got as far."""
    running = cluster.mvmci.start("up", cluster.file, "--detach", *BUSY)
    while running.alive and said.encode() not in running.said():
        time.sleep(0.005)
    if running.alive:
        running.kill()
        return True
    assert running.end().code == 0
    return False


async def test_an_up_that_is_killed_anywhere_in_a_move_goes_on_when_it_is_repeated(
    haproxy: None, make: Make, closing: AsyncExitStack
) -> None:
    outside = await closing.enter_async_context(Outside(slow_s=0.2, seed=2).serve())
    cluster = make(TOPOLOGY.format(access=ACCESSES["per-worker"], allow=outside.allow))
    await asyncio.to_thread(cluster.up)
    client = Client((await join(cluster, closing)).store, outside, random.Random(2))
    await client.prepare("script", "sleeper", "hello")
    closing.enter_context(worker_by_hand(cluster))
    killed = 0
    for access, sayings in INTERRUPTED.items():
        write(cluster, outside, access)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(client.run(LOAD_S, EVERY_S, sleepers=False))
            for said in sayings:
                killed += await asyncio.to_thread(up_until, cluster, said)
            await asyncio.to_thread(cluster.up)
        assert cluster.up().text.startswith("nothing to change")
        await until_all_use(client.store, cluster, access)
    assert killed >= len(INTERRUPTED), "it was never killed in the middle"
    await assess(cluster, client, "interrupted moves")
    assert set(asked(client.accepted, outside)) == {1}


async def test_a_pool_grows_and_shrinks_and_loses_its_balancer_while_jobs_run(
    haproxy: None, make: Make, closing: AsyncExitStack
) -> None:
    outside = await closing.enter_async_context(Outside(slow_s=0.2, seed=3).serve())
    cluster = make(TOPOLOGY.format(access=ACCESSES["pool"], allow=outside.allow))
    await asyncio.to_thread(cluster.up)
    client = Client((await join(cluster, closing)).store, outside, random.Random(3))
    await client.prepare("script", "sleeper", "hello")
    for access in ("pool", "pool behind haproxy"):
        for count in (2, 3, 1):
            text = TOPOLOGY.format(access=ACCESSES[access], allow=outside.allow)
            cluster.write(text.replace("count: 2, slots: 3", f"count: {count}, slots: 3"))
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(client.run(LOAD_S, EVERY_S, sleepers=False))
                await asyncio.sleep(LOAD_S / 4)
                await asyncio.to_thread(cluster.up)
            await until_executors(cluster, count)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(client.run(LOAD_S, EVERY_S, sleepers=False))
        await asyncio.sleep(LOAD_S / 2)
        pid = cluster.pids()["balancer-1"]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    cluster.all_ready()
    report = await assess(cluster, client, "a pool that changes")
    assert set(asked(client.accepted, outside)) == {1}
    assert report.counts["recovered"] == 0, "nobody pays for it with an attempt"
