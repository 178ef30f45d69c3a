"""`mvmci bench` from cluster files to a report: everything is brought up, measured, judged and taken down."""

from __future__ import annotations

import contextlib
import math
import platform
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
from mvmci.bench.curves import draw
from mvmci.bench.points import ROUNDS, Points
from mvmci.bench.profiles import Profile, prepare
from mvmci.bench.report import Counted, MachineFacts, Report, Verdict
from mvmci.bench.run import SETTLE_S, WINDOW_S, Run
from mvmci.bench.stage import Staged, Wanted, joined, read_candidates, staged
from mvmci.bench.verdict import decide
from mvmci.config.quantity import format_duration
from mvmci.deploy.state import ClusterState
from mvmci.errors import Usage
from mvmci.system import usage
from mvmci.system.ports import outward_address

WORKERS = (1, 2, 4, 8, 16, 32)
WORKER_BYTES = 80 << 20  # with its slots, of which some pages are shared
# Profiles that a few workers bring to what the machine has: they tell what the way to an engine costs.
WITHOUT_KNEE = ("light", "command", "cpu", "memory", "tree")
WITHOUT_KNEE_WORKERS = (1, 2)
STEPS_S = 22.0  # of one candidate under one profile, besides windows
UP_S, WORKER_S = 3.0, 0.25  # to bring a cluster up, and each worker of it


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


async def bench(root: Path, options: Options, tell: Callable[[str], None]) -> Report:
    """Measure the files. Raises BadTopology, Usage, and what `up` does."""
    found, slots = read_candidates(options.files, slots=options.slots)
    workers = _workers(options, len(found), tell)
    levels = {name: _levels(name, workers) for name in options.profiles}
    _check_budget(options, len(found), levels)
    files = dict(zip(found, options.files, strict=False))
    is_local = all(one.runtime == "local" for one in found.values())
    clock = _Clock()
    with _service(options.profiles, is_local=is_local) as url:
        http = [f"{url}*"] if url else []
        wanted = Wanted(workers=max(workers), slots=slots, http=http, as_is=options.as_is)
        async with staged(root, found, files, wanted, tell) as up:
            return await _measure(up, options, levels, url, clock, tell)


async def bench_cluster(root: Path, cluster: str, options: Options, tell: Callable[[str], None]) -> Report:
    """Put load on a cluster that is up, as it is. Raises Usage, StoreUnavailable, TicketRefused."""
    if asks := [name for name, profile in options.profiles.items() if profile.needs_service]:
        raise Usage(
            f"{', '.join(asks)}: {cluster} does not allow what its jobs would ask for",
            hint="measure its file: then the bench allows it",
        )
    clock = _Clock()
    async with joined(ClusterState(root, cluster)) as one:
        levels = dict.fromkeys(options.profiles, (one.workers,))
        _check_budget(options, 1, levels)
        budget = format_duration(round(options.budget_s * 1000))
        tell(f"{cluster} gets load for up to {budget}; its jobs stay as long as all do")
        return await _measure([one], options, levels, "", clock, tell, against=cluster)


