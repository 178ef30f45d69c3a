"""DBOS on PostgreSQL: durable functions in this process, whose state the database keeps.

PostgreSQL is Debian's with its own settings, fsync and synchronous_commit on. Sixteen threads call the
workflow, which returns when it has ended. Here, 8 and 32 threads, `start_workflow` and coroutines were
slower, and two such processes as quick (a step: a sixth quicker).
"""

from __future__ import annotations

import asyncio
import glob
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
from dbos import DBOS

from benchmarks.peers import POSTGRES
from benchmarks.processes import free_port, start, stop, until

THREADS = 16
USER = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root


@DBOS.step()
def one() -> int:
    return 1


@DBOS.workflow()
def noop() -> int:
    return 1


@DBOS.workflow()
def step() -> int:
    return one()


class Peer:
    async def start(self, folder: Path) -> None:
        server = Path(glob.glob(POSTGRES)[-1])
        data, port = folder / "data", free_port()
        log = folder / "log"
        if not data.exists():
            data.mkdir(mode=0o700)
            if USER:
                shutil.chown(data, USER)
            made = start([server.parent / "initdb", "-D", data, "-U", "bench", "-A", "trust"], log, user=USER)
            assert made.wait() == 0, log
        settings = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories="]
        options = [part for setting in settings for part in ("-c", setting)]
        self.postgres = start([server, "-D", data, *options], log, user=USER)
        self.url = f"postgresql://bench@127.0.0.1:{port}/postgres"
        until(self._answers, "PostgreSQL", alive=self.postgres)
        DBOS(
            config={
                "name": "bench",
                "system_database_url": self.url.replace("postgresql:", "postgresql+psycopg:"),
                "log_level": "ERROR",
                "sys_db_pool_size": THREADS + 4,
            }
        )
        DBOS.launch()
        self.threads = ThreadPoolExecutor(THREADS)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url).close()
        except psycopg.OperationalError:
            return False
        return True

    async def noop(self, count: int) -> float:
        return await self._run(noop, count)

    async def step(self, count: int) -> float:
        return await self._run(step, count)

    async def _run(self, workflow: Callable[[], int], count: int) -> float:
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        runs = [loop.run_in_executor(self.threads, workflow) for _ in range(count)]
        assert sum(await asyncio.gather(*runs)) == count
        return time.perf_counter() - began

    async def alone(self, count: int) -> list[float]:
        def run() -> list[float]:
            times = []
            for _ in range(count):
                began = time.perf_counter()
                noop()
                times.append((time.perf_counter() - began) * 1000)
            return times

        return await asyncio.to_thread(run)

    def processes(self) -> dict[str, list[int]]:
        return {"client": [os.getpid()], "postgres": [self.postgres.pid]}

    def durability(self) -> str:
        with psycopg.connect(self.url) as connection:

            def shown(name: str) -> str:
                row = connection.execute(f"SHOW {name}").fetchone()
                assert row is not None
                return str(row[0])

            version = shown("server_version").split()[0]
            settings = ", ".join(f"{name} {shown(name)}" for name in ("fsync", "synchronous_commit"))
            return f"PostgreSQL {version}, {settings}"

    async def stop(self) -> None:
        DBOS.destroy()
        if hasattr(self, "postgres"):
            stop(self.postgres, signal.SIGINT)  # at once, and cleanly
