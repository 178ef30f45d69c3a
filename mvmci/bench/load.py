"""Loads: a closed loop for throughput, an open one for latency, a flood for nothing lost.

A closed loop keeps a number of jobs open, so it waits where the cluster stops, and hides it: of a stall of
two seconds its p99 shows nothing (coordinated omission, G. Tene). An open loop submits by a plan, whatever
comes back, and its times are from the moments that were planned.

A window lasts from one end to another, by the broker's stamps: so neither what was under way at its edges nor
how late we hear counts, and the journals have the same ends between the two.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Literal, NamedTuple

import msgspec

from mvmci.bench.client import END_S_MAX, Client, Job, Source
from mvmci.bench.report import rate_of
from mvmci.errors import NotYet
from mvmci.system.linux import set_timer, timer

OPEN_MAX = 5_000  # jobs of an open loop
LATE_EVERY_NS = 10_000_000
PATIENCE = 3  # windows so long as this one: then it ends though nothing ends
SHOWN_MAX = 500  # ids of a window's jobs
TENTHS = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999}  # of a percent
BEYOND_MIN = 10  # jobs that took longer, for a percentile to be told
_US, _S = 1_000, 1_000_000_000  # in ns


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a stretch of load came to; the names are those of `report.Window`.

    It lasted from `began` to `over` by our monotonic clock, in s. What counts is `seconds`, from the end at
    the place `first` of the stream of journals to that at `last`, which is in it. `ended` is what was heard,
    `recorded` what was read between those places, and `failed` that of it which did not succeed. `ids` has up
    to SHOWN_MAX of the jobs, from all of it. An open loop has no `at_once`.
    """

    loop: Literal["closed", "open"]
    at_once: int
    planned: float = 0.0
    began: float
    over: float
    seconds: float
    first: int
    last: int
    ended: int
    recorded: int
    failed: int
    samples_us: Sequence[int]
    sent_us: Sequence[int] = ()
    late_ms: float
    ids: Sequence[str]
    gave_up: str = ""  # why an open loop was ended early

    @property
    def rate(self) -> float:
        """Jobs/s that succeeded."""
        return rate_of(self.ended, self.failed, self.seconds)


class Flooded(NamedTuple):
    """What became of a flood; the names are those of `report.Flood`. Who has no end in time is `lost`."""

    jobs: int
    seconds: float
    succeeded: int
    failed: int
    lost: int
    twice: int


