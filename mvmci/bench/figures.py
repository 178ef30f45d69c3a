"""What a report says, as people read it on a terminal and on the page: numbers, names, and what is whose."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Protocol, TypeVar

from mvmci.bench.bottleneck import Finding, named
from mvmci.bench.curves import rate_at, seen_at
from mvmci.bench.knee import Knee
from mvmci.bench.report import (
    CONTROL,
    Candidate,
    Capacity,
    Counted,
    Curve,
    Diagnosis,
    Life,
    MachineFacts,
    Report,
    Window,
)
from mvmci.jobs.times import WORDS

CAUSES = {  # `mvmci.bench.bottleneck`; {} is whose it is
    "generator": "load generator",
    "memory": "memory",
    "others": "other programs",
    "quota": "{}'s quota",
    "stopped": "stopped {}",
    "network": "network",
    "way": "orders' way",
    "sync": "{}'s disk",
    "slots": "{}'s slots",
    "processors": "processors",
    "loop": "{}'s loop",
    "nothing": "nothing is full",
}
STANDS = {True: "confirmed", False: "withdrawn", None: "likely"}
NONE = "–"


def number(value: float | None) -> str:
    """Two or three digits that count, and all before the point: `0.63`, `16.3`, `1,321`."""
    if value is None or not math.isfinite(value):
        return NONE
    size = abs(value)
    return f"{value:,.{0 if size >= 99.95 or not size else 1 if size >= 0.995 else 2}f}"


def given(value: float) -> str:
    """A number that was set, and not measured: `60`, `2.5`."""
    return number(value) if value % 1 else f"{value:,.0f}"


def in_bytes(count: float) -> str:
    """`512 bytes`, `5.20 kB`, `240 MB`."""
    steps = min(4, int(math.log10(max(count, 1)) / 3))
    return f"{number(count / 1000**steps)} {('bytes', 'kB', 'MB', 'GB', 'TB')[steps]}"


def in_minutes(seconds: float) -> str:
    """`14 min 31 s`, `15 min`, `40 s`."""
    full, rest = divmod(round(seconds), 60)
    return " ".join([f"{full} min"] * bool(full) + [f"{rest} s"] * bool(rest or not full))


def several(count: int, name: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count} {name}{'s' * (count != 1)}"


def in_workers(knee: Knee) -> str:
    """Where the knee is, with its interval: `16.3 (5.7–19.4)`, `over 48 (from 31.0)`."""
    over = f"over {knee.most}"
    if knee.at is None:
        return f"{over} (from {knee.low:.1f})" if knee.low < knee.most else over
    return f"{knee.at:.1f} ({knee.low:.1f}–{over if knee.high is None else f'{knee.high:.1f}'})"


def in_jobs(curve: Curve | None) -> float | None:
    """Where the knee is, in jobs at once."""
    return None if curve is None or curve.knee.at is None else curve.knee.at * curve.slots


def in_rate(curve: Curve | None) -> float | None:
    """Where the knee is, in jobs/s, between what was measured on both sides of it."""
    return None if curve is None or curve.knee.at is None else rate_at(curve, curve.knee.at)


def cause(found: Finding) -> str:
    """What was found, and whose it is: `executor's loop`."""
    return CAUSES.get(found.cause, found.cause).replace("{}", found.whose)


def bottleneck(diagnosis: Diagnosis | None) -> tuple[str, str]:
    """What bounds it, and how that stands, with what was withdrawn."""
    if diagnosis is None:
        return NONE, ""
    one = named(diagnosis.findings)
    if one.cause == "nothing":
        return cause(one), "needs more load"
    withdrawn = [f"not {each.cause}" for each in diagnosis.findings if each.stands is False]
    return cause(one), ", ".join([STANDS[one.stands]] * (one.stands is not False) + withdrawn)


def anchor(figure: str) -> str:
    """The id of a figure on the page, whatever its candidate is called."""
    return re.sub(r"[^A-Za-z0-9._/-]", lambda found: f"~{ord(found[0]):x}~", figure)


class OfCandidate(Protocol):
    """Part of a report that is of one candidate and one profile."""

    @property
    def candidate(self) -> str: ...

    @property
    def profile(self) -> str: ...


Part = TypeVar("Part", bound=OfCandidate)


def of(parts: Iterable[Part], candidate: str, profile: str) -> list[Part]:
    """Those of one candidate and one profile."""
    return [one for one in parts if (one.candidate, one.profile) == (candidate, profile)]


def first_of(parts: Iterable[Part], candidate: str, profile: str) -> Part | None:
    """The first of them, if there is one."""
    return next(iter(of(parts, candidate, profile)), None)


def in_order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The control first."""
    return sorted(candidates, key=lambda one: one.access != CONTROL)


