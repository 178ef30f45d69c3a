"""Light jobs, workflows of many effects and one that computes for long: none waits for another's end."""

from __future__ import annotations

import asyncio
import random
import statistics
from contextlib import AsyncExitStack

from mvmci.jobs.journal import Journal
from mvmci.journals.client import cancel_job
from mvmci.journals.reader import load
from tests.faults.chaos.conftest import Make, join
from tests.faults.chaos.judge import judge
from tests.faults.chaos.load import Client
from tests.faults.chaos.outside import Outside, Steps, again, once
from tests.faults.chaos.test_stopped_worker import unit_of
from tests.harness.waiting import LONG_S, until_done, until_journal

LIGHT = 1_000
AT_ONCE = 128
SHARE = 1 / 5  # of light jobs and effects, that one of the five free slots should take
WORKFLOWS = 10
EFFECTS = 100
TURNS = "1000000"  # millions: it computes until it is cancelled
TOPOLOGY = """
cluster: demo
workers: {{count: 3, slots: 2}}
allow: {{http: ["{allow}"]}}
"""


def effects(outside: Outside, job: str) -> Steps:
    """At most once and idempotent, in turns."""
    return [(once, again)[number % 2](outside, job, number) for number in range(EFFECTS)]


def waited_s(journal: Journal) -> float:
    """From the submit to the lease."""
    assert journal.state.spec is not None
    return ((journal.state.started_at or 0) - journal.state.spec.at) / 1000


async def test_a_thousand_light_jobs_and_ten_long_workflows_do_not_wait_for_one_that_computes(
    make: Make, closing: AsyncExitStack
) -> None:
    outside = await closing.enter_async_context(Outside().serve())
    cluster = make(TOPOLOGY.format(allow=outside.allow))
    await asyncio.to_thread(cluster.up)
    client = Client((await join(cluster, closing)).store, outside, random.Random(1))
    await client.prepare("script", "hello", "burn")
    store = client.store

    await client.command("burn", TURNS, job="burner")
    client.accepted.clear()  # it is to end as the others do not
    await until_journal(store, "burner", lambda journal: journal.state.lease)
    turns = asyncio.Semaphore(AT_ONCE)

    async def light(job: str) -> None:
        async with turns:
            await client.command("hello", job=job)

    workflows = [client.fresh("w") for _ in range(WORKFLOWS)]
    lights = [client.fresh("l") for _ in range(LIGHT)]
    async with asyncio.TaskGroup() as tasks:
        for number, job in enumerate(lights):
            if number % (LIGHT // WORKFLOWS) == 0:
                flow = workflows[number // (LIGHT // WORKFLOWS)]
                tasks.create_task(client.workflow(effects(outside, flow), flow))
            tasks.create_task(light(job))
    assert await judge(store, client.accepted, outside, LONG_S) == []

    journals = {job.id: await load(store, job.id) for job in client.accepted}
    burner = await load(store, "burner")
    assert burner.state.done is None, "somebody may have waited for its end"
    assert await cancel_job(store, burner, "us")
    await until_done(store, "burner")
    waits = sorted(waited_s(journals[job]) for job in lights)
    works = dict.fromkeys(lights, 1) | dict.fromkeys(workflows, EFFECTS)
    beside = sum(work for job, work in works.items() if unit_of(journals[job]) == unit_of(burner))
    print(
        f"light jobs waited {statistics.median(waits):.2f} s in the median and {waits[-1]:.1f} s at most; "
        f"of {sum(works.values())} light jobs and effects {beside} were had beside the one that computes"
    )
    # Workflows may keep that slot for all of the time, while light jobs are had elsewhere.
    assert beside > sum(works.values()) * SHARE / 4, "the other slot of its worker hardly took any"
    assert outside.total == WORKFLOWS * EFFECTS
