"""A cluster on this machine, line by line as the design promises it (the section "Numbers to reach").

What a user waits for is measured from outside, the zipapp run as a program; what a program of the
user's waits for, by a client that stays connected. Times that a journal tells are taken from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks import figures
from benchmarks.figures import Line, percentile
from benchmarks.processes import cpu_of, resident_mb, start, stop
from benchmarks.program import Client, Cluster, step, tiny
from mvmci.jobs.journal import Lease, records_of
from mvmci.journals.client import cancel_job, submit, until_ended

WORKERS = 3
NOTICE_S_MAX = 60.0
ENDLESS = "1000000"  # effects


@dataclass(frozen=True)
class Scale:
    """How long it takes."""

    rounds: int
    batch: int  # jobs
    alone: int
    effects: int
    replayed: int
    starts: int


class Lines:
    """One cluster, and what is measured of it."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.scale = scale
        self.cluster = Cluster(folder, workers=WORKERS)
        self.step = step(folder)

    async def measure(self) -> list[Line]:
        """All lines, on a cluster that is there meanwhile. It takes its data along when it goes."""
        try:
            lines = [self.up()]
            async with self.cluster.client() as client:
                await client.alone(tiny(), 1)
                await client.alone(self.step, 1, "1")
                lines += await self.bulk(client)
                lines += await self.alone(client)
                lines += [await self.effect(client), await self.replay(client), self.submit()]
                lines += [await self.join(client), await self.kill(client), *self.memory()]
        finally:
            self.cluster.down(purge=True)
        return lines

    def up(self) -> Line:
        """The first time compiles the job that tells whether it works."""
        times = []
        for _ in range(self.scale.rounds):
            self.cluster.down(purge=True)
            times.append(self.cluster.up())
        return Line(what=f"`up` of {WORKERS} workers, until a job has run", values=times, unit="s", limit=3)

    async def bulk(self, client: Client) -> list[Line]:
        """`mvmci submit --batch`, as the journals tell it and as the clock on the wall does."""
        told, wall, used = [], [], []
        each: dict[str, list[float]] = {}
        count = self.scale.batch
        for _ in range(self.scale.rounds):
            ids = {client.expect(lambda _: None).id for _ in range(count)}
            file = self.cluster.folder / "batch.jsonl"
            file.write_text("".join(json.dumps({"module": str(tiny()), "id": job}) + "\n" for job in ids))
            groups = {"client": [os.getpid()], **self.cluster.processes()}
            before = cpu_of(groups)
            began = time.perf_counter()
            await asyncio.to_thread(self.cluster, "submit", "--batch", file)
            await client.settle()
            wall.append(count / (time.perf_counter() - began))
            spent = {name: (cpu - before[name]) / count * 1e6 for name, cpu in cpu_of(groups).items()}
            for name, us in spent.items():
                each.setdefault(name, []).append(us)
            used.append(sum(spent.values()))
            await client.succeeded()
            told.append(count / self._told_s(ids))
        shares = ", ".join(f"{name} {figures.number(statistics.median(us))}" for name, us in each.items())
        batch = f"{count:,} light jobs by `submit --batch`"
        return [
            Line(
                what=f"{batch}, by their journals",
                values=told,
                unit="jobs/s",
                limit=3000,
                better="≥",
            ),
            Line(what=f"{batch}, from the command's start", values=wall, unit="jobs/s"),
            Line(what="processor time of one of them, all processes", values=used, unit="µs", beside=shares),
        ]

    def _told_s(self, ids: set[str]) -> float:
        """Seconds from the first submit to the last recorded end, as `list` tells them."""
        jobs = [job for job in json.loads(self.cluster("list", "--json", "--limit", "0")) if job["id"] in ids]
        assert len(jobs) == len(ids)
        assert all(job["status"] == "succeeded" for job in jobs)
        first = min(datetime.fromisoformat(job["submitted_at"]) for job in jobs)
        return (max(datetime.fromisoformat(job["ended_at"]) for job in jobs) - first).total_seconds()

    async def alone(self, client: Client) -> list[Line]:
        """One light job at a time, as a client that waits for it sees it."""
        rounds = [await client.alone(tiny(), self.scale.alone) for _ in range(self.scale.rounds)]
        return [
            Line(
                what=f"one light job alone, submitted to recorded end, p{percent}",
                values=[percentile(times, percent) for times in rounds],
                unit="ms",
                limit=limit,
            )
            for percent, limit in ((50, 5), (99, 20))
        ]

    async def effect(self, client: Client) -> Line:
        """What each of many effects adds to a job, that themselves take no time."""
        each = []
        for _ in range(self.scale.rounds):
            empty = statistics.median(await client.alone(self.step, 3, "0"))
            (took,) = await client.alone(self.step, 1, str(self.scale.effects))
            each.append((took - empty) / self.scale.effects)
        return Line(what="an effect, journaled", values=each, unit="ms", limit=1.5, beside="one synced write")

    async def replay(self, client: Client) -> Line:
        """`mvmci replay` of a long journal."""
        spec = await client.spec(self.step, str(self.scale.replayed))
        await submit(client.store, spec)
        (journal,) = await client.done([spec])
        times = [
            await asyncio.to_thread(self.cluster.timed, "replay", spec.id) for _ in range(self.scale.rounds)
        ]
        return Line(
            what=f"`mvmci replay` of {len(journal.records):,} records", values=times, unit="s", limit=2
        )

    def submit(self) -> Line:
        """What a script waits for."""
        times = [self.cluster.timed("submit", tiny()) * 1000 for _ in range(self.scale.starts)]
        return Line(what="`mvmci submit` of one job, warm", values=times, unit="ms", limit=200)

    async def join(self, client: Client) -> Line:
        """A machine that knows nothing yet, for a job that waits for it alone."""
        times = []
        for number in range(self.scale.rounds):
            name = f"joiner-{number}"
            ticket = self.cluster.folder / name
            self.cluster("ticket", "create", "--queue", name, "--output", ticket)
            spec = await client.spec(tiny(), queue=name)
            await submit(client.store, spec)
            command = [self.cluster.zipapp, "worker", "--join", f"@{ticket}", "--name", name, "--slots", "1"]
            began = time.perf_counter()
            state = self.cluster.folder / f"{name}-state"
            worker = start(command, self.cluster.folder / "log", MVMCI_STATE=str(state))
            try:
                async with asyncio.timeout(NOTICE_S_MAX):
                    await client.done([spec])
                times.append(time.perf_counter() - began)
            finally:
                stop(worker)
        return Line(what="a joining worker's first job, from its start", values=times, unit="s", limit=1)

    async def kill(self, client: Client) -> Line:
        """A worker is killed in the middle of a job: the time until another has taken it."""
        times = []
        for _ in range(self.scale.rounds):
            spec = await client.spec(self.step, ENDLESS)
            await submit(client.store, spec)
            holder = await self._lease(client, spec.id, 1)
            pid = self.cluster.units()[holder.unit]["pid"]
            os.kill(pid, signal.SIGKILL)
            began = time.perf_counter()
            await self._lease(client, spec.id, 2)
            times.append(time.perf_counter() - began)
            journal = await client.journal(spec.id)
            await cancel_job(client.store, journal, "bench")
            await until_ended(client.store, journal)
        return Line(what="a worker killed: its job runs elsewhere", values=times, unit="s", limit=5)

    async def _lease(self, client: Client, job: str, epoch: int) -> Lease:
        """The lease of a job's holder number `epoch`, once it is there."""
        async with (
            asyncio.timeout(NOTICE_S_MAX),
            contextlib.aclosing(client.store.journals.follow(job)) as entries,
        ):
            async for entry in entries:
                for record in records_of(entry):
                    if isinstance(record, Lease) and record.epoch >= epoch:
                        return record
        raise AssertionError("following never ends by itself")

    def memory(self) -> list[Line]:
        """Of units at rest, that have run all of the above."""
        units = self.cluster.units().values()
        mb = {
            role: [resident_mb(unit["pid"]) for unit in units if unit["role"] == role]
            for role in ("worker", "control-plane", "broker")
        }
        return [
            Line(what="a worker at rest, resident", values=mb["worker"], unit="MB", limit=60),
            Line(what="the control plane, resident", values=mb["control-plane"], unit="MB", limit=80),
            Line(what="the broker, resident", values=mb["broker"], unit="MB"),
        ]
