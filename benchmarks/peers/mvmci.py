"""mvmci: a cluster of the zipapp, and a program that is its client.

A run is a workflow of a few WebAssembly instructions in a sandboxed process. A step is an effect: its
intent is on disk before it begins, which no other peer does, and its result before the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks import program


class Peer:
    def __init__(self, cluster: Callable[[Path], program.Cluster] = program.Cluster) -> None:
        self._make = cluster

    async def start(self, folder: Path) -> None:
        self.cluster = self._make(folder)
        self.step_module = program.step(folder)
        self._stack = AsyncExitStack()
        self._stack.callback(self.cluster.down)
        self.cluster.up()
        self.client = await self._stack.enter_async_context(self.cluster.client())
        await self.client.alone(program.tiny(), 1)
        await self.client.alone(self.step_module, 1, "1")

    async def noop(self, count: int) -> float:
        return await self.client.bulk(program.tiny(), count)

    async def step(self, count: int) -> float:
        return await self.client.bulk(self.step_module, count, "1")

    async def alone(self, count: int) -> list[float]:
        await self.client.succeeded()
        return await self.client.alone(program.tiny(), count)

    def processes(self) -> dict[str, list[int]]:
        return {"client": [os.getpid()], **self.cluster.processes()}

    def durability(self) -> str:
        config = (self.cluster.state / program.NAME / "broker" / "nats.conf").read_text()
        (line,) = [line.strip() for line in config.splitlines() if "sync_interval" in line]
        return line

    async def stop(self) -> None:
        await self._stack.aclose()
