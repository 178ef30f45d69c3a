"""What a run of `mvmci bench` found: its JSON, from which the table, the page and the verdict are made.

A candidate is one cluster file that is measured; the control is one of access `per-worker`, where nothing is
shared: what bends it is the machine. A window is one stretch of load of one profile on one candidate with one
number of workers. Times are ms unless a name says otherwise, rates are jobs/s, shares are of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from mvmci import __version__
from mvmci.bench.bottleneck import Evidence, Finding
from mvmci.bench.knee import Knee
from mvmci.errors import Usage, VersionsDiffer

VERSION = 1  # of this schema: a field that means something else makes it another
DIGITS = 6  # that count, of a number that is not whole: no figure of a run is known better
CONTROL = "per-worker"  # the access of the control

Percentiles = dict[str, float]  # ms, by "p50", "p90", "p99", "p99.9"; none from too few jobs


def rate_of(ended: int, failed: int, seconds: float) -> float:
    """Jobs/s that succeeded: one that fails at once is no throughput."""
    return max(0, ended - failed) / seconds


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster file, as it was measured. `slots` are those of each worker, `changed` what was set otherwise
    than the file says, as `executors.slots: 64 instead of 4`. No `file`: the control that bench adds.

    `workers` are those of the file itself, in all; the control has those of the first file. `hosts` are where
    its workers and executors run: one that has others is measured on other machines.
    """

    name: str
    file: str = ""
    access: str
    runtime: str = "local"
    hosts: Sequence[str] = ()
    workers: int = 0
    slots: int
    executors: int = 0
    executor_slots: int = 0
    changed: Sequence[str] = ()


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of load, its raw samples, and what speaks against it.

    A closed loop keeps `at_once` jobs open, and each of its samples is from submit to end. An open loop
    submits by a plan of `planned` jobs/s, and its samples are from the moments that were planned, `sent_us`
    from those at which jobs were sent. One with `marks` was run again; it only `counts` where they stayed.
    """

    number: int  # in the order in which they were run
    candidate: str
    profile: str
    workers: int
    loop: Literal["closed", "open"]
    at_once: int
    planned: float = 0.0
    began_s: float  # since the run began
    seconds: float
    ended: int
    failed: int = 0
    samples_us: Sequence[int] = ()
    sent_us: Sequence[int] = ()
    late_ms: float = 0.0  # what makes the load was late by, median
    busy: float = 0.0  # of the processors of the fullest machine
    others: float = 0.0  # of it, by programs that are not of this cluster or this load
    calibration_us: int = 0  # of processor time that a fixed piece of work took, before or after: the longer
    marks: Sequence[str] = ()
    counts: bool = True

    @property
    def rate(self) -> float:
        """Jobs/s that succeeded."""
        return rate_of(self.ended, self.failed, self.seconds)


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """A law beside a curve: what it says at each number of workers, and how far it was off at a point that it
    was not told of, at most."""

    law: Literal["gunther", "queue"]
    text: str  # with its coefficients
    rates: dict[int, float]
    off: float


class Ceiling(msgspec.Struct, frozen=True, kw_only=True):
    """Calculated and not measured: the rate at which the loop of one executor would be full, from the time
    that it took a job at `workers`; and how many workers make that rate if each does as the first did."""

    workers: int
    loop_ms: float  # a job
    rate: float
    workers_at_most: float


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Throughput of one candidate by workers: the rates of all windows that count, and what follows."""

    candidate: str
    profile: str
    slots: int
    rates: dict[int, Sequence[float]]
    means: dict[int, float]
    efficiency: dict[int, float]  # of linear
    knee: Knee
    laws: Sequence[Fitted] = ()
    ceiling: Ceiling | None = None


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """At one rate: from the planned moments, from the sending, and what a closed loop says at that rate."""

    candidate: str
    profile: str
    workers: int
    rate: float
    jobs: int
    planned: Percentiles
    sent: Percentiles
    closed: Percentiles


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of a job goes, ms, means over `jobs` of them by their journals: `queue` and the parts of
    `mvmci.jobs.times.Times`. `alone`: one job at a time."""

    candidate: str
    profile: str
    workers: int
    alone: bool
    jobs: int
    parts: dict[str, float]


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen at one point, and what that means: causes first."""

    candidate: str
    profile: str
    workers: int
    rate: float
    evidence: Evidence
    findings: Sequence[Finding]


