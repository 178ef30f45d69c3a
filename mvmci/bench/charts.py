"""The charts of the page. All are drawn for a column of half a page, so that letters are of one size.

Classes `k0` to `k5` are the colours of candidates, the control's first; `p-queue` and so on those of parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from mvmci.bench import figures
from mvmci.bench.bottleneck import LOOP_FULL, Loop
from mvmci.bench.figures import first_of, given, number
from mvmci.bench.judged import RULE
from mvmci.bench.knee import SHARE, Knee
from mvmci.bench.markup import Inside, Markup, tag
from mvmci.bench.report import CONTROL, Candidate, Curve, Diagnosis, Latency, Life, Percentiles, Report
from mvmci.bench.style import COLOURS
from mvmci.bench.svg import Scale, bar, dot, drawing, line, path, spread, text, ticks
from mvmci.jobs.times import WORDS

WIDTH, LEFT, RIGHT, TOP = 480, 44, 380, 14  # what lies between is the plot; names stand behind it
FLOOR = 250  # of a plot
NAME_CHARS = 13
APART = 15  # lines of text
TICKS_APART = 24
STROKES = {"gunther": "dashed", "queue": "station"}
UNITS_EACH = 2  # of a role are shown by themselves; the rest are one bar

Names = Sequence[Candidate]


def colour(candidates: Names, name: str) -> str:
    """The class of a candidate's colour; `candidates` are in order, the control first."""
    place = next((place for place, one in enumerate(candidates) if one.name == name), 0)
    return f"k{place if place < COLOURS else 1 + (place - 1) % (COLOURS - 1)}"


def answer(report: Report, profile: str, candidates: Names) -> Markup:
    """How many workers one executor of each keeps up with, with its interval, by what the rule asks."""
    curves = _curves(report, profile, candidates)
    executors = {one.name: max(1, one.executors) for one in candidates}
    knees = [_of_one(one.knee, executors[one.candidate]) for one in curves]
    x = Scale(1, max([3.0 * RULE[0].least, *(one.most for one in knees)]), 100, WIDTH - 110, log=True)
    ends = [x.high, *(one.least for one in RULE)]
    rows = [54 + place * 24 for place in range(len(curves))]

    def zones() -> Iterator[Inside]:
        for one, until in zip(RULE, ends, strict=False):
            middle = x(math.sqrt(max(1, one.least) * until))
            yield text(middle, 12, one.range, "small", "middle")
            yield text(middle, 28, "may stay" if one.stays else CONTROL, "small", "middle")
            yield line(x(until), 4, x(until), rows[-1] + 14, "rung")

    return drawing(
        WIDTH,
        rows[-1] + 36,
        f"Workers that one executor keeps up with, {profile}",
        "; ".join(
            f"{one.candidate}: {figures.in_workers(knee)}" for one, knee in zip(curves, knees, strict=True)
        ),
        list(zones()),
        [
            [
                text(
                    x.start - 10,
                    row + 4,
                    _short(one.candidate),
                    f"name {colour(candidates, one.candidate)}",
                    "end",
                ),
                _knee(knee, x, row, colour(candidates, one.candidate)),
                text(x.end + 8, row + 4, figures.in_workers(knee), "small"),
            ]
            for one, knee, row in zip(curves, knees, rows, strict=True)
        ],
        text(x.end, rows[-1] + 30, "workers for one executor", "small", "end"),
    )


def _of_one(knee: Knee, executors: int) -> Knee:
    """The knee of one of so many."""
    at, high = (None if one is None else one / executors for one in (knee.at, knee.high))
    return msgspec.structs.replace(
        knee, at=at, low=knee.low / executors, high=high, most=knee.most // executors
    )


def throughput(report: Report, profile: str, candidates: Names) -> Markup:
    """Jobs/s by workers: each repetition, the means, the knee, and the line on which the control began."""
    curves = _curves(report, profile, candidates)
    most = max(rate for one in curves for rate in one.means.values()) * 1.08
    x = Scale(0, max(one.knee.most for one in curves), LEFT, RIGHT)
    y = Scale(0, most, FLOOR, TOP)
    first = min(curves[0].means)
    one = curves[0].means[first] / first
    until = min(x.high, most / one)
    return drawing(
        WIDTH,
        FLOOR + 44,
        f"Jobs a second by workers, {profile}",
        _told(curves),
        _floor(x, ticks(x.high), "workers"),
        _rungs(y, ticks(most), "jobs/s"),
        line(x(0), y(0), x(until), y(one * until), "linear"),
        text(x(until) + 6, y(one * until) + 8, "linear", "small") if until < x.high else None,
        [_repetitions(each, x, y, colour(candidates, each.candidate)) for each in curves],
        [_mean(each, x, y, colour(candidates, each.candidate)) for each in curves],
        _names(
            candidates,
            [(each.candidate, y(list(each.means.values())[-1])) for each in curves],
            y(one * until) if until == x.high else None,
        ),
    )