class _Clock:
    """When it began, by both clocks."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.at = datetime.now(UTC)


async def _measure(
    up: Sequence[Staged],
    options: Options,
    levels: Mapping[str, Sequence[int]],
    service_url: str,
    clock: _Clock,
    tell: Callable[[str], None],
    *,
    against: str = "",
) -> Report:
    works = {
        (one.name, name): await prepare(profile, one.client, service_url)
        for name, profile in options.profiles.items()
        for one in up
    }
    points = Points([one.name for one in up], levels, without_knee=WITHOUT_KNEE)
    run = Run(up, works, points, tell)
    await run.measure(clock.began + options.budget_s, rate=options.rate, floods=options.loads)
    counted = await _count(up, run)
    broker = await up[0].broker()
    nats = "" if broker is None else broker.version
    return _report(options, up, run, counted, _machine(run, nats), clock, against)


def _workers(options: Options, candidates: int, tell: Callable[[str], None]) -> Sequence[int]:
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


def _check_budget(options: Options, candidates: int, levels: Mapping[str, Sequence[int]]) -> None:
    """Raises Usage where not even every number of workers once fits."""
    rounds = {name: ROUNDS if name in WITHOUT_KNEE else 1 for name in levels}
    windows = candidates * sum(len(counts) * rounds[name] for name, counts in levels.items())
    up_s = candidates * (UP_S + WORKER_S * max(map(max, levels.values())))
    least_s = up_s + windows * (WINDOW_S + 2 * SETTLE_S) + candidates * len(levels) * STEPS_S
    if least_s > options.budget_s:
        minutes = math.ceil(least_s / 60)
        raise Usage(
            f"{candidates} clusters and {windows} windows take about {minutes}m, more than the budget of "
            f"{format_duration(round(options.budget_s * 1000))}",
            hint=f"--budget {minutes}m, or fewer files, profiles or --workers",
        )


@contextlib.contextmanager
def _service(profiles: Mapping[str, Profile], *, is_local: bool) -> Iterator[str]:
    """The URL of what jobs ask, where one of the profiles does."""
    if not any(profile.needs_service for profile in profiles.values()):
        yield ""
        return
    with service.serving("127.0.0.1" if is_local else outward_address() or "127.0.0.1") as url:
        yield url


async def _count(up: Sequence[Staged], run: Run) -> Counted:
    counts = [await one.client.count() for one in up]
    return Counted(
        submitted=sum(one.submitted for one in counts),
        ended_once=sum(one.ended_once for one in counts),
        lost=sum(one.lost for one in counts),
        twice=sum(one.twice for one in counts),
        in_windows=run.found.recorded,
        heard=run.found.heard,
    )


def _machine(run: Run, nats: str) -> MachineFacts:
    """This one."""
    found = usage.machine()
    times = sorted(one.calibration_us for one in run.found.windows if one.calibration_us) or [0]
    rest = next(iter(run.found.rest.values()))
    return MachineFacts(
        name=platform.node(),
        processors=found.processors,
        model=_field("/proc/cpuinfo", "model name"),
        memory_bytes=found.memory_bytes,
        kernel=platform.release(),
        python=platform.python_version(),
        nats=nats,
        sync_ms=rest.write_ms,
        calibration_us=[int(statistics.median(times)), times[0], times[-1]],
    )


def _field(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def as_shown(words: Sequence[str]) -> list[str]:
    """A command for a report, which is for others to read: of the environment of jobs it has the names."""
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.removeprefix("--env=").partition("=")
        if equals and (before == "--env" or word.startswith("--env=")):
            word = f"{'--env=' * word.startswith('--env=')}{name}=…"
        shown.append(word)
    return shown


def _report(
    options: Options,
    up: Sequence[Staged],
    run: Run,
    counted: Counted,
    machine: MachineFacts,
    clock: _Clock,
    against: str,
) -> Report:
    found = run.found
    candidates = [one.candidate for one in up]
    curves = draw(candidates, found.windows, found.diagnoses)
    report = Report(
        mvmci=__version__,
        command=shlex.join(as_shown(["mvmci", *sys.argv[1:]])),
        at=clock.at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        budget_s=options.budget_s,
        took_s=time.monotonic() - clock.began,
        against=against,
        machines=[machine],
        candidates=candidates,
        profiles={name: profile.about for name, profile in options.profiles.items()},
        asked={name: profile.asked for name, profile in options.profiles.items() if profile.asked},
        without_knee=[name for name in options.profiles if name in WITHOUT_KNEE],
        windows=found.windows,
        curves=curves,
        latencies=found.latencies,
        lives=found.lives,
        diagnoses=found.diagnoses,
        floods=found.floods,
        demands=found.demands,
        counted=counted,
        verdict=Verdict(sentences=()),
    )
    report = msgspec.structs.replace(report, capacity=list(capacities(report)))
    return msgspec.structs.replace(report, verdict=decide(report))