class Alarm:
    """Calls at a moment (ns, `time.monotonic_ns`) as exactly as the kernel does: the timers of event loops go
    by steps of 1 ms, which is most of a light job."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._fd = timer()
        self._call = call
        asyncio.get_running_loop().add_reader(self._fd, self._ring)

    def at(self, ns: int) -> None:
        """Once, and no longer at what was said before."""
        set_timer(self._fd, ns)

    def _ring(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # it was set anew since
        self._call()

    def close(self) -> None:
        """Never again."""
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)


# ---- Closed


class _Window:
    """Its ends: from the first that comes to the first that comes after so many seconds more."""

    def __init__(self, seconds: float) -> None:
        self.ends: list[Job] = []
        self.over = asyncio.Event()
        self._ns = int(seconds * _S)

    def take(self, job: Job) -> None:
        """One has ended."""
        if not self.over.is_set():
            self.ends.append(job)
            if len(self.ends) > 1 and job.ended_ns - self.ends[0].ended_ns >= self._ns:
                self.over.set()


class Lateness:
    """How late our loop comes (ns) at moments LATE_EVERY_NS apart, also while it stood still."""

    def __init__(self) -> None:
        self.ns: list[int] = []
        self._due_ns = time.monotonic_ns()
        self._alarm = Alarm(self._look)
        self._look()

    def _look(self) -> None:
        while (late_ns := time.monotonic_ns() - self._due_ns) >= 0:
            self.ns.append(late_ns)
            self._due_ns += LATE_EVERY_NS
        self._alarm.at(self._due_ns)

    def close(self) -> None:
        """Look no more."""
        self._alarm.close()


class ClosedLoop:
    """Keeps `at_once` jobs of `work` open: for each that ends the next is submitted."""

    def __init__(self, client: Client, work: Source, at_once: int) -> None:
        self._client = client
        self._work = work
        self._open = 0
        self._window: _Window | None = None
        self.at_once = at_once

    @property
    def at_once(self) -> int:
        """How many are kept open. It may be changed at any time: fewer come about as jobs end."""
        return self._at_once

    @at_once.setter
    def at_once(self, count: int) -> None:
        self._at_once = count
        self._fill()

    def _fill(self) -> None:
        while self._open < self._at_once:
            self._open += 1
            self._client.begin(self._work, self._ended)

    def _ended(self, job: Job) -> None:
        self._open -= 1
        self._fill()
        if self._window is not None:
            self._window.take(job)

    async def window(self, seconds: float) -> Loaded:
        """Measure for about so long, from an end to an end.

        Where nothing ends it is over after PATIENCE times as long, by our clock. Raises what a submit did,
        and StoreUnavailable.
        """
        at_once, began = self._at_once, time.monotonic()
        window, late = _Window(seconds), Lateness()
        self._window = window
        try:
            await self._client.until(window.over, PATIENCE * seconds)
        finally:
            self._window = None
            late.close()
        over = time.monotonic()
        ends, jobs = window.ends, window.ends[1:]
        first, last = (ends[0].seq, ends[-1].seq) if ends else (0, 0)
        counted_s = (ends[-1].stored_ns - ends[0].stored_ns) / _S if window.over.is_set() else over - began
        recorded = await self._client.recorded(first, last)
        return Loaded(
            loop="closed",
            at_once=at_once,
            began=began,
            over=over,
            seconds=counted_s,
            first=first,
            last=last,
            ended=len(jobs),
            recorded=len(recorded),
            failed=sum(not one.succeeded for one in recorded),
            samples_us=[(job.ended_ns - job.sent_ns) // _US for job in jobs],
            late_ms=_median_ms(late.ns),
            ids=shown([job.id for job in jobs]),
        )


@asynccontextmanager
async def closed(
    client: Client, work: Source, at_once: int, *, within_s: float = END_S_MAX
) -> AsyncIterator[ClosedLoop]:
    """A closed loop, whose jobs have all ended afterwards. Raises as `Client.settle`."""
    loop = ClosedLoop(client, work, at_once)
    try:
        yield loop
    finally:
        loop.at_once = 0
    await client.settle(within_s)


# ---- Open


def plan(rate: float, seconds: float, seed: int) -> list[int]:
    """When jobs are to be submitted, in ns from the start: a Poisson process of `rate` jobs/s, the same for
    the same seed."""
    dice = random.Random(seed)  # noqa: S311 (no secret)
    moments = itertools.accumulate(dice.expovariate(rate) for _ in itertools.count())
    return [int(at * _S) for at in itertools.takewhile(lambda at: at < seconds, moments)]


class _OpenLoop:
    """Submits what is due, and all that is due: what comes late is sent late, and its time counts from when
    it was planned."""

    def __init__(self, client: Client, work: Source, moments: Sequence[int], open_max: int) -> None:
        self.jobs: list[Job] = []
        self.gave_up = ""
        self.over = asyncio.Event()
        self._client = client
        self._work = work
        self._open_max = open_max
        began_ns = time.monotonic_ns()
        self._due_ns = [began_ns + at for at in moments]
        self.alarm = Alarm(self._send)
        self._send()

    def _send(self) -> None:
        while len(self.jobs) < len(self._due_ns):
            due_ns = self._due_ns[len(self.jobs)]
            if due_ns > time.monotonic_ns():
                self.alarm.at(due_ns)
                return
            if self._client.open >= self._open_max:
                self.gave_up = f"more than {self._open_max} jobs are open: the cluster does not keep up"
                break
            self.jobs.append(self._client.begin(self._work, lambda _: None, due_ns))
        self.over.set()


async def open_loop(
    client: Client,
    work: Source,
    rate: float,
    seconds: float,
    *,
    seed: int = 0,
    open_max: int = OPEN_MAX,
    within_s: float = END_S_MAX,
) -> Loaded:
    """Submit `rate` jobs/s by a plan from `seed`, and wait for all of them.

    It is given up where more than `open_max` are open, and says so. Raises as `Client.settle`.
    """
    began = time.monotonic()
    loop = _OpenLoop(client, work, plan(rate, seconds, seed), open_max)
    try:
        await client.until(loop.over, math.inf)
    finally:
        loop.alarm.close()
    planned_s = time.monotonic() - began if loop.gave_up else seconds
    await client.settle(within_s)
    over = time.monotonic()
    jobs = loop.jobs
    places = [job.seq for job in jobs]
    first, last = (min(places) - 1, max(places)) if places else (0, 0)
    recorded = await client.recorded(first, last)
    return Loaded(
        loop="open",
        at_once=0,
        planned=rate,
        began=began,
        over=over,
        seconds=planned_s,
        first=first,
        last=last,
        ended=len(jobs),
        recorded=len(recorded),
        failed=sum(not one.succeeded for one in recorded),
        samples_us=[(job.ended_ns - job.planned_ns) // _US for job in jobs],
        sent_us=[(job.ended_ns - job.sent_ns) // _US for job in jobs],
        late_ms=_median_ms([job.sent_ns - job.planned_ns for job in jobs]),
        ids=shown([job.id for job in jobs]),
        gave_up=loop.gave_up,
    )


# ---- A flood


async def flood(client: Client, work: Source, jobs: int, *, within_s: float = END_S_MAX) -> Flooded:
    """Submit so many jobs at once, and see what became of them by their journals, once all have ended or none
    has for `within_s`.

    Raises what a submit did, and StoreUnavailable.
    """
    before = await client.count()
    began, ended = time.monotonic(), list[Job]()
    for _ in range(jobs):
        client.begin(work, ended.append)
    open_before = math.inf
    while open_before > client.open > 0:  # for as long as some end
        open_before = client.open
        with suppress(NotYet):
            await client.settle(within_s)
    seconds = time.monotonic() - began
    places = [job.seq for job in ended]
    recorded = await client.recorded(min(places, default=0) - 1, max(places, default=0))
    succeeded, after = sum(one.succeeded for one in recorded), await client.count()
    return Flooded(
        jobs=jobs,
        seconds=seconds,
        succeeded=succeeded,
        failed=len(recorded) - succeeded,
        lost=after.lost - before.lost,
        twice=after.twice - before.twice,
    )


# ---- Figures


def percentiles(samples_us: Sequence[int]) -> dict[str, float]:
    """Those that so many samples tell, in ms: each only from 10 / (1 - p) samples on: then ten took longer.

    Each is a sample: the least that its share of all did not exceed.
    """
    ordered, count = sorted(samples_us), len(samples_us)
    return {
        name: ordered[-(-count * tenths // 1000) - 1] / 1000
        for name, tenths in TENTHS.items()
        if count * (1000 - tenths) >= BEYOND_MIN * 1000
    }


def shown(ids: Sequence[str], most: int = SHOWN_MAX) -> list[str]:
    """Up to `most` of them, as far from each other as there are."""
    step = max(1, -(-len(ids) // most))
    return list(ids[::step])


def _median_ms(ns: Sequence[int]) -> float:
    return statistics.median(ns) / 1e6 if ns else 0.0
