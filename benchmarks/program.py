"""A local cluster as a user has it, the zipapp and a file; and a program that is its client.

The client is that of `mvmci bench`: many submits at once over one connection, and ends that are counted by
the journals.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import wasmtime

from benchmarks.processes import ROOT, children
from mvmci.bench import client as load
from mvmci.cli.options import spread
from mvmci.cli.submit import SUBMITS_AT_ONCE
from mvmci.jobs.job import Limits, Payload
from mvmci.jobs.journal import BENCH_BY, Journal, Spec
from mvmci.journals.client import mint_id, submit, until_ended
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster as Broker
from mvmci.system.clock import wall_clock_ms
from mvmci.trust.client import client_of

DIST = ROOT / "dist"
NAME = "bench"
QUEUE = "default"
WORKERS, SLOTS = 2, 2  # as many workers as cores
READY = "240s"
GROUPS = {
    "broker": "broker",
    "control-plane": "control plane",
    "executor": "executors",
    "balancer": "balancer",
    "worker": "workers",
}  # of processes, by the role of their unit
BATCH_S_MAX = 900.0
END_S_MAX = 3600.0


def tiny() -> Path:
    """The smallest workflow of the examples: answers its input, and asks for nothing."""
    return DIST / "examples" / "tiny.wasm"


def step(folder: Path) -> Path:
    """A workflow that asks for as many effects as its input says, assembled into `folder`."""
    target = folder / "step.wasm"
    if not target.exists():
        target.write_bytes(wasmtime.wat2wasm((ROOT / "benchmarks" / "step.wat").read_text()))
    return target


class Cluster:
    """The cluster `bench`, whose state lies in `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = WORKERS,
        slots: int = SLOTS,
        access: str = "access: per-worker\n",
    ) -> None:
        folder.mkdir(mode=0o711, exist_ok=True)  # slots run as another user
        self.folder = folder
        self.state = folder / "state"
        self.slots = slots
        self.workers = workers
        self.access = access  # lines of the topology
        self.zipapp = folder / "mvmci.pyz"  # a copy: what is measured stays the same to the end
        if not self.zipapp.exists():
            shutil.copy2(DIST / "mvmci.pyz", self.zipapp)
        self.env = {**os.environ, "MVMCI_STATE": str(self.state)}

    def __call__(self, *args: str | Path, limit_s: float = BATCH_S_MAX) -> str:
        """Run a verb; what it prints. Raises RuntimeError with its reason."""
        command = [sys.executable, str(self.zipapp), *map(str, args)]
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=limit_s, check=False
        )
        if done.returncode:
            raise RuntimeError(f"mvmci {args[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return done.stdout

    def timed(self, *args: str | Path) -> float:
        """Seconds that a verb takes."""
        began = time.perf_counter()
        self(*args)
        return time.perf_counter() - began

    def up(self) -> float:
        """Bring it up, or to another number of workers; the seconds until it is ready."""
        file = self.folder / "topology.yaml"
        workers = f"workers: {{count: {self.workers}, slots: {self.slots}}}\n"
        file.write_text(f"cluster: {NAME}\n{self.access}{workers}")
        return self.timed("up", file, "--detach", "--yes", "--within", READY)

    def down(self, *, purge: bool = False) -> None:
        """Stop all of it, if it is there."""
        if (self.state / NAME).exists():
            self("down", *(["--purge"] if purge else []))

    def units(self) -> dict[str, dict[str, Any]]:
        """What `ps` says of each unit."""
        return {unit["name"]: unit for unit in json.loads(self("ps", "--json"))["units"]}

    def processes(self) -> dict[str, list[int]]:
        """Its processes by what they are; an engine's own children are the slots and who forks them."""
        groups: dict[str, list[int]] = {group: [] for group in GROUPS.values()}
        for unit in self.units().values():
            groups[GROUPS[unit["role"]]].append(unit["pid"])
            if unit["role"] in ("worker", "executor"):
                groups.setdefault("slots", []).extend(children(unit["pid"]))
        return {group: pids for group, pids in groups.items() if pids}

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A program that is a client of it."""
        broker = await open_cluster(client_of(self.state / NAME), announce=False)
        try:
            async with load.listening(Client(broker)) as client:
                yield client
        finally:
            await broker.close()


class Client(load.Client):
    """One connection to a cluster, and what only we ask: jobs of any module, in bulk and one by one."""

    def __init__(self, cluster: Broker) -> None:
        super().__init__(cluster)
        self._digests: dict[Path, str] = {}

    async def spec(self, module: Path, input_: str = "null", *, queue: str = QUEUE) -> Spec:
        """A new job of the workflow `module`, which nobody listens for."""
        return await self._spec(mint_id(), module, input_, queue)

    async def _spec(self, job: str, module: Path, input_: str, queue: str) -> Spec:
        digest = self._digests.get(module)
        if digest is None:
            digest = self._digests[module] = await self.store.blobs.put_file(module)
        return Spec(
            at=wall_clock_ms(),
            id=job,
            queue=queue,
            kind="workflow",
            module=digest,
            name=module.name,
            component=True,
            input=Payload(text=input_),
            limits=Limits(),
            seed=1,
            by=BENCH_BY,
        )

    async def bulk(
        self, module: Path, count: int, input_: str = "null", *, tell: Callable[[int], None] = lambda _: None
    ) -> float:
        """Seconds from the first of `count` submits to the last end; `tell` hears how many have ended."""
        ended = itertools.count(1)
        jobs = [self.expect(lambda _: tell(next(ended))) for _ in range(count)]
        specs = [await self._spec(job.id, module, input_, QUEUE) for job in jobs]
        began = time.perf_counter()
        await spread(self._submit, specs, at_once=SUBMITS_AT_ONCE)
        await self.settle(END_S_MAX)
        return time.perf_counter() - began

    async def succeeded(self) -> None:
        """See that all that were listened for have one end each, and succeeded. Raises RuntimeError."""
        count = await self.count()
        ends = await self.recorded(0, sys.maxsize)
        if count.lost or count.twice or not all(end.succeeded for end in ends):
            failed = sum(not end.succeeded for end in ends)
            raise RuntimeError(f"{failed} of {len(ends)} jobs ended as they should not: {count}")

    async def alone(self, module: Path, count: int, input_: str = "null") -> list[float]:
        """Milliseconds of each of `count` jobs, one after the other: submitted, to its end as it is read."""
        times = []
        for _ in range(count):
            spec = await self.spec(module, input_)
            began = time.perf_counter()
            await submit(self.store, spec)
            await until_ended(self.store, Journal(spec.id))
            times.append((time.perf_counter() - began) * 1000)
        return times

    async def journal(self, job: str) -> Journal:
        """All that is recorded of a job."""
        journal = Journal(job)
        journal.absorb(await self.store.journals.read(job))
        return journal

    async def done(self, specs: Sequence[Spec]) -> list[Journal]:
        """The journals of jobs that were submitted, once they have ended."""
        journals = [Journal(spec.id) for spec in specs]
        for journal in journals:
            await until_ended(self.store, journal)
        return journals
