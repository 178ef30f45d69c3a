"""A local cluster as a user has it, the zipapp and a file; and a program that is its client.

The client is what `mvmci submit --batch` and `mvmci wait` are made of, in one process and over one
connection: many submits at once, and an end that is believed when it was read from the journal.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import wasmtime

from benchmarks.processes import ROOT, children
from mvmci.cli.options import spread
from mvmci.cli.submit import SUBMITS_AT_ONCE
from mvmci.jobs.job import Limits, Payload
from mvmci.jobs.journal import Done, Entry, Journal, Spec, records_of
from mvmci.journals.client import submit, until_ended
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster as Broker
from mvmci.stores.nats.link import LASTS_MAX, Incoming
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
            yield Client(broker)
        finally:
            await broker.close()


class Client:
    """One connection to a cluster."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.store = broker.store
        self._digests: dict[Path, str] = {}
        self._ran = 0
        self._run = secrets.token_hex(4)
        self._unchecked: set[str] = set()  # jobs whose ends were heard of
        self._checked = 0  # up to here the stream was read

    async def spec(self, module: Path, input_: str = "null", *, queue: str = QUEUE) -> Spec:
        """A new job of the workflow `module`."""
        digest = self._digests.get(module)
        if digest is None:
            digest = self._digests[module] = await self.store.blobs.put_file(module)
        self._ran += 1
        return Spec(
            at=time.time_ns() // 1_000_000,
            id=f"b-{self._run}-{self._ran}",
            queue=queue,
            kind="workflow",
            module=digest,
            name=module.name,
            component=True,
            input=Payload(text=input_),
            limits=Limits(),
            seed=1,
            by="bench",
        )

    async def bulk(
        self, module: Path, count: int, input_: str = "null", *, tell: Callable[[int], None] = lambda _: None
    ) -> float:
        """Seconds from the first of `count` submits to the last end; `tell` hears how many have ended."""
        specs = [await self.spec(module, input_) for _ in range(count)]
        async with self.ends_of({spec.id for spec in specs}, tell) as all_ended:
            began = time.perf_counter()
            await spread(self._submit, specs, at_once=SUBMITS_AT_ONCE)
            return await all_ended() - began

    async def _submit(self, spec: Spec) -> None:
        await submit(self.store, msgspec.structs.replace(spec, at=time.time_ns() // 1_000_000))

    @asynccontextmanager
    async def ends_of(
        self, jobs: set[str], tell: Callable[[int], None] = lambda _: None
    ) -> AsyncIterator[Callable[[], Awaitable[float]]]:
        """Listen for the ends of `jobs`, which are yet to be submitted. What it gives waits for them all.

        A word of an end is the broker's, that it stored it; the last of them are looked for all the same: the
        answer is when they were seen there. `check` looks at all.
        """
        layout, link = self.broker.layout, self.broker.link
        all_heard = asyncio.Event()
        left = set(jobs)
        last: deque[str] = deque(maxlen=LASTS_MAX)

        def hear(word: Incoming) -> None:
            subject = word.headers["Nats-Subject"]
            job = layout.job_of_message(subject)
            if layout.origin_of_message(subject).kind == "done" and job in left:
                left.remove(job)
                last.append(subject)
                tell(len(jobs) - len(left))
                if not left:
                    all_heard.set()

        async def all_ended() -> float:
            async with asyncio.timeout(END_S_MAX):
                await all_heard.wait()
                while len(await link.lasts(layout.jobs, list(last))) < len(last):
                    pass
            return time.perf_counter()

        self._unchecked |= jobs
        unsubscribe = await link.subscribe(layout.stored("job", "*"), hear)
        try:
            yield all_ended
        finally:
            await unsubscribe()

    async def check(self) -> None:
        """Count the ends of all that were listened for: each has one, and succeeded. Raises RuntimeError."""
        layout = self.broker.layout
        ended: set[str] = set()
        async for message in self.broker.link.read(layout.jobs, layout.ends(), self._checked):
            self._checked = message.seq
            job = layout.job_of_message(message.subject)
            done = records_of(Entry(seq=message.seq, data=message.data))[-1]
            if job in ended:
                raise RuntimeError(f"{job} ended twice")
            if job in self._unchecked:
                self._unchecked.remove(job)
                ended.add(job)
                if not isinstance(done, Done) or done.status != "succeeded":
                    raise RuntimeError(f"{job} ended as it should not: {done}")
        if self._unchecked:
            raise RuntimeError(f"{len(self._unchecked)} jobs have no end: {min(self._unchecked)} is one")

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
