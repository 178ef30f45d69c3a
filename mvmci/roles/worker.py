"""The worker: takes hints, and sees each job to its end through an engine.

A worker has as many loops as it may run jobs at once, each with one job in hand, so no hint is taken that
nobody has time for. A job gives its permit back when the guest has ended; the end is written behind its back,
so that the ends of many jobs become durable together. While jobs are so short that fetching them takes
longer than running them, more loops fetch ahead; a hint that then waits for its permit after all is handed
back for others. What a hint comes to is decided by the journal alone (docs/protocol.md §3):

    ended, or asleep until later      the hint has done its work: acknowledged
    held by a live holder             redelivered later, to whoever is free then
    in what a newer build wrote       the same: another worker may understand it
    let go by this engine, draining   handed back, for another worker
    fenced                            left alone: another holder is at work

The engine writes the journal; the worker keeps the hint alive meanwhile, and says in its presence that
it does. It promises nothing by itself: whatever it forgets, the reconciler finds.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec

from mvmci.cluster.identity import Identity
from mvmci.engine import Engine
from mvmci.engines import open_remote
from mvmci.engines.prefetch import Permit, Prefetch
from mvmci.errors import EngineAway, HostUnfit, MvmciError, NotFound, StoreUnavailable, VersionsDiffer
from mvmci.jobs.times import Stopwatch
from mvmci.roles.meter import Meter
from mvmci.roles.unit import (
    HostOptions,
    Role,
    about_unit,
    allowed,
    given_token,
    join,
    open_host_engine,
    read_settings,
    run_unit,
    with_programs,
)
from mvmci.store import HINT_LAPSE_S, ClusterSettings, Delivery, Store
from mvmci.stores.nats import Cluster
from mvmci.system.tasks import TaskSet, at_most, cancel

_PULL_S = 30.0
KEEP_EVERY_S = HINT_LAPSE_S / 3
UNRECORDED_MAX = 256  # jobs whose guest has ended and whose end is being written
HELD_PAUSE_S = 1.0  # before a hint of a job that somebody else holds is looked at again
FAILED_PAUSE_S = 5.0
NEWER_PAUSE_S = 5.0  # before one of what this build does not understand is handed out again
AWAY_PAUSE_S = 0.1  # before a hint that this worker can do nothing for is handed out again
AWAY_REST_S = 0.5  # for so long it then takes none, or it would be handed that one again
UNAVAILABLE_PAUSE_S = 0.5
HAND_BACK_S = 1.0
SWITCH_S = 30.0  # for jobs to finish in before another engine is used; a grace may be longer

log = logging.getLogger(__name__)


class Worker:
    """Sees to the jobs of `queues`, `slots` at a time."""

    def __init__(self, store: Store, engine: Engine, *, queues: Sequence[str], slots: int) -> None:
        self._store = store
        self.engine = engine
        self._queues = queues
        self._slots = slots
        self._open = asyncio.Event()
        self._open.set()
        self._rested = asyncio.Event()  # whether hints are not left to others just now
        self._rested.set()
        self._able = asyncio.Event()  # whether jobs can run here at all
        self._able.set()
        self._unrecorded = asyncio.Semaphore(slots + UNRECORDED_MAX)
        self._prefetch = Prefetch(slots)
        self.counts: Counter[str] = Counter()  # of runs, by how they came out
        self._newer: dict[str, object] = {}  # jobs of which this says that they are newer
        self._telling = TaskSet()
        self._pulling: set[asyncio.Task[Any]] = set()  # loops that wait for a hint
        self._at_work: dict[asyncio.Task[None], Delivery] = {}

    async def run(self) -> None:
        """Take and see to jobs, until cancelled. Raises only what is a bug."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_hints(), name="keep hints")
                for number in range(self._slots + self._prefetch.ahead_max):
                    ahead = number >= self._slots
                    tasks.create_task(self._loop(tasks, ahead), name=f"loop {number}")
        finally:
            await self._telling.close()
            for hint in self._at_work.values():
                await _hand_back(hint)

    async def drain(self) -> None:
        """Take no more hints, let workflows go at their next effect, and wait until nothing is in work."""
        self._open.clear()
        self._call_off()
        self.engine.drain()
        while self._at_work:
            await asyncio.wait(self._at_work)

    def resume(self) -> None:
        """Take hints again."""
        self.engine.drain(False)
        self._open.set()

    def metrics(self) -> dict[str, Any]:
        """What it counts, as fields of `mvmci.cluster.metrics.UnitMetrics`."""
        return {
            "slots": self._slots,
            "slot_us": self._prefetch.slot_us,
            "slots_run": self._prefetch.most_taken,
            "jobs": dict(self.counts),
            "refused": self.engine.refused,
        }

    def rest(self, yes: bool) -> None:
        """Take no hints while no job can run here."""
        if yes:
            self._able.clear()
            self._call_off()
        else:
            self._able.set()

    async def switch(self, engine: Engine, *, within_s: float) -> None:
        """Go on with another engine once nothing is in work, or at the latest after `within_s`.

        What is still in work then is let go, for whoever takes its hint. The old engine is closed.
        """
        was_open = self._open.is_set()
        await at_most(within_s, self.drain())
        old, self.engine = self.engine, engine
        await old.close()
        left = {task: hint for task, hint in self._at_work.items() if task.done()}
        for task, hint in left.items():
            del self._at_work[task]
            await _hand_back(hint)
        if was_open:
            self.resume()
        else:
            engine.drain()

    async def _loop(self, tasks: asyncio.TaskGroup, ahead: bool) -> None:
        gates = (self._rested, self._able, self._open)  # one may close while the next is waited for
        while True:
            if ahead:
                await self._prefetch.jobs_are_short.wait()
            for gate in gates:
                await gate.wait()
            await self._unrecorded.acquire()
            hint = await self._next() if all(gate.is_set() for gate in gates) else None
            if hint is None:
                self._unrecorded.release()
                continue
            permit = self._prefetch.permit()
            task = tasks.create_task(
                self._process(hint, permit, Stopwatch(time.monotonic_ns)), name=f"process {hint.job}"
            )
            self._at_work[task] = hint
            task.add_done_callback(self._done)
            await permit.ended.wait()

    def _call_off(self) -> None:
        """Let no loop wait for a hint any more."""
        while self._pulling:
            self._pulling.pop().cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._unrecorded.release()
        if not task.cancelled():
            del self._at_work[task]

    async def _next(self) -> Delivery | None:
        """A hint of any of the queues; None when none came, or this worker drains."""
        task = asyncio.current_task()
        assert task is not None
        self._pulling.add(task)
        try:
            return await self._pull()
        except asyncio.CancelledError:
            if task in self._pulling or task.uncancel():
                raise
            return None  # the pull was called off, not this loop
        except StoreUnavailable as away:
            log.info("cannot fetch hints: %s; will retry", away.message)
        finally:
            self._pulling.discard(task)
        await asyncio.sleep(UNAVAILABLE_PAUSE_S)
        return None

    async def _pull(self) -> Delivery | None:
        if len(self._queues) == 1:
            return await self._store.hints.pull(self._queues[0], wait_s=_PULL_S)
        pulls = [asyncio.create_task(self._store.hints.pull(queue, wait_s=_PULL_S)) for queue in self._queues]
        try:
            await asyncio.wait(pulls, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(*pulls)
        found = [pull.result() for pull in pulls if not pull.cancelled()]
        hints = [hint for hint in found if hint is not None]
        for hint in hints[1:]:
            await hint.redeliver(0)
        return hints[0] if hints else None

    async def _process(self, hint: Delivery, permit: Permit, stopwatch: Stopwatch) -> None:
        await self._store.presence.add_hint(hint.job)
        try:
            if await permit.take():
                await self._run(hint, permit.end, stopwatch)
            else:
                await hint.redeliver(0)
        except StoreUnavailable as away:
            log.warning("job %s: %s; the hint will be redelivered", hint.job, away.message)
        finally:
            permit.end()
            await self._store.presence.remove_hint(hint.job)

    async def _run(self, hint: Delivery, on_slot_free: Callable[[], None], stopwatch: Stopwatch) -> None:
        try:
            outcome = await self.engine.run(
                hint.job, spec_entry=hint.spec_entry, on_slot_free=on_slot_free, stopwatch=stopwatch
            )
        except NotFound:
            await hint.ack()  # it was forgotten
            return
        except StoreUnavailable:
            raise
        except VersionsDiffer as newer:
            log.warning("job %s: %s; left for a newer build", hint.job, newer.message)
            await hint.redeliver(NEWER_PAUSE_S)
            self._telling.start(self._tell_newer(hint.job, newer.message))
            return
        except (EngineAway, HostUnfit) as away:
            log.warning("job %s: %s; left for another worker", hint.job, away.message)
            await hint.redeliver(AWAY_PAUSE_S)
            self._rested.clear()
            self._call_off()
            asyncio.get_running_loop().call_later(AWAY_REST_S, self._rested.set)
            return
        except MvmciError as failure:
            log.warning("job %s: %s; will retry in %.0f s", hint.job, failure.message, FAILED_PAUSE_S)
            await hint.redeliver(FAILED_PAUSE_S)
            return
        except Exception:  # a bug of ours; the other jobs here run on
            log.exception("job %s met a bug in mvmci; will retry in %.0f s", hint.job, FAILED_PAUSE_S)
            await hint.redeliver(FAILED_PAUSE_S)
            return
        self.counts[outcome.kind] += 1
        if outcome.kind == "held":
            await hint.redeliver(HELD_PAUSE_S)
        elif outcome.kind == "released" and not outcome.until:
            await hint.redeliver(0)
        elif outcome.kind != "fenced":
            await hint.ack()

    async def _tell_newer(self, job: str, why: str) -> None:
        """Let who asks about `job` know why it does not go on, as long as no other worker had its hint."""
        mine = self._newer[job] = object()
        await asyncio.sleep(0)  # this worker no longer keeps its hint
        await self._store.presence.explain(job, why)
        await asyncio.sleep(2 * NEWER_PAUSE_S)
        if self._newer.get(job) is mine:
            del self._newer[job]
            await self._store.presence.explain(job, "")

    async def _keep_hints(self) -> None:
        """Keep the hints of what is in work from lapsing."""
        while True:
            await asyncio.sleep(KEEP_EVERY_S)
            try:
                for hint in list(self._at_work.values()):
                    await hint.keep()
            except StoreUnavailable:
                pass  # a hint may come to another, who finds the job held


async def _hand_back(hint: Delivery) -> None:
    """This worker is told to stop at once: another can have the hint without waiting for it to lapse."""
    try:
        async with asyncio.timeout(HAND_BACK_S):
            await hint.redeliver(0)
    except (TimeoutError, StoreUnavailable):
        pass


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(HostOptions):
    """How a worker was started. No `queues` are those of its ticket, or all of the cluster's."""

    queues: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)


