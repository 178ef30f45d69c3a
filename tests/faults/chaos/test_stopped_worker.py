"""A worker that is stopped for three times the detection time, and goes on: deposed, and soon back."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from contextlib import AsyncExitStack

from mvmci.jobs.journal import Journal, Lease, status
from mvmci.journals.reader import load
from mvmci.store import GONE_S
from tests.faults.chaos.conftest import Make, join
from tests.faults.chaos.judge import judge
from tests.faults.chaos.load import Client
from tests.faults.chaos.outside import Outside, again, once
from tests.faults.chaos.units import alive, pids, sandboxes, signal_all
from tests.harness.waiting import LONG_S, until_journal, until_true

STOPPED_S = 3 * GONE_S + 1
ELSEWHERE_S = 25.0  # five times what is promised
TOPOLOGY = """
cluster: demo
workers: {{count: 3, slots: 2}}
allow: {{http: ["{allow}"]}}
"""


def unit_of(journal: Journal) -> str:
    assert journal.state.lease is not None
    return journal.state.lease.unit


async def test_a_stopped_worker_writes_nothing_more_its_sandboxes_die_and_it_joins_again(
    make: Make, closing: AsyncExitStack
) -> None:
    outside = await closing.enter_async_context(Outside().serve())
    cluster = make(TOPOLOGY.format(allow=outside.allow))
    await asyncio.to_thread(cluster.up)
    store = (await join(cluster, closing)).store
    client = Client(store, outside, random.Random(1))
    await client.prepare("script", "sleeper")
    effect = outside.hold("/flow/once/1")
    await client.workflow(
        [once(outside, "flow", 0), once(outside, "flow", 1), again(outside, "flow", 2)], "flow"
    )
    await effect.arrived.wait()
    stopped = unit_of(await load(store, "flow"))
    others = {name for name in pids(cluster.folder) if name.startswith("worker")} - {stopped}
    for name in others:
        done = await asyncio.to_thread(cluster.mvmci, "drain", name)
        assert done.code == 0, done
    await client.command("sleeper", "300", "30", job="ticks")  # 9 s: it has to be met in its middle
    assert unit_of(await until_journal(store, "ticks", lambda journal: journal.state.lease)) == stopped

    worker = pids(cluster.folder)[stopped]
    await until_true(lambda: len(sandboxes(worker)) == 2)  # a lease may come before its guest is forked
    guests = sandboxes(worker)
    whole = [worker, *guests]
    signal_all(whole, signal.SIGSTOP)
    began = time.monotonic()
    try:
        for name in others:
            done = await asyncio.to_thread(cluster.mvmci, "drain", name, "--undo")
            assert done.code == 0, done
        journals = [
            await until_journal(store, job, lambda journal: journal.state.epoch == 2)
            for job in ("flow", "ticks")
        ]
        elsewhere_s = time.monotonic() - began
        assert {unit_of(journal) for journal in journals} <= others
        for job in ("flow", "ticks"):
            await until_journal(store, job, lambda journal: journal.state.done)
        await asyncio.sleep(max(0.0, began + STOPPED_S - time.monotonic()))
        effect.may_go.set()
    finally:
        signal_all(whole, signal.SIGCONT)

    await until_true(lambda: not any(map(alive, guests)))
    log = cluster.folder / "units" / stopped / "log"
    await until_true(lambda: log.read_text().count("another holder has taken over") >= 2)
    for job in ("flow", "ticks"):
        journal = await load(store, job)
        assert [one.why for one in journal.records if isinstance(one, Lease)] == ["first", "recovered"]
        assert status(journal.state)[0] == "succeeded"
    assert await judge(store, client.accepted, outside, LONG_S) == []
    assert {path: len(asked) for path, asked in outside.asked.items()} == {
        "/flow/once/0": 1,
        "/flow/once/1": 1,
        "/flow/again/2": 1,
    }

    for name in others:
        done = await asyncio.to_thread(cluster.mvmci, "drain", name)
        assert done.code == 0, done
    await client.command("sleeper", "1", "1", job="afterwards")
    assert unit_of(await until_journal(store, "afterwards", lambda journal: journal.state.done)) == stopped
    assert pids(cluster.folder)[stopped] == worker
    print(f"both jobs ran elsewhere after {elsewhere_s:.1f} s")
    assert elsewhere_s < ELSEWHERE_S
