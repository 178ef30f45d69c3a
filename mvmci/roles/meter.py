"""The meter of a unit: it tells its metrics whenever somebody asks, and costs nothing while nobody does.

What is watched, how late the loop comes and how long the ways to others take, is watched for as long as
the question says. The loop's own time moves in steps of 1 ms (uvloop), so lateness is by `time.monotonic`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import msgspec

from mvmci.cluster.metrics import Histogram, UnitMetrics
from mvmci.errors import MvmciError, StoreUnavailable
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.parser import Incoming
from mvmci.system import usage
from mvmci.system.tasks import TaskSet

if TYPE_CHECKING:
    from mvmci.roles.unit import Role

TICK_S = 0.01
PROBE_EVERY_S = 0.1
WATCH_S_MAX = 3600.0

_encode = msgspec.json.Encoder().encode


class Question(msgspec.Struct, frozen=True):
    """What stands in the word by which units are asked: for how long they are to watch."""

    watch_s: float = 0.0


_questions = msgspec.json.Decoder(Question)


class Meter:
    """That of one unit, which does its `role`."""

    def __init__(self, cluster: Cluster, role: Role) -> None:
        self._cluster = cluster
        self._role = role
        self._late, self._round_trips, self._orders = Histogram(), Histogram(), Histogram()
        self._until = 0.0
        self._asked = asyncio.Event()

    async def run(self) -> NoReturn:
        """Answer until cancelled."""
        answers = TaskSet()
        link, layout = self._cluster.link, self._cluster.layout
        leave = None
        try:
            while leave is None:
                with suppress(StoreUnavailable):
                    leave = await link.subscribe(layout.measure(), lambda word: self._hear(word, answers))
            while True:
                await self._asked.wait()
                async with asyncio.TaskGroup() as watching:
                    watching.create_task(self._watch_loop())
                    watching.create_task(self._watch(self._round_trips, self._cluster.link.round_trip))
                    watching.create_task(self._watch(self._orders, self._role.probe))
                self._asked.clear()
        finally:
            await answers.close()
            if leave is not None:
                await leave()

    def _hear(self, word: Incoming, answers: TaskSet) -> None:
        try:
            watch_s = _questions.decode(word.data).watch_s
        except (msgspec.DecodeError, UnicodeDecodeError):
            watch_s = 0.0
        if watch_s > 0:
            self._until = max(self._until, time.monotonic() + min(watch_s, WATCH_S_MAX))
            self._asked.set()
        answers.start(self._tell())

    async def _tell(self) -> None:
        presence = self._cluster.store.presence
        subject = self._cluster.layout.measured(presence.unit, presence.incarnation)
        with suppress(StoreUnavailable):
            await self._cluster.link.publish(subject, _encode(self.metrics()))

    def metrics(self) -> UnitMetrics:
        """What there is to tell now."""
        presence = self._cluster.store.presence
        return UnitMetrics(
            unit=presence.unit,
            incarnation=presence.incarnation,
            role=self._role.about.role,
            host=socket.gethostname(),
            at_us=time.monotonic_ns() // 1000,
            machine=usage.machine(),
            process=usage.process(),
            cgroup=usage.cgroup(),
            writes=self._cluster.writes,
            orders=self._orders,
            late=self._late,
            round_trips=self._round_trips,
            **self._role.counts(),
        )

    async def _watch_loop(self) -> None:
        while (now := time.monotonic()) < self._until:
            await asyncio.sleep(TICK_S)
            self._late.observe(max(0, int((time.monotonic() - now - TICK_S) * 1e6)))

    async def _watch(self, into: Histogram, trip: Callable[[], Awaitable[bool]]) -> None:
        """Observe how long `trip` takes, unless it leads nowhere."""
        while (began := time.monotonic()) < self._until:
            with suppress(MvmciError):
                if not await trip():
                    return
                into.observe(int((time.monotonic() - began) * 1e6))
            await asyncio.sleep(PROBE_EVERY_S)
