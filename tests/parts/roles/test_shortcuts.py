"""What is done for many jobs at once survives the death of who does it.

A lease and an end in one message, many ends in one batch, hints fetched ahead, a slot that is free before
the end is on disk, a spec that was not read again, submits that travel together: each is cut short here
by kill -9 in the middle of it, and every job ends once.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mvmci.jobs.journal import Done, status
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.roles.reconciler import Reconciler
from mvmci.stores.nats import Cluster
from tests.harness.places import ROOT
from tests.harness.waiting import LONG_S, until_done
from tests.harness.world import Counting, script_spec
from tests.parts.roles.conftest import Place

JOBS = 200
KILLS = 4


async def start(place: Place, unit: str, *more: object) -> Process:
    """A worker that is at work."""
    command = ["-m", "tests.parts.roles.runner", place.url, place.name, unit, place.root, *map(str, more)]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, stdout=PIPE)

    async def end() -> None:
        if process.returncode is None:
            process.kill()
            await process.wait()

    place.closing.append(end)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


@asynccontextmanager
async def some_end(client: Cluster, count: int) -> AsyncIterator[None]:
    """Wait until that many ends have been written since the block began."""
    seen, enough = 0, asyncio.Event()

    def hear(_: object) -> None:
        nonlocal seen
        seen += 1
        if seen >= count:
            enough.set()

    unsubscribe = await client.link.subscribe(client.layout.ends(), hear)
    yield
    async with asyncio.timeout(LONG_S):
        await enough.wait()
    await unsubscribe()


async def test_workers_that_die_among_many_short_jobs_lose_none_and_end_none_twice(
    place: Place, client: Cluster
) -> None:
    reconciler = Reconciler(await place.join("control-plane", maintains=True, listens=True))
    running = asyncio.create_task(reconciler.run())
    jobs = [f"j{number}" for number in range(KILLS * JOBS)]
    specs = [await script_spec(client.store, job, []) for job in jobs]
    first = await script_spec(client.store, "compiles", [])
    worker = await start(place, "w0")
    await submit(client.store, first)
    await until_done(client.store, "compiles")
    for kill in range(KILLS):
        async with some_end(client, JOBS // 10):
            submitting = asyncio.gather(*(submit(client.store, spec) for spec in specs[kill::KILLS]))
        worker.send_signal(signal.SIGKILL)
        await asyncio.gather(worker.wait(), submitting)
        worker = await start(place, f"w{kill + 1}")
    journals = [await until_done(client.store, job) for job in jobs]
    worker.send_signal(signal.SIGKILL)
    await worker.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert {status(journal.state)[0] for journal in journals} == {"succeeded"}
    assert {sum(isinstance(one, Done) for one in journal.records) for journal in journals} == {1}
    # Such a job leaves no trace of its first holder: lease and end are one message. Its hint was lost.
    assert reconciler.counts.said > 0, "nobody died with a job in hand"


async def test_ends_that_waited_for_each_other_when_their_worker_died_come_again_and_once(
    place: Place, client: Cluster
) -> None:
    """Not one of them was on disk: all of these jobs run again, and nobody has seen that they ran."""
    reconciler = Reconciler(await place.join("control-plane", maintains=True, listens=True))
    running = asyncio.create_task(reconciler.run())
    specs = [await script_spec(client.store, f"j{number}", []) for number in range(JOBS)]
    worker = await start(place, "holding", JOBS // 4)
    assert worker.stdout is not None
    await asyncio.gather(*(submit(client.store, spec) for spec in specs))
    async with asyncio.timeout(LONG_S):
        assert await worker.stdout.readline() == b"held\n"
    worker.send_signal(signal.SIGKILL)
    await worker.wait()
    states = [(await load(client.store, spec.id)).state for spec in specs]
    untold = [spec.id for spec, state in zip(specs, states, strict=True) if not (state.lease or state.done)]
    assert len(untold) >= JOBS // 4
    await place.worker("w1")
    journals = {spec.id: await until_done(client.store, spec.id) for spec in specs}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert {status(journal.state)[0] for journal in journals.values()} == {"succeeded"}
    assert {journals[job].state.epoch for job in untold} == {1}


async def test_submits_that_were_cut_off_are_sent_again_and_exist_once(place: Place, client: Cluster) -> None:
    """The client dies with submits in flight; another sends all of them again."""
    jobs = [f"j{number}" for number in range(JOBS)]
    async with Counting().serve() as server:
        post = [{"http": {"url": f"{server.url}/once", "method": "POST"}}]
        specs = [await script_spec(client.store, job, post) for job in jobs[:20]]
        dying = await place.join("dying", announce=False)
        sending = [asyncio.create_task(submit(dying.store, spec)) for spec in specs]
        await asyncio.sleep(0)  # they are on their way, and no answer has come
        await dying.link.close()
        for one in sending:
            one.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        await place.worker("w1")
        await asyncio.gather(*(submit(client.store, spec) for spec in specs))
        for spec in specs:
            journal = await until_done(client.store, spec.id)
            assert status(journal.state)[0] == "succeeded"
            assert (await load(client.store, spec.id)).state.epoch == 1
        assert server.counts == {"POST /once": len(specs)}
