"""A client of a cluster under load: workflows with effects outside, sleepers, commands; and a report."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mvmci.errors import NotFound, StoreUnavailable
from mvmci.jobs.job import Limits, Payload
from mvmci.jobs.journal import Journal, Lease, Spec, status
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.store import Store
from tests.faults.chaos.judge import Job
from tests.faults.chaos.outside import Outside, Steps, again, once
from tests.harness.places import GUESTS
from tests.harness.waiting import LONG_S, LOOK_S

ATTEMPTS = 1_000  # nothing gives up because it was killed often
EFFECT_S = 0.2  # less than the pause between two looks of a holder: its write is on the way before the next
WITNESSED = 14  # effects
# Of a job whose sandbox may be killed, while it compiles or runs: that is the job's failure.
KILLED = ("succeeded", "failed: trap", "failed: module: compiling the module failed: the slot process was ")


@dataclass
class Client:
    """Submits jobs, and remembers what came of each submit."""

    store: Store
    outside: Outside
    dice: random.Random
    accepted: list[Job] = field(default_factory=list)
    unknown: list[Job] = field(default_factory=list)
    submits: int = 0
    _modules: dict[str, str] = field(default_factory=dict)
    _numbers: Any = field(default_factory=itertools.count)

    async def prepare(self, *guests: str) -> None:
        """Put the guests into the store, while it is well."""
        for guest in guests:
            self._modules[guest] = await self.store.blobs.put_file(GUESTS / f"{guest}.wasm")

    def fresh(self, kind: str) -> str:
        """An id that no other job has."""
        return f"{kind}-{next(self._numbers)}"

    async def workflow(self, steps: Steps, job: str = "", **limits: Any) -> None:
        job = job or self.fresh("f")
        text = msgspec.json.encode({"steps": steps}).decode()
        spec = self._spec(job, "script", kind="workflow", input=Payload(text=text), limits=_limits(limits))
        await self._submit(spec, Job(job, steps, KILLED))

    async def command(self, guest: str, *args: str, job: str = "", **limits: Any) -> None:
        job = job or self.fresh("c")
        spec = self._spec(job, guest, kind="command", args=args, limits=_limits(limits))
        await self._submit(spec, Job(job, None, KILLED))

    async def run(self, seconds: float, every_s: float, *, sleepers: bool = True) -> None:
        """Submit one job and another for `seconds`, each without waiting for the one before.

        Those that sleep for long, if there are to be any, come in the first half: nobody has to wait for
        the last of them.
        """
        begin = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while (passed := time.monotonic() - begin) < seconds:
                tasks.create_task(self._any(sleepers=sleepers and passed < seconds / 2))
                await asyncio.sleep(self.dice.uniform(0, 2 * every_s))

    async def _any(self, *, sleepers: bool) -> None:
        job = self.fresh("f")
        kind = self.dice.choices(("effects", "sleeper", "ticks", "hello"), (5, 3 * sleepers, 2, 1))[0]
        if kind == "effects":
            await self.workflow(self._effects(job), job)
        elif kind == "sleeper":
            asleep = {"sleep": self.dice.randint(10_500, 14_000)}
            await self.workflow([once(self.outside, job, 0), asleep, again(self.outside, job, 1)], job)
        elif kind == "ticks":
            await self.command("sleeper", "50", "20")
        else:
            await self.command("hello")

    @asynccontextmanager
    async def witness(self) -> AsyncIterator[str]:
        """A workflow is in the middle of an effect as the block begins; the worker that holds it.

        The effect ends soon after, so that its holder would go on if it could; and there is so much to do
        that whoever takes over is still at it when the first one is back.
        """
        job = self.fresh("w")
        effect = self.outside.hold(f"/{job}/once/1")
        try:
            steps = [once(self.outside, job, 0), once(self.outside, job, 1)]
            for number in range(2, WITNESSED):
                steps += [once(self.outside, job, number), {"sleep": 800}]
            await self.workflow(steps, job)
            await effect.arrived.wait()
            async with asyncio.timeout(LONG_S):
                while (lease := await self._lease(job)) is None:  # noqa: ASYNC110 (nobody tells of it)
                    await asyncio.sleep(LOOK_S)
            asyncio.get_running_loop().call_later(EFFECT_S, effect.may_go.set)
            yield lease.unit
        finally:
            effect.may_go.set()

    async def _lease(self, job: str) -> Lease | None:
        """None while there is no broker to ask."""
        with suppress(StoreUnavailable):
            return (await load(self.store, job)).state.lease
        return None

    def _effects(self, job: str) -> Steps:
        """Effects at most once and idempotent ones, with short pauses, some of them none."""
        steps: list[dict[str, Any]] = []
        for number in range(self.dice.randint(3, 8)):
            steps.append(self.dice.choice((once, again))(self.outside, job, number))
            steps.append({"sleep": self.dice.choice((0, 20, 200))})
        return steps

    def _spec(self, job: str, guest: str, **more: Any) -> Spec:
        return Spec(
            at=time.time_ns() // 1_000_000,
            id=job,
            queue="default",
            module=self._modules[guest],
            name=f"{guest}.wasm",
            component=guest == "script",
            seed=7,
            by="chaos",
            **more,
        )

    async def _submit(self, spec: Spec, job: Job) -> None:
        self.submits += 1
        try:
            await submit(self.store, spec)
        except StoreUnavailable:
            self.unknown.append(job)
        else:
            self.accepted.append(job)

    async def settle(self) -> None:
        """A submit of which nobody could say whether it was accepted: look, now that all is well."""
        for job in self.unknown:
            try:
                await load(self.store, job.id)
            except NotFound:
                continue
            self.accepted.append(job)
        self.unknown.clear()


def _limits(limits: dict[str, Any]) -> Limits:
    return Limits(**{"attempts": ATTEMPTS, **limits})


@dataclass
class Report:
    """What a run was: so much of it that a run in which nothing happened is told from one that went well."""

    counts: Counter[str] = field(default_factory=Counter)

    async def of_jobs(self, store: Store, jobs: Sequence[Job]) -> None:
        journals: list[Journal] = [await load(store, job.id) for job in jobs]
        self.counts["jobs"] = len(jobs)
        for journal in journals:
            self.counts["operations"] += len(journal.records)
            self.counts[status(journal.state)[0]] += 1
            for record in journal.records:
                if isinstance(record, Lease):
                    self.counts[record.why] += 1

    def of_logs(self, folder: Path) -> None:
        """What the units say of themselves."""
        text = "".join(path.read_text(errors="replace") for path in folder.glob("units/*/log"))
        self.counts["fenced"] += text.count("another holder has taken over")
        self.counts["said again"] += text.count("nobody is working on it; sent a new hint")

    def print(self, name: str) -> None:
        """Print it, and write it to where MVMCI_CHAOS_REPORT says."""
        text = json.dumps({"run": name, **self.counts})
        print(text)
        file = os.environ.get("MVMCI_CHAOS_REPORT")
        if file:
            with open(file, "a") as report:
                report.write(f"{text}\n")

    def few(self, **least: int) -> dict[str, int]:
        """Of what too little happened, and how much did."""
        return {name: self.counts[name] for name, count in least.items() if self.counts[name] < count}

    def assert_enough(self, **least: int) -> None:
        """A check that cannot fail is none: so much must have happened."""
        few = self.few(**least)
        assert not few, f"too little happened: {few} of {least}"
