"""What is measured on candidates that are up, and in which order.

warm      every slot has run a job
rest      one job at a time: what all takes when nothing waits
windows   throughput by workers, as `Points` says, until the time that the rest needs
diagnose  at each knee: what bounds it, where a job's time goes, what it takes
latency   of all candidates at one rate
raise     what was named: where the rate moves, the name stands
flood     so many jobs at once

A budget bounds all of it: windows end in time for the rest, as long as that takes by what was measured so
far; what may be left out is, where time is short; and what hangs is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from mvmci.bench import load
from mvmci.bench.bottleneck import OTHERS_MANY, find, tried
from mvmci.bench.curves import draw
from mvmci.bench.evidence import Look, Seen, look, probing, seen_between, weigh
from mvmci.bench.figures import number, several
from mvmci.bench.knee import noise_of
from mvmci.bench.load import Loaded, closed, open_loop, percentiles, shown
from mvmci.bench.points import Point, Points
from mvmci.bench.profiles import Work
from mvmci.bench.raising import raised
from mvmci.bench.report import Curve, Demand, Diagnosis, Flood, Latency, Life, Window
from mvmci.bench.stage import Staged
from mvmci.cluster.metrics import UnitMetrics
from mvmci.errors import NotYet, StoreFull, Usage
from mvmci.journals.reader import load as read_journal

WINDOW_S, SETTLE_S, REST_S = 4.0, 0.7, 2.0
LATENCY_S_MIN, LATENCY_S_MAX, LATENCY_JOBS = 2.0, 15.0, 1_000  # enough for a p99
LATENCY_PART = 1 / 60  # of the budget, that each open loop may take
LATENCY_SHARE = 0.5  # of the rate at the knee
COSTS_S = {  # what each takes, until it was seen
    "window": WINDOW_S + 2 * SETTLE_S,
    "diagnosis": WINDOW_S + 4 * SETTLE_S,
    "latency": WINDOW_S + 3 * SETTLE_S,  # and the open loop
    "raise": 30.0,
}
BEFORE_S = REST_S + 6 * SETTLE_S  # to warm one candidate for a profile, and see it at rest
HANGS_S = 60.0  # beyond its time, a run is cut
WARM_S_MAX = 120.0
LIVES = 200  # journals that are read for where the time goes
LATE_SHARE, LATE_MS, DRIFT, FAILED = 0.1, 1.0, 0.1, 0.01  # what marks a window, beside `OTHERS_MANY`
DRIFT_KNOWN = 5  # windows, before one can differ from them
NOISE = 0.05  # between windows of one point, where none is known
RAISED_WINDOWS = 2
CALIBRATION = 100_000  # rounds of a fixed piece of work: some ms

Key = tuple[str, str]  # a candidate and a profile
Told = Mapping[str, UnitMetrics]  # by units


@dataclass
class Found:
    """What a run has found so far."""

    windows: list[Window] = field(default_factory=list)
    heard: int = 0  # ends in windows, as they were counted
    recorded: int = 0  # and by the journals
    rest: dict[Key, Seen] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)
    diagnoses: list[Diagnosis] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    floods: list[Flood] = field(default_factory=list)


class Run:
    """One run over candidates that are up. `works` has the jobs of each candidate under each profile."""

    def __init__(
        self, staged: Sequence[Staged], works: Mapping[Key, Work], points: Points, tell: Callable[[str], None]
    ) -> None:
        self._staged = {one.name: one for one in staged}
        self._works = works
        self._points = points
        self._began = time.monotonic()
        self._ends_at = math.inf
        self._later: list[str] = []  # kinds of what is still to come
        self._floods: list[tuple[Key, int]] = []  # and how many jobs
        self._took: dict[str, list[float]] = {}  # s, of each kind
        self._latency_s = LATENCY_S_MAX
        self._tell = tell
        self.found = Found()

    async def measure(self, ends_at: float, *, rate: float | None = None, floods: Sequence[int] = ()) -> None:
        """All of it, until about `ends_at` by the monotonic clock; latencies at `rate` if given.

        What was found until then is in `found` if it raises MvmciError, or is cancelled.
        """
        self._ends_at = ends_at
        self._latency_s = latency_s(ends_at - self._began)
        self._floods = [(key, jobs) for jobs in floods for key in self._works]
        is_ours = any(one.topology is not None for one in self._staged.values())
        later = [*["diagnosis", "diagnosis", "latency"] * len(self._works), *["raise"] * is_ours]
        try:
            async with asyncio.timeout(ends_at + HANGS_S - time.monotonic()):
                self._later = [*["window"] * self._points.left, *later]
                for key in self._works:
                    await self.warm(*key)
                for key in self._works:
                    await self.rest(*key)
                self._warn()
                self._later = later
                certain = ["diagnosis"] * len(self._works)
                while self._points.missing or self._fits(
                    "window", *(certain if self._points.is_first_pass else later)
                ):
                    await self.window(self._points.next())
                self._mark_drift()
                self.found.windows = at_last(self.found.windows)
                await self._explain(rate)
                while self._floods:
                    key, jobs = self._floods.pop(0)
                    await self.flood(*key, jobs)
        except TimeoutError:
            raise NotYet(
                "the budget is over, and something takes far longer than it did before",
                hint="a job may not end, or a unit may not come back",
            ) from None

    async def _explain(self, rate: float | None) -> None:
        """What windows do not tell. Where time is short, what bounds them comes first: just beyond the knee,
        or, where nothing is full there yet, with the most workers."""
        for key in self._works:
            knee = self.curve(*key).knee
            beyond = knee.between[1] if knee.between else knee.most
            seen = await self.diagnose(*key, beyond)
            if not seen.findings and beyond < knee.most and self._fits("diagnosis"):
                await self.diagnose(*key, knee.most)
        for profile in dict.fromkeys(profile for _, profile in self._works):
            if self._fits(*["latency"] * len(self._staged)):
                await self.latency(profile, rate)
            else:
                self._tell(f"{profile}: no time is left to measure latency")
        for place in range(len(self.found.diagnoses)):
            if self._fits("raise"):
                await self.raise_(place)

    # ---- time

    def _fits(self, *kinds: str) -> bool:
        """Whether there is time for all of these, and for the floods."""
        return self._spare_s(*kinds) >= 0

    def _spare_s(self, *kinds: str) -> float:
        floods_s = sum(jobs / self._rate_of_all(*key) for key, jobs in self._floods)
        return self._ends_at - time.monotonic() - floods_s - sum(map(self._cost_s, kinds))

    def _rate_of_all(self, candidate: str, profile: str) -> float:
        """What all workers do, in proportion as long as only fewer were seen; without end before that."""
        windows = (one for one in self.found.windows if one.loop == "closed" and one.rate)
        own = (one for one in windows if (one.candidate, one.profile) == (candidate, profile))
        seen = max(own, key=lambda one: one.workers, default=None)
        return math.inf if seen is None else seen.rate * self._staged[candidate].most / seen.workers

    def _cost_s(self, kind: str) -> float:
        """What one takes: by those of this run, else by those of others."""
        more_s = self._latency_s if kind == "latency" else 0.0
        return statistics.fmean(self._took.get(kind, [COSTS_S[kind] + more_s]))

    @contextlib.contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        """One of `kind`, that is now no longer to come."""
        began = time.monotonic()
        if kind in self._later:
            self._later.remove(kind)
        yield
        self._has_taken(kind, began)

    def _has_taken(self, kind: str, began: float) -> None:
        self._took.setdefault(kind, []).append(time.monotonic() - began)

    def _progress(self) -> str:
        windows, left_s = len(self.found.windows), self._ends_at - time.monotonic()
        more = max(self._points.left, int(self._spare_s(*self._later) / self._cost_s("window")))
        return f"window {windows} of about {windows + more}, {math.ceil(left_s / 60)} min left"

    def curve(self, candidate: str, profile: str) -> Curve:
        """That of a candidate so far. Raises NotYet where none of its windows saw a job succeed."""
        own = [one for one in self.found.windows if (one.candidate, one.profile) == (candidate, profile)]
        for found in draw([self._staged[candidate].candidate], own, []):
            return found
        raise NotYet(
            f"{candidate}, {profile}: no job succeeded in any window",
            hint="it may have too few workers alive",
        )

    # ---- before

    async def warm(self, candidate: str, profile: str) -> None:
        """Run jobs, as many at once as ever, until none runs in a slot that had none before: the first in
        each takes longer than all others."""
        staged, work = self._staged[candidate], self._works[candidate, profile]
        await staged.set_workers(staged.most)
        cold = engines = staged.engines
        first = before = await staged.asker.ask(engines)
        told = -1  # engines that are warm
        end = time.monotonic() + WARM_S_MAX
        async with closed(staged.client, work, staged.jobs_at_once) as loop:
            while cold:
                if told != (told := len(engines) - len(cold)):
                    self._tell(f"{candidate}, {profile}: warming, {told} of {len(engines)} engines are warm")
                if time.monotonic() > end:
                    raise NotYet(
                        f"{candidate}, {profile}: after {WARM_S_MAX:.0f} s a slot of {min(cold)} has not "
                        "ended a job",
                        hint="jobs may last too long: give them less to do",
                    )
                await loop.window(SETTLE_S)
                now = await staged.asker.ask(engines)
                cold, before = cold_engines(engines, first, before, now), now

    async def rest(self, candidate: str, profile: str) -> None:
        """One worker, one job at a time. Raises Usage where jobs are not such as can be measured."""
        staged = self._staged[candidate]
        self._tell(f"{candidate}, {profile}: one job at a time")
        await staged.set_workers(1)
        seen, loaded = await self._watched(staged, profile, at_once=1, seconds=REST_S)
        _check_measurable(profile, loaded, await self._reason(staged, loaded))
        self.found.rest[candidate, profile] = seen
        self.found.lives.append(await self._life(staged, profile, loaded, alone=True))

    async def _reason(self, staged: Staged, loaded: Loaded) -> str:
        """Why the first of these jobs failed, where all did."""
        if not loaded.ids or loaded.failed < loaded.recorded:
            return ""
        done = (await read_journal(staged.cluster.store, loaded.ids[0])).state.done
        return "" if done is None else done.reason

    def _warn(self) -> None:
        """Before the time is spent: of what the machine does besides."""
        others = min(seen.others for seen in self.found.rest.values())
        if others > OTHERS_MANY:
            self._tell(
                f"warning: other programs take {others:.0%} of the machine, and what is measured beside them "
                "is worth little"
            )

    # ---- windows

    async def window(self, point: Point) -> None:
        """One window of a closed loop, and whether it counts."""
        staged, work = self._staged[point.candidate], self._works[point.candidate, point.profile]
        with self._timed("window"):
            await staged.set_workers(point.workers)
            earlier_us = calibrate()
            async with closed(staged.client, work, staged.jobs_at_once) as loop:
                await loop.window(SETTLE_S)
                before = await look(staged, units=False)
                loaded = await loop.window(WINDOW_S)
                after = await look(staged, units=False)
            slower_us = max(earlier_us, calibrate())
        window = self._window(staged, point.profile, loaded, before, after, slower_us)
        counts = self._points.add(point, window.rate, marked=bool(window.marks))
        self.found.windows.append(msgspec.structs.replace(window, counts=counts))
        follows = "counts all the same" if counts else "run again"
        marks = f" ({'; '.join(window.marks)}: {follows})" if window.marks else ""
        self._tell(
            f"{self._progress()}: {point.candidate}, {point.profile}, {several(point.workers, 'worker')}: "
            f"{number(window.rate)} jobs/s{marks}"
        )

    def _window(
        self, staged: Staged, profile: str, loaded: Loaded, before: Look, after: Look, calibration_us: int = 0
    ) -> Window:
        """The window that `loaded` was, with what speaks against it."""
        seen = seen_between(before, after, is_local=staged.is_local, slotted=())
        window = Window(
            number=len(self.found.windows) + 1,
            candidate=staged.name,
            profile=profile,
            workers=staged.workers,
            loop=loaded.loop,
            at_once=loaded.at_once,
            planned=loaded.planned,
            began_s=loaded.began - self._began,
            seconds=loaded.seconds,
            ended=loaded.ended,
            failed=loaded.failed,
            samples_us=loaded.samples_us,
            sent_us=loaded.sent_us,
            late_ms=loaded.late_ms,
            busy=seen.busy,
            others=seen.others,
            calibration_us=calibration_us,
        )
        self._count(loaded)
        marks = [f"{unit} was started again" for unit in seen.started_again]
        return msgspec.structs.replace(window, marks=[*marks, *self._marks(window)])

    def _count(self, loaded: Loaded) -> None:
        self.found.heard += loaded.ended
        self.found.recorded += loaded.recorded

    def _marks(self, window: Window) -> list[str]:
        marks = [] if window.ended else ["no job ended"]
        if window.others > OTHERS_MANY:
            marks.append(f"other programs took {window.others:.0%} of the machine")
        p50_ms = statistics.median(window.samples_us or [0]) / 1000
        if window.late_ms > max(LATE_MS, LATE_SHARE * p50_ms):
            marks.append(f"the load came {window.late_ms:.1f} ms late")
        if window.failed > FAILED * window.ended:
            marks.append(f"{window.failed:,} of {window.ended:,} jobs failed")
        return [*marks, *self._drift(window)]

    def _drift(self, window: Window) -> list[str]:
        known = [one.calibration_us for one in self.found.windows if one.calibration_us]
        off = window.calibration_us / statistics.median(known) - 1 if len(known) >= DRIFT_KNOWN else 0.0
        if not window.calibration_us or abs(off) <= DRIFT:
            return []
        return [f"the processor was {abs(off):.0%} {'slower' if off > 0 else 'quicker'}"]

    def _mark_drift(self) -> None:
        """Of the first windows too: what they are compared with was not known yet."""
        for place, one in enumerate(self.found.windows[:DRIFT_KNOWN]):
            marks = [*one.marks, *self._drift(one)]
            self.found.windows[place] = msgspec.structs.replace(one, marks=marks)

    # ---- what bounds it

    async def _watched(
        self, staged: Staged, profile: str, *, at_once: int, seconds: float
    ) -> tuple[Seen, Loaded]:
        """A closed loop while units watch, and lone writes are timed; once more where others took much, if
        there is time."""
        tries = [await self._watch(staged, profile, at_once, seconds)]
        if tries[0][0].others > OTHERS_MANY and self._fits("window", *self._later):
            tries.append(await self._watch(staged, profile, at_once, seconds))
        return min(tries, key=lambda one: one[0].others)

    async def _watch(self, staged: Staged, profile: str, at_once: int, seconds: float) -> tuple[Seen, Loaded]:
        work = self._works[staged.name, profile]
        async with probing(staged.state) as probe, closed(staged.client, work, at_once) as loop:
            await loop.window(SETTLE_S)
            before = await look(staged, units=True, watch_s=seconds + SETTLE_S)
            probe.medians_ms()
            loaded = await loop.window(seconds)
            write_ms, round_trip_ms = probe.medians_ms()
            after = await look(staged, units=True)
        self._count(loaded)
        seen = seen_between(before, after, is_local=staged.is_local, slotted=staged.executors)
        return msgspec.structs.replace(seen, write_ms=write_ms, round_trip_ms=round_trip_ms), loaded

    async def diagnose(self, candidate: str, profile: str, workers: int) -> Diagnosis:
        """What bounds so many workers, where the time of a job goes there, and what it takes."""
        staged = self._staged[candidate]
        self._tell(f"{candidate}, {profile}: what bounds {several(workers, 'worker')}")
        with self._timed("diagnosis"):
            await staged.set_workers(workers)
            before, count = await staged.stored_bytes(), await staged.client.count()
            seen, loaded = await self._watched(staged, profile, at_once=staged.jobs_at_once, seconds=WINDOW_S)
            stored = await staged.stored_bytes() - before
            ended = (await staged.client.count()).ended_once - count.ended_once
        weighed = weigh(seen, self.found.rest[candidate, profile], failed=loaded.failed)
        diagnosis = Diagnosis(
            candidate=candidate,
            profile=profile,
            workers=workers,
            rate=loaded.rate,
            evidence=weighed,
            findings=find(weighed),
        )
        self.found.diagnoses.append(diagnosis)
        self.found.lives.append(await self._life(staged, profile, loaded, alone=False))
        if diagnosis.rate:
            self.found.demands.append(
                Demand(
                    candidate=candidate,
                    profile=profile,
                    workers=workers,
                    cpu_ms=seen.cluster_us / 1000 / (diagnosis.rate * seen.seconds),
                    worker_bytes=seen.memory.get("worker", 0),
                    executor_bytes=seen.memory.get("executor", 0),
                    broker_bytes=max(0, round(stored / ended)),
                )
            )
        return diagnosis

    async def _life(self, staged: Staged, profile: str, loaded: Loaded, *, alone: bool) -> Life:
        """Where the time of the jobs of a window went, by their journals."""
        parts: Counter[str] = Counter()
        ids = shown(loaded.ids, LIVES)
        for job in ids:
            journal = await read_journal(staged.cluster.store, job)
            parts["queue"] += journal.queued_us or 0
            parts.update(msgspec.structs.asdict(journal.state.times))
        return Life(
            candidate=staged.name,
            profile=profile,
            workers=staged.workers,
            alone=alone,
            jobs=len(ids),
            parts={part: us / 1000 / len(ids) for part, us in parts.items()} if ids else {},
        )

    async def raise_(self, place: int) -> None:
        """Raise what a diagnosis names first: its finding then stands, or does not."""
        diagnosis = self.found.diagnoses[place]
        if not diagnosis.findings:
            return
        staged, (first, *more) = self._staged[diagnosis.candidate], diagnosis.findings
        began = time.monotonic()
        async with raised(staged, first) as given:
            if given is None:
                return
            self._tell(f"{staged.name}, {diagnosis.profile}: raised {first.cause}, {' to '.join(given)}")
            await self.warm(staged.name, diagnosis.profile)
            await staged.set_workers(diagnosis.workers)
            after = [
                await self._watched(staged, diagnosis.profile, at_once=staged.jobs_at_once, seconds=WINDOW_S)
                for _ in range(RAISED_WINDOWS)
            ]
        self._has_taken("raise", began)
        closed_loops = [one for one in self.found.windows if one.loop == "closed" and one.counts]
        before = [diagnosis.rate, *(one.rate for one in closed_loops if _point(one) == _point(diagnosis))]
        noise = self._noise(diagnosis) * math.sqrt(1 / len(before) + 1 / len(after))
        rates = statistics.fmean(before), statistics.fmean(loaded.rate for _, loaded in after)
        first = tried(first, given, rates, noise=noise, others=max(seen.others for seen, _ in after))
        self.found.diagnoses[place] = msgspec.structs.replace(diagnosis, findings=(first, *more))

    def _noise(self, at: Diagnosis) -> float:
        """What one window there is off by, as all windows of its curve say."""
        try:
            return noise_of(self.curve(at.candidate, at.profile).rates).get(at.workers, NOISE)
        except NotYet:
            return NOISE

    # ---- latency, floods

    async def latency(self, profile: str, rate: float | None) -> None:
        """Of all candidates at one rate and with as many workers, below each knee."""
        curves = [self.curve(*key) for key in self._works if key[1] == profile]
        workers = min(one.knee.between[0] if one.knee.between else one.knee.most for one in curves)
        below = [one.means[max(n for n in one.means if n <= workers)] for one in curves]
        common = rate or LATENCY_SHARE * min(below)
        alone_ms = {
            one.candidate: sum(one.parts.values())
            for one in self.found.lives
            if one.alone and one.profile == profile
        }
        for curve in curves:
            staged, work = self._staged[curve.candidate], self._works[curve.candidate, profile]
            self._tell(f"{curve.candidate}, {profile}: latency at {number(common)} jobs/s")
            at_once = max(1, round(common * alone_ms[curve.candidate] / 1000))  # Little's law
            with self._timed("latency"):
                await staged.set_workers(workers)
                async with closed(staged.client, work, at_once) as loop:
                    await loop.window(SETTLE_S)
                    shut = await loop.window(min(WINDOW_S, self._latency_s))
                self._count(shut)
                before = await look(staged, units=False)
                seconds = min(self._latency_s, max(WINDOW_S, LATENCY_JOBS / common))
                opened = await open_loop(staged.client, work, common, seconds)
                after = await look(staged, units=False)
            window = self._window(staged, profile, opened, before, after)
            marks = [*window.marks, *filter(None, [opened.gave_up])]
            self.found.windows.append(msgspec.structs.replace(window, marks=marks))
            self.found.latencies.append(
                Latency(
                    candidate=staged.name,
                    profile=profile,
                    workers=workers,
                    rate=common,
                    jobs=opened.ended,
                    planned=percentiles(opened.samples_us),
                    sent=percentiles(opened.sent_us),
                    closed=percentiles(shut.samples_us),
                )
            )

    async def flood(self, candidate: str, profile: str, jobs: int) -> None:
        """So many jobs at once, with all workers."""
        staged = self._staged[candidate]
        self._tell(f"{candidate}, {profile}: {jobs} jobs at once")
        await staged.set_workers(staged.most)
        try:
            found = await load.flood(staged.client, self._works[candidate, profile], jobs)
        except StoreFull as full:
            self._tell(f"{candidate}, {profile}: {jobs} jobs at once were not all taken: {full.message}")
            while staged.client.open:  # each that was refused says so
                with contextlib.suppress(StoreFull):
                    await staged.client.settle()
            return
        self.found.floods.append(
            Flood(candidate=candidate, profile=profile, workers=staged.most, **found._asdict())
        )


def at_last(windows: Sequence[Window]) -> list[Window]:
    """The same at the end of all: where one was to be run again and no other counts, the last one does."""
    rows = [one for one in windows if one.loop == "closed"]
    known = {_point(one) for one in rows if one.counts}
    last = {_point(one): one.number for one in rows if _point(one) not in known}.values()
    return [msgspec.structs.replace(one, counts=one.counts or one.number in last) for one in windows]


def latency_s(whole_s: float) -> float:
    """How long each open loop may be in a run of `whole_s`."""
    return min(LATENCY_S_MAX, max(LATENCY_S_MIN, whole_s * LATENCY_PART))


def least_s(windows: int, works: int, whole_s: float) -> float:
    """What a run of `whole_s` takes at the least with so many windows, of candidates under profiles."""
    own_s = BEFORE_S + COSTS_S["diagnosis"] + COSTS_S["latency"] + latency_s(whole_s)
    return windows * COSTS_S["window"] + works * own_s + COSTS_S["raise"]


def cold_engines(engines: Collection[str], first: Told, before: Told, now: Told) -> set[str]:
    """Those in which a slot may not have ended a job yet: since `before` one ran in a slot that had none
    before, or fewer have ended since `first` than slots have run."""

    def is_warm(unit: str) -> bool:
        if unit not in before or unit not in now:
            return False
        one, began = now[unit], first.get(unit, before[unit])
        ended = sum(one.jobs.values()) - sum(began.jobs.values())
        return one.slots_run == before[unit].slots_run and ended >= max(1, one.slots_run)

    return {unit for unit in engines if not is_warm(unit)}


def _point(one: Window | Diagnosis) -> tuple[str, str, int]:
    return one.candidate, one.profile, one.workers


def _check_measurable(profile: str, alone: Loaded, reason: str) -> None:
    """Raises Usage: of jobs that outlast windows no rate is seen, and that of failures says nothing."""
    if not alone.ended:
        raise Usage(
            f"{profile}: one at a time, no two jobs ended within {alone.over - alone.began:.0f} s",
            hint=f"give jobs less to do: windows of {WINDOW_S:.0f} s show none that last longer",
        )
    if alone.failed == alone.recorded:
        raise Usage(
            f"{profile}: each of {alone.recorded} jobs failed: {reason or 'nobody knows why'}",
            hint="run one with `mvmci run`: what is measured has to succeed",
        )


def calibrate() -> int:
    """µs of processor time that a fixed piece of work takes now: where it takes longer, the machine is
    slower than it was, whatever runs on it."""
    began, total = time.thread_time_ns(), 0
    for place in range(CALIBRATION):
        total += place * place % 7
    return (time.thread_time_ns() - began) // 1000