class Flood(msgspec.Struct, frozen=True, kw_only=True):
    """So many jobs submitted at once, and what became of them by their journals."""

    candidate: str
    profile: str
    workers: int
    jobs: int
    seconds: float
    succeeded: int
    failed: int
    lost: int
    twice: int


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What a job takes at `workers`, measured at that load."""

    candidate: str
    profile: str
    workers: int
    cpu_ms: float  # of processors, all units and the broker
    worker_bytes: int  # memory of one worker with its slots
    executor_bytes: int
    broker_bytes: int  # of its disk, a job


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a rate needs, calculated from the curve and the demand."""

    candidate: str
    profile: str
    rate: float
    workers: int
    executors: int
    cores: float
    memory_bytes: int
    disk_bytes_a_day: int
    beyond: bool = False  # more than was seen to be carried


class Sentence(msgspec.Struct, frozen=True, kw_only=True):
    """A sentence of the verdict, and the figures that it rests on: `curve/shared/waiting`,
    `diagnosis/shared/waiting`, `latency/…`, `life/…`, `flood/…`, `capacity/…`, `machine`, `windows`,
    `counted`."""

    text: str
    figures: Sequence[str] = ()


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, or why there is none. `access` is that to use, if the figures say one; `command` makes the
    move, or measures what would decide; `unseen` is what these machines cannot show, and which would."""

    access: str = ""
    candidate: str = ""
    sentences: Sequence[Sentence]
    unseen: Sequence[Sentence] = ()
    command: str = ""


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A machine of the run. `calibration_us` is the median of all windows, and what they lay between.

    `hosts` are those of the cluster files that are on it; none are on one that only made the load. Of a
    machine elsewhere, what its units do not tell is empty.
    """

    name: str
    hosts: Sequence[str] = ()
    processors: int
    model: str
    memory_bytes: int
    kernel: str
    python: str
    nats: str
    disk: str = ""  # the file system of the broker's store
    sync_ms: float = 0.0  # a lone write, until it is on disk
    calibration_us: Sequence[int] = ()


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """All jobs of the run by their journals, beside what the load counted. Of those that are `open` nothing
    is known but that they were submitted: the run was cut before they ended."""

    submitted: int
    ended_once: int
    lost: int
    twice: int
    open: int = 0
    in_windows: int  # ends whose stamp lies in a window, by the journals
    heard: int  # and as they were counted


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `cut` is why it ended before all was measured, in a few words; else it is empty."""

    version: int = VERSION
    mvmci: str
    command: str
    at: str  # when it began, RFC 3339
    budget_s: float
    took_s: float
    cut: str = ""
    against: str = ""  # the cluster that was up, where no file was given
    machines: Sequence[MachineFacts]
    candidates: Sequence[Candidate]
    profiles: dict[str, str]  # what each does, in a few words
    asked: dict[str, Sequence[str]] = {}  # by which options each is asked for, where not by --profile
    without_knee: Sequence[str] = ()  # profiles that tell what the way to an engine costs, and no knee
    windows: Sequence[Window]
    curves: Sequence[Curve]
    latencies: Sequence[Latency] = ()
    lives: Sequence[Life] = ()
    diagnoses: Sequence[Diagnosis] = ()
    floods: Sequence[Flood] = ()
    demands: Sequence[Demand] = ()
    capacity: Sequence[Capacity] = ()
    counted: Counted
    verdict: Verdict = Verdict(sentences=())  # drawn from all of the above, by `mvmci.bench.verdict`


def encode(report: Report) -> bytes:
    """The JSON of a report, raw samples included."""
    return msgspec.json.encode(_rounded(msgspec.to_builtins(report)))


def decode(data: bytes) -> Report:
    """The report whose JSON that is. Raises Usage for what is none, VersionsDiffer for a newer one."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if version == VERSION:
            return msgspec.json.decode(data, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Usage(
            f"that is no report of `mvmci bench`: {error}", hint="`mvmci bench FILE… --json` prints one."
        ) from None
    than = "newer" if version > VERSION else "older"
    raise VersionsDiffer(
        f"the report is {than} than this mvmci {__version__}: it is of version {version}, not {VERSION}",
        hint="show it with the program that wrote it, which it names as `mvmci`",
    )


class _Versioned(msgspec.Struct):
    """All that is read of a report before its version is known."""

    version: int


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.{DIGITS}g}")
        case dict():
            return {key: _rounded(one) for key, one in value.items()}
        case list() | tuple():
            return [_rounded(one) for one in value]
        case _:
            return value