def efficiency(report: Report, profile: str, candidates: Names) -> Markup:
    """What part of linear is left, by workers; below it where each passes 90 %, and in what interval."""
    curves = _curves(report, profile, candidates)
    least, most = min(min(one.means) for one in curves), max(one.knee.most for one in curves)
    x, y = Scale(least, most, LEFT, RIGHT, log=True), Scale(0, 1.05, FLOOR - 60, TOP)
    points = sorted({n for one in curves for n in one.means})
    rows = [FLOOR + place * 20 for place in range(len(curves))]
    knees = [
        _knee(one.knee, x, row, colour(candidates, one.candidate))
        for one, row in zip(curves, rows, strict=True)
    ]
    labels = [f"{_short(one.candidate, 10)} {_knee_told(one.knee)}" for one in curves]
    return drawing(
        WIDTH,
        rows[-1] + 20,
        f"Share of linear by workers, {profile}",
        "; ".join(
            f"{one.candidate}: 90% of linear at {figures.in_workers(one.knee)} workers" for one in curves
        ),
        _rungs(y, [0, 0.25, 0.5, 0.75, 1], "of linear", percent=True),
        _floor(x, _thinned(points, x), "workers", floor=FLOOR - 60),
        line(LEFT, y(SHARE), RIGHT, y(SHARE), "bound"),
        text(RIGHT + 6, y(SHARE) + 4, f"{SHARE:.0%}", "small"),
        [
            path(
                ((x(n), y(min(1, share))) for n, share in one.efficiency.items()),
                f"curve {colour(candidates, one.candidate)}",
            )
            for one in curves
        ],
        text(LEFT, FLOOR - 14, f"{SHARE:.0%} of linear ends at", "small"),
        knees,
        [text(RIGHT + 6, row + 4, label, "small") for label, row in zip(labels, rows, strict=True)],
    )


def fitted(curve: Curve, control: Curve | None, name: str) -> Markup:
    """One curve with the laws that were fitted to it, and the interval of its knee; the control behind."""
    width, right, floor = 270, 262, 160
    both = [curve, *([control] if control is not None and control is not curve else [])]
    x = Scale(0, max(one.knee.most for one in both), LEFT, right)
    drawn = [one.rates.values() for one in curve.laws] + [each for one in both for each in one.rates.values()]
    most = max(rate for rates in drawn for rate in rates) * 1.05
    y = Scale(0, most, floor, TOP)
    knee = curve.knee
    high = x.high if knee.high is None else knee.high
    return drawing(
        width,
        floor + 40,
        f"{curve.candidate}, {curve.profile}: measured, and what laws say",
        "; ".join(f"{one.law}: {one.text}" for one in curve.laws) or "no law was fitted",
        bar(x(knee.low), TOP, x(high) - x(knee.low), floor - TOP, f"band {name}"),
        _floor(x, ticks(x.high), "workers", right=right, floor=floor),
        _rungs(y, ticks(most, 4), "jobs/s", right=right),
        [path(_places(one.means, x, y), "curve behind") for one in both[1:]],
        [path(_places(one.rates, x, y), f"law {STROKES[one.law]} {name}") for one in curve.laws],
        [
            line(x(n), y(min(rates)), x(n), y(max(rates)), f"whisker {name}")
            for n, rates in curve.rates.items()
        ],
        _repetitions(curve, x, y, name),
        _mean(curve, x, y, name),
    )


def latency(told: Sequence[Latency], candidates: Names) -> Markup:
    """From the median to the last percentile that is told, from the planned moments and as a closed loop."""
    left, right, row = 100, WIDTH - 104, 44
    most = max(
        (ms for one in told for each in (one.planned, one.closed) for ms in each.values()), default=1.0
    )
    x, floor = Scale(0, most, left, right), 30 + row * len(told)

    def spans() -> Iterator[Inside]:
        for place, one in enumerate(told):
            y, name = 40 + place * row, colour(candidates, one.candidate)
            yield text(left - 8, y + 12, _short(one.candidate), None, "end")
            for shown, at, kind in ((one.planned, y, "planned"), (one.closed, y + 16, "closed")):
                if shown:
                    ends = min(shown.values()), max(shown.values())
                    yield line(x(ends[0]), at, x(ends[1]), at, f"span {kind} {name}")
                    yield [
                        dot(x(ms), at, 4, f"{kind} {name}", f"{key} {number(ms)} ms")
                        for key, ms in shown.items()
                    ]
                    last = f", {max(shown, key=shown.__getitem__)} {number(ends[1])}" * (len(shown) > 1)
                    yield text(x(ends[1]) + 9, at + 4, f"{number(ends[0])}{last}", "small")

    return drawing(
        WIDTH,
        floor + 40,
        "How long jobs take, ms",
        "; ".join(
            f"{one.candidate} at {given(one.rate)} jobs/s: {_percentiles(one.planned)}; as a closed loop "
            f"{_percentiles(one.closed)}"
            for one in told
        ),
        [
            dot(left + 4, 12, 4, "planned key"),
            text(left + 14, 16, "from the planned moment", "small"),
            dot(left + 212, 12, 4, "closed key"),
            text(left + 222, 16, "as a closed loop says", "small"),
        ],
        _floor(x, ticks(most, 4), "ms", left=left, right=right, floor=floor),
        list(spans()),
    )