async def run_worker(options: WorkerOptions) -> NoReturn:
    """Be a worker until cancelled. Raises as `join` and `run_unit`."""
    identity, path = await join(options, "worker")
    open_role = functools.partial(_open_role, identity, options)
    await run_unit(identity, path, open_role, grace_ms=options.grace_ms)


@asynccontextmanager
async def _open_role(identity: Identity, options: WorkerOptions, cluster: Cluster) -> AsyncIterator[Role]:
    settings = await read_settings(cluster)
    allow = allowed(settings)

    def trouble(why: str) -> None:
        worker.rest(bool(why))
        role.tell_trouble(why)

    async def open_engine(settings: ClusterSettings) -> tuple[Engine, str]:
        """The engine that the cluster wants its workers to use, and its isolation if it is on this host."""
        if settings.engine == "embedded":
            return await open_host_engine(cluster, options, lambda: allow, trouble)
        safe = settings.engine.startswith("https:") or not identity.login.has_name
        token = options.token or (given_token(options) if safe else "")
        return await open_remote(cluster, settings.engine, token, public=settings.public_engine), ""

    async def apply_settings(settings: ClusterSettings) -> None:
        nonlocal allow
        allow = allowed(settings)
        if settings.engine != role.about.engine:
            log.info("switching engine from %s to %s", role.about.engine, settings.engine)
            await cluster.store.presence.describe(msgspec.structs.replace(role.about, state="draining"))
            engine, isolation = await open_engine(settings)
            await worker.switch(engine, within_s=min(SWITCH_S, options.grace_ms / 1000))
            worker.rest(False)
            role.about = msgspec.structs.replace(
                role.about, engine=settings.engine, isolation=isolation, trouble=""
            )
        role.about = with_programs(role.about, worker.engine, allow)

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(worker.run(), name="take jobs")
            tasks.create_task(meter.run(), name="meter")

    queues = tuple(options.queues or identity.queues or settings.queues)
    engine, isolation = await open_engine(settings)
    worker = Worker(cluster.store, engine, queues=queues, slots=options.slots)
    meter = Meter(cluster, "worker", counts=worker.metrics, probe=lambda: worker.engine.probe())
    role = Role(
        about=about_unit(
            "worker",
            slots=options.slots,
            queues=queues,
            labels=options.labels,
            engine=settings.engine,
            isolation=isolation,
        ),
        run=run,
        apply_settings=apply_settings,
        drain=worker.drain,
        resume=worker.resume,
    )
    try:
        yield role
    finally:
        await worker.engine.close()
