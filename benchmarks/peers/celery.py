"""Celery on Redis: two worker processes. For scale only: when it dies, what it was running is lost.

python -m celery -A benchmarks.peers.celery worker      the workers; BENCH_REDIS is where Redis answers
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import redis
from celery import Celery

from benchmarks.processes import answers, free_port, start, stop, until

PROCESSES = 2
URL = os.environ.get("BENCH_REDIS", "")

app = Celery("bench", broker=URL, backend=URL)


@app.task
def noop() -> int:
    return 1


class Peer:
    async def start(self, folder: Path) -> None:
        data, port = folder / "data", free_port()
        data.mkdir(exist_ok=True)
        url = f"redis://127.0.0.1:{port}/0"
        settings = ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--dir", str(data)]
        self.redis = start(
            ["redis-server", "--port", str(port), "--bind", "127.0.0.1", *settings], folder / "log"
        )
        until(lambda: answers(port), "Redis", alive=self.redis)
        app.conf.update(broker_url=url, result_backend=url)
        options = [
            "--concurrency",
            str(PROCESSES),
            "--loglevel",
            "ERROR",
            "--without-gossip",
            "--without-mingle",
        ]
        self.workers = start(
            [sys.executable, "-m", "celery", "-A", __name__, "worker", *options],
            folder / "workers.log",
            BENCH_REDIS=url,
        )
        self.server = redis.Redis(port=port)
        await self.noop(1)

    async def noop(self, count: int) -> float:
        return await asyncio.to_thread(self._run, count)

    def _run(self, count: int) -> float:
        began = time.perf_counter()
        results = [noop.delay() for _ in range(count)]
        assert sum(result.get(timeout=120) for result in results) == count
        return time.perf_counter() - began

    async def step(self, count: int) -> None:
        return None

    async def alone(self, count: int) -> list[float]:
        return [await self.noop(1) * 1000 for _ in range(count)]

    def processes(self) -> dict[str, list[int]]:
        return {"client": [os.getpid()], "redis": [self.redis.pid], "workers": [self.workers.pid]}

    def durability(self) -> str:
        found = self.server.config_get("append*")
        version = self.server.info("server")["redis_version"]
        return f"Redis {version}, appendonly {found['appendonly']}, appendfsync {found['appendfsync']}"

    async def stop(self) -> None:
        for name in ("workers", "redis"):
            if hasattr(self, name):
                stop(getattr(self, name))
