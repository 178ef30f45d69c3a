"""`mvmci bench` from cluster files to a report: everything is brought up, measured, judged and taken down."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from mvmci import __version__
from mvmci.bench import service
from mvmci.bench.capacity import capacities
from mvmci.bench.client import Count
from mvmci.bench.curves import draw
from mvmci.bench.evidence import machines
from mvmci.bench.points import ROUNDS, Points
from mvmci.bench.profiles import Profile, prepare
from mvmci.bench.report import Candidate, Counted, MachineFacts, Report
from mvmci.bench.run import Found, Run, at_last, least_s
from mvmci.bench.stage import Staged, Wanted, joined, read_candidates, staged
from mvmci.bench.verdict import decide
from mvmci.config.quantity import format_duration
from mvmci.deploy.state import ClusterState
from mvmci.errors import Usage
from mvmci.system import usage
from mvmci.system.ports import outward_address

Tell = Callable[[str], None]
Keep = Callable[[Report], None]

WORKERS = (1, 2, 4, 8, 16, 32)
WORKER_BYTES = 80 << 20  # with its slots, of which some pages are shared
# Profiles that a few workers bring to what the machine has: they tell what the way to an engine costs.
WITHOUT_KNEE = ("light", "command", "cpu", "memory", "tree")
WITHOUT_KNEE_WORKERS = (1, 2)
UP_S, WORKER_S = 3.0, 0.25  # to bring a cluster up, and each worker of it
DOWN_S, DOWN_SHARE = 3.0, 0.1  # to take all down and report: that, and a part of what it took to come up
CUT_S = 10.0  # for so long jobs are waited for when a run is cut


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is to be measured. No `workers`: as many as memory allows."""

    files: Sequence[Path]
    profiles: Mapping[str, Profile]
    workers: Sequence[int] = ()
    slots: int | None = None
    as_is: bool = False
    loads: Sequence[int] = ()
    rate: float | None = None
    budget_s: float


async def bench(root: Path, options: Options, tell: Tell, keep: Keep) -> None:
    """Measure the files. `keep` gets the report once all is down again; if something ends the run before its
    end, that of what was measured until then, if anything was.

    Raises BadTopology, Usage, what `up` does, and what ended it.
    """
    found, slots = read_candidates(options.files, slots=options.slots)
    workers = _workers(options, len(found), tell)
    levels = {name: _levels(name, workers) for name in options.profiles}
    _check_budget(options, len(found), levels, _up_and_down_s(len(found), max(workers)))
    files = dict(zip(found, options.files, strict=False))
    is_local = all(one.runtime == "local" for one in found.values())
    with _service(options.profiles, is_local=is_local) as url, _kept(options, tell, keep) as session:
        http = [f"{url}*"] if url else []
        wanted = Wanted(workers=max(workers), slots=slots, http=http, as_is=options.as_is)
        async with staged(root, found, files, wanted, tell) as up:
            await session.measure(up, levels, url)


async def bench_cluster(root: Path, cluster: str, options: Options, tell: Tell, keep: Keep) -> None:
    """Put load on a cluster that is up, as it is; `keep` as in `bench`.

    Raises Usage, StoreUnavailable, TicketRefused, and what ended it.
    """
    if asks := [name for name, profile in options.profiles.items() if profile.needs_service]:
        raise Usage(
            f"{', '.join(asks)}: {cluster} does not allow what its jobs would ask for",
            hint="measure its file: then the bench allows it",
        )
    with _kept(options, tell, keep) as session:
        async with joined(ClusterState(root, cluster)) as one:
            levels = dict.fromkeys(options.profiles, (one.workers,))
            _check_budget(options, 1, levels)
            budget = format_duration(round(options.budget_s * 1000))
            tell(f"{cluster} gets load for up to {budget}; its jobs stay as long as all do")
            await session.measure([one], levels, "", against=cluster)


@contextlib.contextmanager
def _kept(options: Options, tell: Tell, keep: Keep) -> Iterator[_Session]:
    """A session whose report is kept in the end, whatever that is."""
    session, cut = _Session(options, tell), ""
    try:
        yield session
    except BaseException as ended:
        if not session.is_done:
            cut = (
                "it was interrupted"
                if isinstance(ended, asyncio.CancelledError)
                else str(ended) or repr(ended)
            )
        raise
    finally:
        if session.found.windows:
            keep(session.report(cut))


