"""Restate: its server, a Python service that it calls over HTTP/2, and a client of its ingress.

python -m benchmarks.peers.restate PORT      the service
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import hypercorn.asyncio
import hypercorn.config
import restate as sdk

from benchmarks.processes import ROOT, answers, free_ports, start, stop, until

IN_FLIGHT = 64
SERVER = ROOT / "build/peers/restate/node_modules/@restatedev/restate-server-linux-x64/bin/restate-server"

service = sdk.Service("bench")


async def one() -> int:
    return 1


@service.handler()
async def noop(context: sdk.Context, value: int) -> int:
    return value


@service.handler()
async def step(context: sdk.Context, value: int) -> int:
    return await context.run_typed("one", one)


class Peer:
    async def start(self, folder: Path) -> None:
        data = folder / "data"
        data.mkdir(exist_ok=True)
        self.ingress, admin, node, port = free_ports(4)
        self.options = {
            "RESTATE_DISABLE_TELEMETRY": "true",
            "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{self.ingress}",
            "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}",
            "RESTATE_BIND_ADDRESS": f"127.0.0.1:{node}",
        }
        command = [SERVER, "--base-dir", data, "--no-logo", "--listen-mode", "tcp", "--node-name", "bench"]
        self.server = start(command, folder / "log", **self.options)
        self.service = start([sys.executable, "-m", __name__, str(port)], folder / "service.log")
        until(lambda: answers(self.ingress) and answers(admin), "Restate", alive=self.server)
        until(lambda: answers(port), "the service", alive=self.service)
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=IN_FLIGHT))
        found = {"uri": f"http://127.0.0.1:{port}", "force": True}
        async with self.http.post(f"http://127.0.0.1:{admin}/deployments", json=found) as answer:
            assert answer.status in (200, 201), await answer.text()

    async def noop(self, count: int) -> float:
        return await self._run("noop", count)

    async def step(self, count: int) -> float:
        return await self._run("step", count)

    async def _run(self, handler: str, count: int) -> float:
        left = iter(range(count))

        async def call() -> None:
            for _ in left:
                async with self.http.post(
                    f"http://127.0.0.1:{self.ingress}/bench/{handler}", json=1
                ) as answer:
                    assert answer.status == 200, await answer.text()
                    assert await answer.json() == 1

        began = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(min(count, IN_FLIGHT))))
        return time.perf_counter() - began

    async def alone(self, count: int) -> list[float]:
        return [await self.noop(1) * 1000 for _ in range(count)]

    def processes(self) -> dict[str, list[int]]:
        return {"client": [os.getpid()], "server": [self.server.pid], "service": [self.service.pid]}

    def durability(self) -> str:
        told = subprocess.run(
            [SERVER, "--dump-config"],
            env={**os.environ, **self.options},
            capture_output=True,
            text=True,
            check=True,
        )
        settings = told.stdout.partition("[log-server]")[2].splitlines()
        return next(line for line in settings if "wal-fsync" in line)

    async def stop(self) -> None:
        if hasattr(self, "http"):
            await self.http.close()
        if hasattr(self, "service"):
            stop(self.service, signal.SIGKILL)  # it would wait for the server, which never hangs up
        if hasattr(self, "server"):
            stop(self.server)


def main() -> None:
    config = hypercorn.config.Config()
    config.bind = [f"127.0.0.1:{sys.argv[1]}"]
    config.keep_alive_max_requests = 1 << 30
    asyncio.run(hypercorn.asyncio.serve(sdk.app([service]), config))


if __name__ == "__main__":
    main()
