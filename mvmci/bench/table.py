"""What a terminal shows of a report: plain text of at most 100 columns, the verdict last.

A profile is one table with the candidates side by side: what is told of them is compared along a line. Where
more are told of than fit, the table goes on below, with the control in each of its parts.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from mvmci.bench import figures
from mvmci.bench.figures import NONE, first_of, given, number, several
from mvmci.bench.report import CONTROL, Candidate, Percentiles, Report, Window
from mvmci.jobs.times import WORDS
from mvmci.system.text import one_line

WIDTH, LABEL, CELL = 100, 20, 20
BESIDE = (WIDTH - LABEL) // CELL
MARKED_MOST = 4  # windows that are listed; the page lists all
PART_LEAST = 0.02  # of a job's time

Rows = Iterator[tuple[str, Sequence[str]]]  # a label, and a cell for each candidate
WIDTHS = (20, 9, 9, 11, 7, 10, 20)  # of the columns of `figures.CAPACITY`


def table(report: Report) -> str:
    """All of it, without a line's end behind the last."""
    parts = [*(_profile(report, name) for name in report.profiles), _run(report), _capacity(report)]
    return "\n\n".join(filter(None, map("\n".join, [*parts, _verdict(report)])))


def _verdict(report: Report) -> Iterator[str]:
    """The answer last, where who waited for it looks; it ends with what to do."""
    for one in report.verdict.sentences:
        yield from _wrapped(one.text)
    for one in report.verdict.unseen:
        yield from _wrapped(f"Not seen: {one.text}")
    if report.verdict.command:
        yield f"$ {one_line(report.verdict.command)}"


def _profile(report: Report, profile: str) -> Iterator[str]:
    yield from _wrapped(f"{profile.upper()}: {report.profiles[profile]}")
    candidates = figures.in_order(report.candidates)
    control, others = candidates[:1], candidates[1:]
    for first in range(0, len(others) or 1, BESIDE - 1):
        shown = [*control, *others[first : first + BESIDE - 1]]
        names = [f"{one.name} *" if one.access == CONTROL else one.name for one in shown]
        rows = itertools.chain.from_iterable(each(report, profile, shown) for each in ROWS)
        told = [(label, cells) for label, cells in rows if any(one not in ("", NONE) for one in cells)]
        yield from _aligned([("jobs/s, of linear", names), *told])


def _curves(report: Report, profile: str, shown: Sequence[Candidate]) -> Rows:
    curves = [first_of(report.curves, one.name, profile) for one in shown]
    for workers in sorted({n for one in curves if one is not None for n in one.means}):
        yield (
            several(workers, "worker"),
            [
                f"{number(one.means[workers])}  {min(1, one.efficiency.get(workers, 0)):4.0%}"
                if one is not None and workers in one.means
                else ""
                for one in curves
            ],
        )
    if profile in report.without_knee:
        return
    yield "knee, workers", [NONE if one is None else figures.in_workers(one.knee) for one in curves]
    yield "  jobs at once", [number(figures.in_jobs(one)) for one in curves]
    yield "  jobs/s", [number(figures.in_rate(one)) for one in curves]
    ceilings = [one and one.ceiling for one in curves]
    yield (
        "  calculated at most",
        [f"{one.workers_at_most:.1f}, {number(one.rate)}/s" if one else "" for one in ceilings],
    )


def _bottlenecks(report: Report, profile: str, shown: Sequence[Candidate]) -> Rows:
    told = [figures.bottleneck(figures.at_knee(report, one.name, profile)) for one in shown]
    yield "bottleneck", [name for name, _ in told]
    yield "", [stands for _, stands in told]


def _latencies(report: Report, profile: str, shown: Sequence[Candidate]) -> Rows:
    told = [first_of(report.latencies, one.name, profile) for one in shown]
    yield (
        "p50 / p99, planned",
        [f"{_both(one.planned)} at {given(one.rate)}/s" if one else "" for one in told],
    )
    yield "  as a closed loop", [_both(one.closed) if one else "" for one in told]


def _both(shown: Percentiles) -> str:
    return f"{number(shown.get('p50'))} / {number(shown.get('p99'))}"


def _lives(report: Report, profile: str, shown: Sequence[Candidate]) -> Rows:
    told = [figures.lives(report, one.name, profile) for one in shown]
    yield "ms, alone → loaded", [f"at {several(many.workers, 'worker')}" if many else "" for _, many in told]
    for part in figures.parts(itertools.chain.from_iterable(told), PART_LEAST):
        yield (
            f"  {WORDS.get(part, part)}",
            [" → ".join(number(one.parts.get(part, 0.0)) for one in both if one) for both in told],
        )


ROWS: Sequence[Callable[[Report, str, Sequence[Candidate]], Rows]] = (
    _curves,
    _bottlenecks,
    _latencies,
    _lives,
)


def _capacity(report: Report) -> Iterator[str]:
    """Of the candidate that the verdict is for; where there is none, of the control."""
    by_name = {one.name: one for one in figures.in_order(report.candidates)}
    chosen = report.verdict.candidate or next(iter(by_name), "")
    told = [figures.capacity(one, by_name[chosen]) for one in report.capacity if one.candidate == chosen]
    for row in (figures.CAPACITY, *told) if told else ():
        cells = [_cut(cell, width) for cell, width in zip(row, WIDTHS, strict=True)]
        yield "".join(
            f"{cell:{'>' if place else '<'}{width + 1}}"
            for place, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
        )
    if told:
        about = f"calculated for {chosen}; {figures.BEYOND} is beyond the knee"
        yield from _wrapped(about)


def _run(report: Report) -> Iterator[str]:
    if any(one.access == CONTROL for one in report.candidates):
        yield "* the control: it shares nothing, so what bends it is the machine"
    yield "loaded: two jobs for each slot, so half of them wait in the queue; an empty cell was not run"
    if any("p99" not in {**one.planned, **one.closed} for one in report.latencies):
        yield f"{NONE} too few jobs ended for that: p99 takes 1,000"
    again, stayed = figures.set_aside(report)
    if again or stayed:
        yield (
            f"{len(again)} of {len(report.windows)} windows were run again; {len(stayed)} that count have "
            f"something against them{':' * bool(stayed)}"
        )
    for one in stayed[:MARKED_MOST]:
        yield from _wrapped(f"  {_window(one)}")
    if len(stayed) > MARKED_MOST:
        yield f"  and {len(stayed) - MARKED_MOST} more"
    yield from _wrapped(figures.counts(report.counted))
    for machine in report.machines:
        yield from _wrapped(figures.machine(machine))
    yield from _wrapped(
        f"{report.at}, {figures.in_minutes(report.took_s)} of {figures.in_minutes(report.budget_s)}, "
        f"mvmci {report.mvmci}: {report.command}"
    )


def _window(one: Window) -> str:
    return f"{one.candidate}, {one.profile}, {several(one.workers, 'worker')}: {'; '.join(one.marks)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(one_line(text), WIDTH, subsequent_indent="  ")


def _aligned(rows: Iterable[tuple[str, Sequence[str]]]) -> Iterator[str]:
    for label, cells in rows:
        shown = (_cut(one, CELL - 1).rjust(CELL) for one in cells)
        yield (_cut(label, LABEL).ljust(LABEL) + "".join(shown)).rstrip()


def _cut(text: str, most: int) -> str:
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
