"""Workers and a reconciler in this process, each worker behind a line of its own to the broker.

A worker whose line is a hole is stopped as far as the others can tell; one whose line stays so is dead.
Clocks run faster than in a cluster: a silent member is gone, and a forgotten hint comes again, in seconds.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mvmci.engines import open_embedded
from mvmci.errors import NotFound
from mvmci.jobs.allow import Allow
from mvmci.jobs.journal import Journal
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.roles.reconciler import Reconciler
from mvmci.roles.worker import Worker
from mvmci.stores.nats import Cluster, dial_cluster, remove
from mvmci.stores.nats.streams import make_consumers
from tests.conftest import CLUSTER_BYTES
from tests.faults.chaos.judge import Job, judge
from tests.faults.chaos.outside import Outside, Steps
from tests.harness.broker import ensure
from tests.harness.proxy import Proxy
from tests.harness.waiting import LONG_S, until_true
from tests.harness.world import script_spec

QUEUE = "default"
GONE_S = 1.5
LAPSE_S = 2.0
LOOK_S = 0.02


@dataclass
class Hand:
    """A worker, and its line to the broker."""

    cluster: Cluster
    proxy: Proxy


@dataclass
class Crew:
    """A cluster on the run's broker, and who was let into it."""

    url: str
    name: str
    root: Path
    outside: Outside
    client: Cluster
    stack: AsyncExitStack
    jobs: list[Job]
    slip_s: float = 1.0  # how long what is not to happen is given to happen

    async def slip(self, happened: Callable[[], object | Awaitable[object]]) -> None:
        """Give it time to happen, where a rule that forbids it may be missing."""
        with suppress(TimeoutError):
            await until_true(happened, self.slip_s)

    async def worker(self, unit: str) -> Hand:
        """A worker at work."""
        proxy = await self.stack.enter_async_context(Proxy(self.url).serve())
        cluster = await self._join(unit, proxy.url)
        allow = Allow(http=(self.outside.allow,))
        engine = open_embedded(cluster.store, self.root, allow=lambda: allow, slots=1)
        self.stack.push_async_callback(engine.close)
        worker = Worker(cluster.store, engine, queues=(QUEUE,), slots=1)
        await self._at_work(worker.run(), unit)
        self.stack.callback(proxy.heal)
        return Hand(cluster, proxy)

    async def reconciler(self) -> None:
        """A reconciler at work, whose line is good."""
        cluster = await self._join("control-plane", self.url)
        await self._at_work(Reconciler(cluster).run(), "reconciler")

    async def submit(self, job: str, steps: Steps) -> None:
        await submit(self.client.store, await script_spec(self.client.store, job, steps))
        self.jobs.append(Job(job, steps))

    async def until(self, job: str, condition: Callable[[Journal], bool]) -> None:
        """Wait until the journal of `job` is as `condition` wants it."""
        async with asyncio.timeout(LONG_S):
            while True:
                with suppress(NotFound):
                    if condition(await load(self.client.store, job)):
                        return
                await asyncio.sleep(LOOK_S)

    async def judge(self, within_s: float = LONG_S) -> list[str]:
        """The faults of all jobs that were submitted."""
        return await judge(self.client.store, self.jobs, self.outside, within_s)

    async def _join(self, unit: str, url: str) -> Cluster:
        cluster = await dial_cluster(url, self.name, unit, gone_s=GONE_S, hint_lapse_s=LAPSE_S)
        self.stack.push_async_callback(cluster.close)
        return cluster

    async def _at_work(self, work: object, name: str) -> None:
        task = asyncio.create_task(work, name=name)  # type: ignore[arg-type]

        async def stop() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.stack.push_async_callback(stop)


@asynccontextmanager
async def crew(url: str, root: Path) -> AsyncIterator[Crew]:
    """An empty cluster on the broker at `url`; engines keep slots and code in `root`."""
    name = f"t-{secrets.token_hex(4)}"
    await ensure(url, name, store_bytes=CLUSTER_BYTES)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(remove, url, name)
        outside = await stack.enter_async_context(Outside().serve())
        client = await dial_cluster(url, name, "client", announce=False)
        stack.push_async_callback(client.close)
        await make_consumers(client.link, client.layout, QUEUE, LAPSE_S)
        yield Crew(url, name, root, outside, client, stack, [])
