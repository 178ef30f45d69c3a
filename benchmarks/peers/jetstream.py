"""What lies below mvmci: the same broker, synced messages of 300 bytes, and nothing around them.

A job of mvmci is two messages at least. `noop` is a message published by itself, 64 in flight.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from pathlib import Path

import nats
from nats.js.api import StreamConfig

from tests.harness.broker import Broker

IN_FLIGHT = 64
PAYLOAD = b"x" * 300


class Peer:
    async def start(self, folder: Path) -> None:
        self.broker = Broker(folder)
        await self.broker.start()
        self.client = await nats.connect(self.broker.url)
        self.stream = self.client.jetstream()
        await self.stream.add_stream(StreamConfig(name="FLOOR", subjects=["floor.*"], allow_atomic=True))
        self.numbers = itertools.count()

    async def noop(self, count: int) -> float:
        left = iter(range(count))

        async def publish() -> None:
            for _ in left:
                await self.stream.publish(f"floor.{next(self.numbers)}", PAYLOAD)

        began = time.perf_counter()
        await asyncio.gather(*(publish() for _ in range(IN_FLIGHT)))
        return time.perf_counter() - began

    async def step(self, count: int) -> None:
        return None

    async def alone(self, count: int) -> list[float]:
        return [await self.noop(1) * 1000 for _ in range(count)]

    def processes(self) -> dict[str, list[int]]:
        assert self.broker.process is not None
        return {"client": [os.getpid()], "broker": [self.broker.process.pid]}

    def durability(self) -> str:
        config = (self.broker.folder / "nats.conf").read_text()
        (line,) = [line.strip() for line in config.splitlines() if "sync_interval" in line]
        return line

    async def stop(self) -> None:
        if hasattr(self, "client"):
            await self.client.close()
        await self.broker.stop()
