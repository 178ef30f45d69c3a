"""Light jobs, workflows of many effects and one that computes for long: none waits for another's end."""

from __future__ import annotations

import asyncio
import random
import statistics
from contextlib import AsyncExitStack

from mvmci.jobs.journal import Journal
from mvmci.journals.reader import load
from tests.faults.chaos.conftest import Make, join
from tests.faults.chaos.judge import judge
from tests.faults.chaos.load import Client
from tests.faults.chaos.outside import Outside, Steps, again, once
from tests.faults.chaos.test_stopped_worker import unit_of
from tests.harness.waiting import LONG_S, until_journal

LIGHT = 1_000
AT_ONCE = 128
SHARE = 1 / 5  # that one of the five free slots should take
WORKFLOWS = 10
EFFECTS = 100
TURNS = "16000"  # millions: some 30 s of one processor
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


def ended_at(journal: Journal) -> int:
    assert journal.state.done is not None
    return journal.state.done.at


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
    burner = journals["burner"]
    began = burner.state.started_at or 0
    burned_s = (ended_at(burner) - began) / 1000
    waits = sorted(waited_s(journals[job]) for job in lights)
    last_light, last_workflow = (
        (max(ended_at(journals[job]) for job in jobs) - began) / 1000 for jobs in (lights, workflows)
    )
    beside = sum(unit_of(journals[job]) == unit_of(burner) for job in lights)
    print(
        f"burned for {burned_s:.1f} s; light jobs waited {statistics.median(waits):.2f} s in the median and "
        f"{waits[-1]:.1f} s at most, {beside} ran beside it; the last light job ended after "
        f"{last_light:.1f} s, the last workflow after {last_workflow:.1f} s"
    )
    assert burned_s > 10, "it was over too soon to be in anybody's way"
    assert beside > LIGHT * SHARE / 4, "the other slot of its worker hardly took any"
    assert last_light < burned_s
    assert last_workflow < burned_s
    assert outside.total == WORKFLOWS * EFFECTS