def at_knee(report: Report, candidate: str, profile: str) -> Diagnosis | None:
    """What was seen where the knee is."""
    curve = first_of(report.curves, candidate, profile)
    return seen_at(curve, of(report.diagnoses, candidate, profile))


def lives(report: Report, candidate: str, profile: str) -> tuple[Life | None, Life | None]:
    """Of a job alone, and of one among the most."""
    rows = of(report.lives, candidate, profile)
    loaded = max((one for one in rows if not one.alone), key=lambda one: one.workers, default=None)
    return next((one for one in rows if one.alone), None), loaded


def parts(told: Iterable[Life | None], least: float = 0.0) -> list[str]:
    """The parts that are told of some lives: those which in one of them are more than that share of it."""
    some = [(one.parts, sum(one.parts.values()) * least) for one in told if one is not None]
    names = [*WORDS, *sorted({name for each, _ in some for name in each} - WORDS.keys())]
    return [name for name in names if any(each.get(name, 0.0) > bound for each, bound in some)]


def set_aside(report: Report) -> tuple[list[Window], list[Window]]:
    """Windows with something against them: those that were run again, and those that count nevertheless."""
    marked = [one for one in report.windows if one.marks or not one.counts]
    return [one for one in marked if not one.counts], [one for one in marked if one.counts]


CAPACITY = ("profile", "jobs/s", "workers", "executors", "cores", "memory", "broker's disk a day")
BEYOND = "!"  # behind what is more than was measured


def capacity(row: Capacity, candidate: Candidate) -> tuple[str, ...]:
    """A row of `CAPACITY`. More executors than an access can have are those of a pool."""
    is_pool = row.executors > 1 == candidate.executors
    return (
        row.profile,
        given(row.rate),
        f"{row.workers:,}{f' {BEYOND}' * row.beyond}",
        f"{row.executors}{' (pool)' * is_pool}",
        number(row.cores),
        in_bytes(row.memory_bytes),
        in_bytes(row.disk_bytes_a_day),
    )


def machine(facts: MachineFacts) -> str:
    """A machine in a line, as far as it is known."""
    told = (
        f"{facts.processors} × {facts.model or 'processor'}",
        in_bytes(facts.memory_bytes),
        facts.kernel,
        f"Python {facts.python}" if facts.python else "",
        f"nats-server {facts.nats}" if facts.nats else "",
        facts.disk,
        f"a write on disk in {number(facts.sync_ms)} ms" if facts.sync_ms else "",
    )
    return f"{facts.name}: {', '.join(filter(None, told))}"


def counts(counted: Counted) -> str:
    """The jobs of the run by their journals, and as the load counted."""
    return (
        f"{counted.submitted:,} jobs were submitted. By their journals {counted.ended_once:,} ended once "
        f"each, {counted.lost:,} were lost and {counted.twice:,} ended twice; {counted.in_windows:,} ended "
        f"in a window, where the load counted {counted.heard:,}."
        + f" Of {counted.open:,} that were open when it was cut no more is known."
        * bool(counted.open)
    )
