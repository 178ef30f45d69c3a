"""Temporal: its dev server with SQLite on disk, and a worker and a client in this process.

The dev server is not what one runs in production; it is what one can run on one machine without Docker. Its
SQLite writes ahead and syncs every commit, which is twice as fast as its own settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sqlite3
import sys
import time
from datetime import timedelta
from pathlib import Path

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from benchmarks.processes import answers, free_ports, start, stop, until

IN_FLIGHT = 64
QUEUE = "bench"


@activity.defn
async def one() -> int:
    return 1


@workflow.defn
class Noop:
    @workflow.run
    async def run(self) -> int:
        return 1


@workflow.defn
class Step:
    @workflow.run
    async def run(self) -> int:
        return await workflow.execute_activity(one, start_to_close_timeout=timedelta(minutes=1))


class Peer:
    async def start(self, folder: Path) -> None:
        self.file = folder / "temporal.db"
        port, http_port, metrics_port = free_ports(3)  # its own choice may meet one that is in use
        program = Path(sys.executable).parent / "temporal"
        command = [program, "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", str(port)]
        options = [
            "--http-port",
            http_port,
            "--metrics-port",
            metrics_port,
            "--db-filename",
            self.file,
            "--log-level",
            "error",
            "--sqlite-pragma",
            "journal_mode=wal",
            "--sqlite-pragma",
            "synchronous=full",
        ]
        self.server = start([*command, *options], folder / "log")
        until(lambda: answers(port), "Temporal", alive=self.server)
        self.client = await Client.connect(f"127.0.0.1:{port}")
        self.worker = Worker(
            self.client,
            task_queue=QUEUE,
            workflows=[Noop, Step],
            activities=[one],
            workflow_runner=UnsandboxedWorkflowRunner(),  # the quicker one
        )
        self.working = asyncio.create_task(self.worker.run())
        self.numbers = itertools.count()
        self.run = f"{time.time():.0f}"

    async def noop(self, count: int) -> float:
        return await self._run(Noop, count)

    async def step(self, count: int) -> float:
        return await self._run(Step, count)

    async def _run(self, kind: type[Noop] | type[Step], count: int) -> float:
        left = iter(range(count))

        async def execute() -> None:
            for _ in left:
                name = f"b-{self.run}-{next(self.numbers)}"
                assert await self.client.execute_workflow(kind.run, id=name, task_queue=QUEUE) == 1

        began = time.perf_counter()
        await asyncio.gather(*(execute() for _ in range(min(count, IN_FLIGHT))))
        return time.perf_counter() - began

    async def alone(self, count: int) -> list[float]:
        return [await self.noop(1) * 1000 for _ in range(count)]

    def processes(self) -> dict[str, list[int]]:
        return {"client": [os.getpid()], "server": [self.server.pid]}

    def durability(self) -> str:
        with contextlib.closing(sqlite3.connect(self.file)) as database:
            (mode,) = database.execute("PRAGMA journal_mode").fetchone()
            return f"SQLite, journal_mode {mode}, synchronous full"

    async def stop(self) -> None:
        if hasattr(self, "working"):
            self.working.cancel()
            await asyncio.wait({self.working}, timeout=5)
        if hasattr(self, "server"):
            stop(self.server)