def _percentiles(shown: Percentiles) -> str:
    return ", ".join(f"{name} {number(ms)}" for name, ms in shown.items()) or "too few jobs"


def life(told: Sequence[Life], candidates: Names) -> Markup:
    """Where the time of a job goes, one bar for each: alone, and among others."""
    left, right, row = 160, WIDTH - 44, 24
    x = Scale(0, max((sum(one.parts.values()) for one in told), default=1.0), left, right)
    names = figures.parts(told)
    tops, y = [], 8
    for before, one in zip(["", *(each.candidate for each in told)], told, strict=False):
        y += 10 * (before not in ("", one.candidate))
        tops.append(y)
        y += row

    def stacks() -> Iterator[Inside]:
        for one, top in zip(told, tops, strict=True):
            among = "alone" if one.alone else f"{one.workers} workers"
            yield text(left - 8, top + 13, among, "small", "end")
            if one.alone or len(told) == 1:
                yield text(0, top + 13, _short(one.candidate, 11))
            at = float(left)
            for part in names:
                ms = one.parts.get(part, 0.0)
                end = at + x(ms) - x(0)
                yield bar(at, top, end - at, 18, f"p-{part}", f"{WORDS.get(part, part)}: {number(ms)} ms")
                at = end
            yield text(at + 6, top + 13, f"{number(sum(one.parts.values()))}", "small")

    return drawing(
        WIDTH,
        y + 40,
        "Where the time of a job goes, ms",
        "; ".join(_life_told(one) for one in told),
        _floor(x, ticks(x.high, 4), "ms", left=left, right=right, floor=y),
        list(stacks()),
    )


def loops(diagnosis: Diagnosis) -> Markup:
    """Which part of the time each unit's loop ran, and which it waited for a processor."""
    shown = _folded([diagnosis.evidence.generator, *diagnosis.evidence.units])
    left, right, row = 150, WIDTH - 60, 22
    x, floor = Scale(0, 1, left, right), 30 + row * len(shown)

    def bars() -> Iterator[Inside]:
        for place, (name, ran, waited) in enumerate(shown):
            top = 30 + place * row
            yield text(left - 8, top + 12, _short(name, 20), "small", "end")
            yield bar(left, top, x(ran) - left, 14, "ran", f"ran {ran:.0%}")
            yield bar(x(ran), top, x(waited) - left, 14, "waited", f"waited {waited:.0%}")
            yield text(x(ran + waited) + 6, top + 12, f"{ran + waited:.0%}", "small")

    return drawing(
        WIDTH,
        floor + 24,
        f"{diagnosis.candidate}, {diagnosis.profile}: running and waiting by unit",
        "; ".join(f"{name} ran {ran:.0%} and waited {waited:.0%}" for name, ran, waited in shown),
        [
            bar(left, 4, 10, 10, "ran"),
            text(left + 16, 13, "ran", "small"),
            bar(left + 56, 4, 10, 10, "waited"),
            text(left + 72, 13, "waited for a processor", "small"),
        ],
        line(x(LOOP_FULL), 22, x(LOOP_FULL), floor, "bound"),
        [line(x(share), 22, x(share), floor, "rung") for share in (0, 0.5, 1)],
        [text(x(share), floor + 16, f"{share:.0%}", "small", "middle") for share in (0, 0.5, LOOP_FULL, 1)],
        list(bars()),
    )


def _curves(report: Report, profile: str, candidates: Names) -> list[Curve]:
    """Those of the profile, the control's first."""
    found = (first_of(report.curves, one.name, profile) for one in candidates)
    return [one for one in found if one is not None and one.means]


def _places(rates: dict[int, float], x: Scale, y: Scale) -> list[tuple[float, float]]:
    return [(x(n), y(rate)) for n, rate in sorted(rates.items())]