class _Session:
    """One run of the bench, and what is known of it."""

    def __init__(self, options: Options, tell: Tell) -> None:
        self._options = options
        self._tell = tell
        self._began = time.monotonic()
        self._at = datetime.now(UTC)
        self._against = ""
        self._candidates: Sequence[Candidate] = ()
        self._machines: Sequence[MachineFacts] = ()
        self._counts: Sequence[Count] = ()
        self.found = Found()
        self.is_done = False

    async def measure(
        self,
        up: Sequence[Staged],
        levels: Mapping[str, Sequence[int]],
        service_url: str,
        *,
        against: str = "",
    ) -> None:
        """All of it, on candidates that are up. Raises MvmciError."""
        down_s = 0.0 if against else DOWN_S + DOWN_SHARE * (time.monotonic() - self._began)
        self._against, self._candidates = against, [one.candidate for one in up]
        self._machines = await machines(up)
        works = {
            (one.name, name): await prepare(profile, one.client, service_url)
            for name, profile in self._options.profiles.items()
            for one in up
        }
        points = Points([one.name for one in up], levels, without_knee=WITHOUT_KNEE)
        run = Run(up, works, points, self._tell)
        self.found = run.found
        ends_at = self._began + self._options.budget_s - down_s
        try:
            await run.measure(ends_at, rate=self._options.rate, floods=self._options.loads)
        except BaseException:
            self._counts = [await one.client.count_what_there_is(CUT_S) for one in up]
            raise
        self._counts = [await one.client.count() for one in up]
        self.is_done = True

    def report(self, cut: str) -> Report:
        """What it comes to now, if it was `cut` for some reason."""
        found, options = self.found, self._options
        windows = at_last(found.windows)
        report = Report(
            mvmci=__version__,
            command=shlex.join(as_shown(["mvmci", *sys.argv[1:]])),
            at=self._at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            budget_s=options.budget_s,
            took_s=time.monotonic() - self._began,
            cut=cut,
            against=self._against,
            machines=[_calibrated(one, found) if one.kernel else one for one in self._machines],
            candidates=self._candidates,
            profiles={name: profile.about for name, profile in options.profiles.items()},
            asked={name: profile.asked for name, profile in options.profiles.items() if profile.asked},
            without_knee=[name for name in options.profiles if name in WITHOUT_KNEE],
            windows=windows,
            curves=draw(self._candidates, windows, found.diagnoses),
            latencies=found.latencies,
            lives=found.lives,
            diagnoses=found.diagnoses,
            floods=found.floods,
            demands=found.demands,
            counted=self._counted(),
        )
        report = msgspec.structs.replace(report, capacity=list(capacities(report)))
        return msgspec.structs.replace(report, verdict=decide(report))

    def _counted(self) -> Counted:
        return Counted(
            submitted=sum(one.submitted for one in self._counts),
            ended_once=sum(one.ended_once for one in self._counts),
            lost=sum(one.lost for one in self._counts),
            twice=sum(one.twice for one in self._counts),
            open=sum(one.open for one in self._counts),
            in_windows=self.found.recorded,
            heard=self.found.heard,
        )


def _calibrated(here: MachineFacts, found: Found) -> MachineFacts:
    """What was measured of this machine, beside what it is."""
    times = sorted(one.calibration_us for one in found.windows if one.calibration_us) or [0]
    return msgspec.structs.replace(
        here,
        sync_ms=next((one.write_ms for one in found.rest.values()), 0.0),
        calibration_us=[int(statistics.median(times)), times[0], times[-1]],
    )


def _workers(options: Options, candidates: int, tell: Tell) -> Sequence[int]:
    """How many workers are measured: those that are told, else as far as memory goes."""
    room = usage.machine().free_bytes // (candidates * WORKER_BYTES)
    if options.workers:
        if max(options.workers) > room:
            tell(f"warning: memory may not do for {candidates} times {max(options.workers)} workers")
        return options.workers
    chosen = [count for count in WORKERS if count <= max(room, 1)]
    if len(chosen) < len(WORKERS):
        tell(f"memory does for up to {chosen[-1]} workers in each of {candidates} clusters")
    return chosen


def _levels(profile: str, workers: Sequence[int]) -> Sequence[int]:
    few = [count for count in workers if count <= max(WITHOUT_KNEE_WORKERS)]
    return few if profile in WITHOUT_KNEE and few else workers


def _up_and_down_s(candidates: int, workers: int) -> float:
    return DOWN_S + (1 + DOWN_SHARE) * candidates * (UP_S + WORKER_S * workers)


def _check_budget(
    options: Options, candidates: int, levels: Mapping[str, Sequence[int]], ends_s: float = 0.0
) -> None:
    """Raises Usage where not even every number of workers once fits. What it tells instead does."""
    windows, works = _windows(candidates, levels), candidates * len(levels)

    def takes_s(budget_s: float) -> float:
        return ends_s + least_s(windows, works, budget_s)

    if takes_s(options.budget_s) <= options.budget_s:
        return
    needed_s = 0.0
    while takes_s(needed_s) > needed_s:  # a longer run has longer steps
        needed_s += 10 if needed_s < 120 else 60
    clusters = f"{candidates} cluster{'s' * (candidates > 1)}"
    needed = format_duration(round(needed_s * 1000))
    raise Usage(
        f"{clusters} and {windows} window{'s' * (windows > 1)} take about {needed}, more than the budget of "
        f"{format_duration(round(options.budget_s * 1000))}",
        hint=f"--budget {needed}, or fewer files, profiles or --workers",
    )


def _windows(candidates: int, levels: Mapping[str, Sequence[int]]) -> int:
    """How many there are at the least."""
    rounds = {name: ROUNDS if name in WITHOUT_KNEE else 1 for name in levels}
    return candidates * sum(len(counts) * rounds[name] for name, counts in levels.items())


@contextlib.contextmanager
def _service(profiles: Mapping[str, Profile], *, is_local: bool) -> Iterator[str]:
    """The URL of what jobs ask, where one of the profiles does."""
    if not any(profile.needs_service for profile in profiles.values()):
        yield ""
        return
    with service.serving("127.0.0.1" if is_local else outward_address() or "127.0.0.1") as url:
        yield url


def as_shown(words: Sequence[str]) -> list[str]:
    """A command for a report, which is for others to read: of the environment of jobs it has the names."""
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.removeprefix("--env=").partition("=")
        if equals and (before == "--env" or word.startswith("--env=")):
            word = f"{'--env=' * word.startswith('--env=')}{name}=…"
        shown.append(word)
    return shown
