"""The worker: takes hints, and sees each job to its end through an engine.

A worker has as many loops as it may see to jobs at once: a loop is the permit, so no hint is taken that
nobody has time for. What a hint comes to is decided by the journal alone (PROTOCOL §3):

    ended, or asleep until later      the hint has done its work: acknowledged
    held by a live holder             put off, for whoever is free when it comes again
    let go by this engine, draining   handed back, for another worker
    fenced                            left alone: another holder is at work

The engine writes the journal; the worker keeps the hint alive meanwhile, and says in its presence that
it does. It promises nothing by itself: whatever it forgets, the reconciler finds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from mvmci.engine import Engine
from mvmci.errors import MvmciError, NotFound, StoreUnavailable
from mvmci.store import HINT_LAPSE_S, Delivery, Store

PULL_S = 30.0
KEEP_EVERY_S = HINT_LAPSE_S / 3
HELD_PAUSE_S = 1.0  # before a hint of a job that somebody else holds is looked at again
FAILED_PAUSE_S = 5.0
UNAVAILABLE_PAUSE_S = 0.5
HAND_BACK_S = 1.0

log = logging.getLogger(__name__)


class Worker:
    """Sees to the jobs of `queues`, `slots` at a time."""

    def __init__(self, store: Store, engine: Engine, *, queues: Sequence[str], slots: int) -> None:
        self._store = store
        self._engine = engine
        self._queues = queues
        self._slots = slots
        self._open = asyncio.Event()
        self._open.set()
        self._closed = asyncio.Event()
        self._idle = asyncio.Condition()
        self._at_work = 0

    async def run(self) -> None:
        """Take and see to jobs, until cancelled. Raises only what is a bug."""
        async with asyncio.TaskGroup() as loops:
            for number in range(self._slots):
                loops.create_task(self._loop(), name=f"permit {number}")

    async def drain(self) -> None:
        """Take no more hints, let workflows go at their next effect, and wait until nothing is in work."""
        self._open.clear()
        self._closed.set()
        self._engine.drain()
        async with self._idle:
            await self._idle.wait_for(lambda: self._at_work == 0)

    def resume(self) -> None:
        """Take hints again."""
        self._engine.drain(False)
        self._closed.clear()
        self._open.set()

    async def _loop(self) -> None:
        while True:
            await self._open.wait()
            try:
                hint = await self._next()
            except StoreUnavailable as away:
                log.info("no hints: %s", away.message)
                await asyncio.sleep(UNAVAILABLE_PAUSE_S)
                continue
            if hint is not None:
                self._at_work += 1
                try:
                    await self._see_to(hint)
                finally:
                    self._at_work -= 1
                    async with self._idle:
                        self._idle.notify_all()

    async def _next(self) -> Delivery | None:
        """A hint of any of the queues; None when none came, or this worker drains."""
        closed = asyncio.create_task(self._closed.wait())
        pulls = [asyncio.create_task(self._store.hints.pull(queue, wait_s=PULL_S)) for queue in self._queues]
        try:
            await asyncio.wait([closed, *pulls], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (closed, *pulls):
                task.cancel()
            await asyncio.gather(closed, *pulls, return_exceptions=True)
        found = [pull.result() for pull in pulls if not pull.cancelled()]
        hints = [hint for hint in found if hint is not None]
        for hint in hints if self._closed.is_set() else hints[1:]:
            await hint.later(0)
        return hints[0] if hints and not self._closed.is_set() else None

    async def _see_to(self, hint: Delivery) -> None:
        await self._store.presence.keep(hint.job)
        keeping = asyncio.create_task(_keep(hint), name=f"keep the hint of {hint.job}")
        try:
            await self._run(hint)
        except StoreUnavailable as away:
            log.warning("%s: %s; its hint comes again by itself", hint.job, away.message)
        except asyncio.CancelledError:
            await _hand_back(hint)
            raise
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await self._store.presence.let_go(hint.job)

    async def _run(self, hint: Delivery) -> None:
        try:
            step = await self._engine.run(hint.job, fresh=hint.first is not None, first=hint.first)
        except NotFound:
            await hint.ack()  # it was forgotten
            return
        except StoreUnavailable:
            raise
        except MvmciError as failure:
            log.warning("%s: %s; tried again in %.0f s", hint.job, failure.message, FAILED_PAUSE_S)
            await hint.later(FAILED_PAUSE_S)
            return
        if step.kind == "held":
            await hint.later(HELD_PAUSE_S)
        elif step.kind == "fenced":
            log.info("%s: another holder has taken over", hint.job)
        elif step.kind == "released" and not step.until:
            await hint.later(0)
        else:
            await hint.ack()


async def _keep(hint: Delivery) -> None:
    while True:
        await asyncio.sleep(KEEP_EVERY_S)
        try:
            await hint.keep()
        except StoreUnavailable:
            pass  # the hint may come to another, who finds the job held


async def _hand_back(hint: Delivery) -> None:
    """This worker is told to stop at once: another can have the hint without waiting for it to lapse."""
    try:
        async with asyncio.timeout(HAND_BACK_S):
            await hint.later(0)
    except (TimeoutError, StoreUnavailable):
        pass
