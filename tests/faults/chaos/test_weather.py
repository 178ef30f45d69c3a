"""What goes wrong around a cluster: clocks jump, a broker is away, hints are gone, a store is full."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from mvmci.errors import StoreUnavailable
from mvmci.jobs.journal import Released
from mvmci.journals.reader import load
from mvmci.store import Store
from tests.faults.chaos.conftest import Make, join
from tests.faults.chaos.judge import Job, judge
from tests.faults.chaos.load import Client, Report
from tests.faults.chaos.outside import Outside, again, once
from tests.faults.chaos.units import pids, signal_all
from tests.harness.cluster import BUSY, Cluster
from tests.harness.places import GUESTS, need
from tests.harness.program import Running, assert_sentence
from tests.harness.waiting import LONG_S, until_journal, until_true

EVERY_S = 0.4
AWAY_S = 20.0
DELETIONS, DELETED_S = 3, 3.0
HOUR = "+3600"
BIG = 700  # jobs of 60 kB, of which the journals of the smallest store take some 400
TOPOLOGY = """
cluster: demo
workers: {{count: {count}, slots: 2}}
allow: {{http: ["{allow}"]}}
"""
SMALL = """
cluster: demo
broker: {store: 64MiB}
workers: {count: 2, slots: 2}
"""


@pytest.fixture
async def outside(closing: AsyncExitStack) -> Outside:
    return await closing.enter_async_context(Outside(slow_s=0.2, seed=1).serve())


async def client_of(cluster: Cluster, closing: AsyncExitStack, outside: Outside) -> Client:
    joined = await join(cluster, closing)
    client = Client(joined.store, outside, random.Random(1))
    await client.prepare("script", "sleeper", "hello")
    return client


# ---- clocks


@asynccontextmanager
async def joined_by_hand(cluster: Cluster, *names: str) -> AsyncIterator[list[Running]]:
    """Workers that somebody started in a terminal."""
    running = []
    try:
        for name in names:
            ticket = cluster.folder.parent / f"ticket-{name}"
            done = await asyncio.to_thread(cluster.mvmci, "ticket", "create", "--output", ticket)
            assert done.code == 0, done
            running.append(cluster.mvmci.start("worker", "--join", f"@{ticket}", "--name", name))
            await asyncio.to_thread(running[-1].hears, "has joined", "err")
        yield running
    finally:
        for one in running:
            one.signal(signal.SIGTERM)
        for one in running:
            await asyncio.to_thread(one.end)


def faketime() -> Path:
    found = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    need(found, "libfaketime is not there")
    assert found is not None
    return found


async def test_clocks_that_jump_an_hour_end_no_job_too_early_too_late_or_twice(
    make: Make, closing: AsyncExitStack, outside: Outside, tmp_path: Path
) -> None:
    """Those of the control plane and of one worker; two workers, the broker and the client keep time."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    reports = tmp_path / "reports"
    reports.mkdir()
    fake = {
        "TMPDIR": str(reports),
        "LD_PRELOAD": str(faketime()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
    }
    cluster = make(TOPOLOGY.format(allow=outside.allow, count=1))
    done = await asyncio.to_thread(cluster.mvmci, "up", cluster.file, "--detach", *BUSY, **fake)
    assert done.code == 0, done
    await closing.enter_async_context(joined_by_hand(cluster, "honest-1", "honest-2"))
    client = await client_of(cluster, closing, outside)
    for jump in (HOUR, "+0"):
        sleepers = [client.fresh("s") for _ in range(4)]
        for job in sleepers:
            steps = [once(outside, job, 0), {"sleep": 12_000}, again(outside, job, 1)]
            await client.workflow(steps, job)
        for job in sleepers:
            await until_journal(client.store, job, lambda journal: journal.state.released)
        clock.write_text(jump)
        await client.run(4.0, EVERY_S)
        assert await judge(client.store, client.accepted, outside, 40.0) == []
        for job in sleepers:
            journal = await load(client.store, job)
            (asleep,) = [one for one in journal.records if isinstance(one, Released)]
            assert asleep.until
    report = Report()
    await report.of_jobs(client.store, client.accepted)
    report.print("clocks")
    assert report.counts["recovered"] == 0
    # A thread that sleeps by the monotonic clock, as Python's do, gets EINVAL from a libfaketime that is to
    # leave that clock alone. Whoever waits for a lock crashes of it, and of nothing else.
    for crash in reports.glob("mvmci-bug-*.txt"):
        assert crash.read_text().endswith("OSError: [Errno 22] Invalid argument\n"), crash.read_text()


# ---- the broker


async def answers(store: Store) -> bool:
    with suppress(StoreUnavailable):
        await store.journals.read("nobody")
        return True
    return False


async def test_a_broker_away_for_twenty_seconds_and_hints_deleted_again_and_again_lose_nothing(
    make: Make, closing: AsyncExitStack, outside: Outside
) -> None:
    """What was submitted meanwhile is accepted when it is back. Then every hint and timer is thrown away."""
    cluster = make(TOPOLOGY.format(allow=outside.allow, count=3))
    await asyncio.to_thread(cluster.up)
    client = await client_of(cluster, closing, outside)
    supervisor = json.loads((cluster.folder / "supervisor.json").read_text())["pid"]
    loading = asyncio.create_task(client.run(AWAY_S + 10, EVERY_S))
    await asyncio.sleep(3)
    signal_all([supervisor], signal.SIGSTOP)  # it would start another at once
    try:
        signal_all([pids(cluster.folder)["broker-1"]], signal.SIGKILL)
        async with asyncio.timeout(AWAY_S):
            done = await asyncio.to_thread(cluster.mvmci, "submit", GUESTS / "hello.wasm")
            assert_sentence(done, 6, "no broker answers")
            await asyncio.sleep(AWAY_S)
    except TimeoutError:
        pass
    finally:
        signal_all([supervisor], signal.SIGCONT)
    await until_true(lambda: answers(client.store))  # a link that is made anew is tried for 5 s only
    admin = await join(cluster, closing, admin=True)
    for _ in range(DELETIONS):
        await admin.link.api(f"STREAM.DELETE.{admin.layout.hints}")
        await asyncio.sleep(DELETED_S)
    await loading
    await client.settle()
    assert await judge(client.store, client.accepted, outside, LONG_S) == []
    report = Report()
    await report.of_jobs(client.store, client.accepted)
    report.of_logs(cluster.folder)
    report.print("broker away, hints deleted")
    report.assert_enough(jobs=20, operations=100, resumed=5, **{"said again": 5})


async def test_a_full_store_refuses_submits_in_a_sentence_ends_what_it_took_and_recovers(
    make: Make, closing: AsyncExitStack, tmp_path: Path
) -> None:
    cluster = make(SMALL)
    await asyncio.to_thread(cluster.up)
    store = (await join(cluster, closing)).store
    batch = tmp_path / "batch.jsonl"
    big = {"module": str(GUESTS / "sleeper.wasm"), "args": ["1", "1", "x" * 60_000]}
    batch.write_text("".join(json.dumps({**big, "id": f"big-{n}"}) + "\n" for n in range(BIG)))
    done = await asyncio.to_thread(cluster.mvmci, "submit", "--batch", batch)
    assert done.code == 6, done
    accepted = [Job(job) for job in done.text.split()]
    assert f"{BIG - len(accepted)} of {BIG} were not submitted" in done.err
    one = await asyncio.to_thread(
        cluster.mvmci, "submit", GUESTS / "sleeper.wasm", "--", "1", "1", "x" * 60_000
    )
    assert_sentence(one, 6, "room")
    assert await judge(store, accepted, Outside(), LONG_S) == []

    cluster.write(SMALL + "retain: {jobs: 1s}\n")
    done = await asyncio.to_thread(cluster.mvmci, "up", cluster.file, "--detach")
    assert done.code in (0, 4), done  # 4: there was no room yet for the job that `up` tries it with
    async with asyncio.timeout(LONG_S):
        while (await asyncio.to_thread(cluster.mvmci, "submit", GUESTS / "hello.wasm")).code:
            pass
    await asyncio.to_thread(cluster.up)
