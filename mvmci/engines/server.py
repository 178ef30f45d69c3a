"""The executor: an engine for workers that have none of their own.

It takes a job only while it has a free slot, and says so at once when it has none: then another executor
can have it, and the worker keeps the hint. A job that it has taken is its own: it goes on if the worker
that sent it dies, and whoever sends it again follows it. It knows no queue and takes no hint.

Requests come by two transports: the broker (`serve_requests`), and HTTP (`mvmci.api`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from mvmci.engine import Engine, Outcome
from mvmci.engines.prefetch import Permit, Prefetch
from mvmci.engines.remote import (
    NEWER,
    Accepted,
    Failed,
    NoCapacity,
    Rejected,
    Reply,
    RunRequest,
    encode_reply,
    moment,
    read_request,
)
from mvmci.errors import MvmciError, NotFound, StoreUnavailable, VersionsDiffer
from mvmci.jobs.times import Stopwatch
from mvmci.store import Store
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link, Unsubscribe
from mvmci.stores.nats.parser import Incoming
from mvmci.system.tasks import TaskSet

_GROUP = "executors"
ACCEPT_AFTER_S = 0.05  # what has come out by then need not be reported as accepted

log = logging.getLogger(__name__)


class Executor:
    """Runs what it is sent, `slots` jobs at a time."""

    def __init__(self, engine: Engine, store: Store, *, slots: int) -> None:
        self.engine = engine
        self.slots = slots
        self.draining = False
        self._resting = False  # no job can run here now
        self.unit = store.presence.unit
        self.level = store.level
        self._accepted = Accepted(unit=self.unit, incarnation=store.presence.incarnation)
        self.on_change: list[Callable[[], None]] = []  # called when a slot is taken or freed, and at a drain
        self.counts: Counter[str] = Counter()  # of jobs: `taken`, `refused`, and how their runs came out
        self._journals = store.journals
        self._prefetch = Prefetch(slots)
        self._running: dict[str, asyncio.Task[Outcome | Failed]] = {}

    @property
    def free(self) -> int:
        """Slots in which nothing runs."""
        return self._prefetch.free

    @property
    def open(self) -> bool:
        """Whether a job would be taken now."""
        return self._prefetch.accepting and not self.draining and not self._resting

    def metrics(self) -> dict[str, Any]:
        """What it counts, as fields of `mvmci.cluster.metrics.UnitMetrics`."""
        runs = {name: count for name, count in self.counts.items() if name not in ("taken", "refused")}
        return {
            "slots": self.slots,
            "slot_us": self._prefetch.slot_us,
            "slots_run": self._prefetch.most_taken,
            "jobs": runs,
            "refused": self.counts["refused"],
        }

    def rest(self, yes: bool) -> None:
        """Take no jobs while none can run here."""
        self._resting = yes
        self._changed()

    async def take(self, request: RunRequest) -> asyncio.Task[Outcome | Failed]:
        """Begin to run a job, or follow it if that has begun; how it comes out. Raises NoCapacity."""
        if request.job in self._running:
            return self._running[request.job]
        way = request.sent.us_until(moment()) if request.sent is not None else 0
        stopwatch = Stopwatch(time.monotonic_ns, request.waited, way)
        permit = self._prefetch.permit()
        may_run = self.open and await permit.take()
        if request.job in self._running or not may_run or self.draining:
            permit.end()
            if request.job in self._running:
                return self._running[request.job]
            self.counts["refused"] += 1
            raise NoCapacity("this executor is draining" if self.draining else "there is no free slot")
        self.counts["taken"] += 1
        self._changed()
        running = asyncio.create_task(self._run(request, permit, stopwatch), name=f"run {request.job}")
        self._running[request.job] = running
        running.add_done_callback(lambda _: self._running.pop(request.job))
        running.add_done_callback(self._count)
        return running

    async def replies(self, running: asyncio.Task[Outcome | Failed]) -> AsyncIterator[Reply]:
        """What its worker is told of a job that was taken. Who stops listening does not stop the job."""
        done, _ = await asyncio.wait((running,), timeout=ACCEPT_AFTER_S)
        if not done:
            yield self._accepted
        yield await asyncio.shield(running)

    async def drain(self) -> None:
        """Take no more jobs, let workflows go at their next effect, and wait until nothing runs."""
        self.draining = True
        self.engine.drain()
        self._changed()
        while self._running:
            await asyncio.wait(self._running.values())

    def resume(self) -> None:
        """Take jobs again."""
        self.draining = False
        self._resting = False  # no job can run here now
        self.engine.drain(False)
        self._changed()

    async def _run(self, request: RunRequest, permit: Permit, stopwatch: Stopwatch) -> Outcome | Failed:
        def on_slot_free() -> None:
            permit.end()
            self._changed()

        try:
            spec_entry = (
                await self._journals.first(request.job, request.spec_seq) if request.spec_seq else None
            )
            return await self.engine.run(
                request.job,
                spec_entry=spec_entry,
                worker=request.worker,
                on_slot_free=on_slot_free,
                stopwatch=stopwatch,
            )
        except NotFound as gone:
            return Failed(why="not-found", message=gone.message)
        except StoreUnavailable as away:
            return Failed(why="unavailable", message=away.message)
        except MvmciError as failure:
            log.warning("%s: %s", request.job, failure.message)
            # At level 0 a worker may not know that word.
            newer = isinstance(failure, VersionsDiffer) and request.wire > 0
            return Failed(why=NEWER if newer else "other", message=failure.message)
        except Exception as bug:  # it is ours, and costs this order; the others here run on
            log.exception("job %s met a bug in mvmci", request.job)
            return Failed(why="other", message=f"a bug in mvmci: {type(bug).__name__}: {bug}")
        finally:
            on_slot_free()

    def _count(self, run: asyncio.Task[Outcome | Failed]) -> None:
        out = None if run.cancelled() or run.exception() else run.result()
        self.counts[out.kind if isinstance(out, Outcome) else "failed"] += 1

    def _changed(self) -> None:
        for call in self.on_change:
            call()


async def serve_requests(executor: Executor, link: Link, layout: Layout) -> None:
    """Take requests from the broker while a slot is free, and reply to them, until cancelled."""
    changed = asyncio.Event()
    executor.on_change.append(changed.set)
    link.on_reconnect.append(changed.set)
    replies = TaskSet()

    def on_request(message: Incoming) -> None:
        replies.start(_process(executor, link, layout, message))

    def on_ping(message: Incoming) -> None:
        replies.start(_reply(executor, link, layout, message, Rejected()))

    unping: Unsubscribe | None = None
    leave: Unsubscribe | None = None
    try:
        while True:
            changed.clear()
            try:
                if unping is None:
                    unping = await link.subscribe(layout.ping("*", "*"), on_ping, group=_GROUP)
                if executor.open and leave is None:
                    leave = await link.subscribe(layout.engine("*", "*"), on_request, group=_GROUP)
                    await link.publish(layout.capacity())
                elif not executor.open and leave is not None:
                    leaving, leave = leave, None
                    await leaving()
            except StoreUnavailable as away:
                log.info("no requests are taken: %s", away.message)
            await changed.wait()
    finally:
        executor.on_change.remove(changed.set)
        link.on_reconnect.remove(changed.set)
        for one in (leave, unping):
            if one is not None:
                await one()
        await replies.close()


async def _process(executor: Executor, link: Link, layout: Layout, message: Incoming) -> None:
    """One request from the broker."""
    worker = message.subject.split(".")[-2]
    try:
        request = msgspec.structs.replace(read_request(message.data), worker=worker)
        running = await executor.take(request)
    except NoCapacity:
        await _reply(executor, link, layout, message, Rejected())
        return
    except VersionsDiffer as newer:
        await _reply(executor, link, layout, message, Failed(why=NEWER, message=newer.message))
        return
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as bad:
        await _reply(executor, link, layout, message, Failed(why="other", message=f"no request: {bad}"))
        return
    async for reply in executor.replies(running):
        await _reply(executor, link, layout, message, reply)


async def _reply(executor: Executor, link: Link, layout: Layout, message: Incoming, reply: Reply) -> None:
    """Reply to what came as `message`. That it cannot be sent is no failure: the worker asks again."""
    _, worker, number = message.subject.rsplit(".", 2)
    try:
        await link.publish(layout.reply(worker, number), encode_reply(reply, executor.level))
    except StoreUnavailable as away:
        log.info("a reply to %s is lost: %s", worker, away.message)