def _repetitions(curve: Curve, x: Scale, y: Scale, name: str) -> Inside:
    return [dot(x(n), y(rate), 2, f"repetition {name}") for n, rates in curve.rates.items() for rate in rates]


def _mean(curve: Curve, x: Scale, y: Scale, name: str) -> Inside:
    """The means as a line, and a ring where the knee is."""
    rate = figures.in_rate(curve)
    told = f"{curve.candidate}: 90% of linear at {figures.in_workers(curve.knee)} workers"
    return [
        path(_places(curve.means, x, y), f"curve {name}"),
        dot(x(curve.knee.at), y(rate), 5, f"ring {name}", told) if curve.knee.at and rate else None,
    ]


def _knee(knee: Knee, x: Scale, y: float, name: str) -> Inside:
    """Its interval as a line, which goes on to the end where nobody knows the end, and itself as a dot."""
    open_end = knee.at is None or knee.high is None
    end = x.end if open_end else x(min(knee.high or x.high, x.high))
    return [
        line(x.start, y, x.end, y, "rung"),
        line(x(max(knee.low, x.low)), y, end, y, f"span {name}"),
        tag("path", d=f"M{x.end - 6} {y - 4}l6 4l-6 4", class_=f"arrow {name}") if open_end else None,
        dot(x(max(knee.at, x.low)), y, 4.5, f"planned {name}") if knee.at is not None else None,
    ]


def _knee_told(knee: Knee) -> str:
    return f"> {knee.most}" if knee.at is None else f"{knee.at:.1f}"


def _names(candidates: Names, places: Sequence[tuple[str, float]], linear: float | None) -> Inside:
    """Names behind the ends of their curves, and behind that of the line where it ends beside them."""
    labels = [(_short(name), f"name {colour(candidates, name)}", y) for name, y in places]
    labels += [] if linear is None else [("linear", "small", linear)]
    moved = spread([y for *_, y in labels], APART, TOP, FLOOR)
    return [
        text(RIGHT + 8, y + 4, shown, class_) for (shown, class_, _), y in zip(labels, moved, strict=True)
    ]


def _short(name: str, most: int = NAME_CHARS) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _floor(
    x: Scale,
    at: Sequence[float],
    unit: str,
    *,
    left: float = LEFT,
    right: float = RIGHT,
    floor: float = FLOOR,
) -> Inside:
    """The axis at the bottom."""
    return [
        line(left, floor, right, floor, "axis"),
        [line(x(value), floor, x(value), floor + 4, "axis") for value in at],
        [text(x(value), floor + 18, given(value), "small", "middle") for value in at],
        text(right, floor + 34, unit, "small", "end"),
    ]


def _rungs(
    y: Scale, at: Sequence[float], unit: str, *, right: float = RIGHT, percent: bool = False
) -> Inside:
    """The axis at the left, with a line for each of its values."""
    return [
        [line(LEFT, y(value), right, y(value), "rung") for value in at if value],
        [
            text(LEFT - 6, y(value) + 4, f"{value:.0%}" if percent else given(value), "small", "end")
            for value in at
        ],
        text(0, TOP - 4, unit, "small"),
    ]


def _thinned(points: Sequence[int], x: Scale) -> list[int]:
    """Of the measured numbers of workers those for which there is room; always the last."""
    kept = list(points[-1:])
    for point in reversed(points[:-1]):
        if x(kept[0]) - x(point) >= TICKS_APART:
            kept.insert(0, point)
    return kept


def _told(curves: Sequence[Curve]) -> str:
    return "; ".join(
        f"{one.candidate}: " + ", ".join(f"{number(rate)} with {n}" for n, rate in one.means.items())
        for one in curves
    )


def _life_told(life: Life) -> str:
    among = "alone" if life.alone else f"with {life.workers} workers"
    return f"{life.candidate} {among}: " + ", ".join(
        f"{WORDS.get(part, part)} {number(ms)}" for part, ms in life.parts.items()
    )


def _folded(units: Sequence[Loop]) -> list[tuple[str, float, float]]:
    """Each unit's name and shares, the fullest first; the rest of a role that has many on average."""
    shown = []
    for role in dict.fromkeys(one.role for one in units):
        those = sorted((one for one in units if one.role == role), key=lambda one: -one.ran - one.waited)
        alone, rest = (
            (those, []) if len(those) <= UNITS_EACH + 1 else (those[:UNITS_EACH], those[UNITS_EACH:])
        )
        shown += [(one.unit, one.ran, one.waited) for one in alone]
        if rest:
            ran, waited = sum(one.ran for one in rest), sum(one.waited for one in rest)
            shown.append((f"{len(rest)} more {role}s", ran / len(rest), waited / len(rest)))
    return sorted(shown, key=lambda one: -one[1] - one[2])
