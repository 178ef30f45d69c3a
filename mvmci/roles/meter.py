"""The meter of a unit: it tells its metrics whenever somebody asks, and costs nothing while nobody does.

What is watched, how late the loop comes and how long the ways to others take, is watched for as long as
who asked said. The loop's own time moves in steps of 1 ms (uvloop), so all is by `time.monotonic`.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NoReturn

import msgspec

from mvmci.cluster.identity import UnitRole
from mvmci.cluster.metrics import Histogram, UnitMetrics
from mvmci.errors import MvmciError, StoreUnavailable
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.link import Unsubscribe
from mvmci.stores.nats.parser import Incoming
from mvmci.system import usage
from mvmci.system.tasks import TaskSet

# Both take 0.3 % of a processor where a unit idles; 10 and 100 ms took 1 %: of 33 units a third of one.
TICK_S = 0.05  # on average: what stops us as regularly would be missed by a regular tick
PROBE_EVERY_S = 0.5
WATCH_S_MAX = 3600.0
SUBSCRIBE_PAUSE_S = 1.0

_encode = msgspec.json.Encoder().encode


class Question(msgspec.Struct, frozen=True):
    """What stands in the word by which units are asked: for how long they are to watch."""

    watch_s: float = 0.0


_questions = msgspec.json.Decoder(Question)


async def _nowhere() -> bool:
    """The way to executors of who has none."""
    return False


class Meter:
    """That of one unit: `counts` are fields of `UnitMetrics`, `probe` is as `mvmci.engine.Engine.probe`."""

    def __init__(
        self,
        cluster: Cluster,
        role: UnitRole,
        *,
        counts: Callable[[], dict[str, Any]] = dict,
        probe: Callable[[], Awaitable[bool]] = _nowhere,
    ) -> None:
        self._cluster = cluster
        self._role = role
        self._counts = counts
        self._probe = probe
        self._late, self._round_trips, self._orders = Histogram(), Histogram(), Histogram()
        self._watching = asyncio.Event()
        self._ends: asyncio.TimerHandle | None = None  # it does

    async def run(self) -> NoReturn:
        """Answer until cancelled."""
        answers = TaskSet()
        leave = await self._listen(lambda word: self._hear(word, answers))
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch_loop())
                tasks.create_task(self._watch(self._round_trips, self._cluster.link.round_trip))
                tasks.create_task(self._watch(self._orders, self._probe))
        finally:
            if self._ends is not None:
                self._ends.cancel()
            await answers.close()
            await leave()
        raise AssertionError

    async def _listen(self, hear: Callable[[Incoming], None]) -> Unsubscribe:
        while True:
            with suppress(StoreUnavailable):
                return await self._cluster.link.subscribe(self._cluster.layout.measure(), hear)
            await asyncio.sleep(SUBSCRIBE_PAUSE_S)

    def _hear(self, word: Incoming, answers: TaskSet) -> None:
        try:
            self.watch(_questions.decode(word.data).watch_s)
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass  # of another build; what it asks for besides is not known here
        answers.start(self._tell())

    def watch(self, for_s: float) -> None:
        """Watch what costs something for that long from now on, if not for longer already."""
        loop = asyncio.get_running_loop()
        until = loop.time() + min(for_s, WATCH_S_MAX)
        if for_s > 0 and (self._ends is None or self._ends.when() < until):
            if self._ends is not None:
                self._ends.cancel()
            self._ends = loop.call_at(until, self._watching.clear)
            self._watching.set()

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
            role=self._role,
            host=socket.gethostname(),
            at_us=time.monotonic_ns() // 1000,
            machine=usage.machine(),
            process=usage.process(),
            cgroup=usage.cgroup(),
            writes=self._cluster.writes,
            orders=self._orders,
            late=self._late,
            round_trips=self._round_trips,
            **self._counts(),
        )

    async def _watch_loop(self) -> NoReturn:
        while True:
            await self._watching.wait()
            began, pause_s = time.monotonic(), random.uniform(0.5, 1.5) * TICK_S  # noqa: S311 (no secret)
            await asyncio.sleep(pause_s)
            self._late.observe(max(0, int((time.monotonic() - began - pause_s) * 1e6)))

    async def _watch(self, into: Histogram, trip: Callable[[], Awaitable[bool]]) -> NoReturn:
        """Observe how long `trip` takes, where it leads somewhere and back."""
        while True:
            await self._watching.wait()
            began = time.monotonic()
            with suppress(MvmciError):
                if await trip():
                    into.observe(int((time.monotonic() - began) * 1e6))
            await asyncio.sleep(PROBE_EVERY_S)
