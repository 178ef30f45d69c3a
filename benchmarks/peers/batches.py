"""What lies below mvmci, by the batch: atomic batches of 64 messages, two of them in flight."""

from __future__ import annotations

import asyncio
import json
import secrets
import time

from benchmarks.peers import jetstream

BATCH = 64
IN_FLIGHT = 2


class Peer(jetstream.Peer):
    async def noop(self, count: int) -> float:
        left = iter(range(0, count, BATCH))

        async def commit() -> None:
            for start in left:
                await self.batch(min(BATCH, count - start))

        began = time.perf_counter()
        await asyncio.gather(*(commit() for _ in range(IN_FLIGHT)))
        return time.perf_counter() - began

    async def alone(self, count: int) -> list[float]:
        return []

    async def batch(self, size: int) -> None:
        name = secrets.token_hex(8)
        for place in range(1, size):
            headers = {"Nats-Batch-Id": name, "Nats-Batch-Sequence": str(place)}
            await self.client.publish(f"floor.{next(self.numbers)}", jetstream.PAYLOAD, headers=headers)
        headers = {"Nats-Batch-Id": name, "Nats-Batch-Sequence": str(size), "Nats-Batch-Commit": "1"}
        answer = await self.client.request(
            f"floor.{next(self.numbers)}", jetstream.PAYLOAD, timeout=30, headers=headers
        )
        assert json.loads(answer.data).get("count", 1) == size, answer.data
