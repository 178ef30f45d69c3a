"""A cluster on the run's broker, with workers and a reconciler in the test's own process."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mvmci.engine import Engine
from mvmci.engines import open_embedded, open_remote
from mvmci.engines.server import Executor, serve_requests
from mvmci.jobs.allow import Allow
from mvmci.roles.worker import Worker
from mvmci.store import About
from mvmci.stores.nats import Cluster, dial_cluster, remove
from tests.conftest import CLUSTER_BYTES
from tests.harness.broker import ensure

ALLOW = Allow(http=("http://127.0.0.1:*/*",))


@dataclass
class Place:
    """One cluster, and who was let into it."""

    url: str
    name: str
    root: Path
    closing: list[Callable[[], Awaitable[Any]]] = field(default_factory=list)

    async def join(self, unit: str, **options: Any) -> Cluster:
        cluster = await dial_cluster(self.url, self.name, unit, **options)
        self.closing.append(cluster.close)
        return cluster

    async def worker(self, unit: str, *, slots: int = 2, **options: Any) -> Worker:
        """A worker at work."""
        cluster = await self.join(unit, **options)
        return self._at_work(
            cluster, open_embedded(cluster.store, self.root, allow=lambda: ALLOW, slots=slots), slots
        )

    def _at_work(self, cluster: Cluster, engine: Engine, slots: int) -> Worker:
        worker = Worker(cluster.store, engine, queues=("default", "other"), slots=slots)
        running = asyncio.create_task(worker.run())

        async def stop() -> None:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await worker.engine.close()

        self.closing.append(stop)
        return worker

    async def executor(self, unit: str, *, slots: int = 2, **options: Any) -> Executor:
        """An executor that takes orders from the broker."""
        cluster = await self.join(unit, **options)
        engine = open_embedded(cluster.store, self.root, allow=lambda: ALLOW, slots=slots)
        await cluster.store.presence.describe(About(role="executor", slots=slots))
        executor = Executor(engine, cluster.store, slots=slots)
        serving = asyncio.create_task(serve_requests(executor, cluster.link, cluster.layout))

        async def stop() -> None:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await engine.close()

        self.closing.append(stop)
        return executor

    async def remote_worker(self, unit: str, *, where: str = "broker", slots: int = 2) -> Worker:
        """A worker at work whose engine is an executor."""
        cluster = await self.join(unit)
        return self._at_work(cluster, await open_remote(cluster, where), slots)

    async def close(self) -> None:
        for close in reversed(self.closing):
            await close()


@pytest.fixture
async def place(broker_url: str, host_root: Path) -> AsyncIterator[Place]:
    name = f"t-{secrets.token_hex(4)}"
    await ensure(broker_url, name, store_bytes=CLUSTER_BYTES, queues=("default", "other"))
    found = Place(broker_url, name, host_root)
    yield found
    await found.close()
    await remove(broker_url, name)


@pytest.fixture
async def client(place: Place) -> Cluster:
    return await place.join("client", announce=False)
