"""The curves of a run, from its windows: rates, knees, laws, and ceilings where no knee was reached; and what
one does beside another."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from mvmci.bench.bottleneck import named
from mvmci.bench.knee import efficiency, find_knee, is_before, means_of, noise_of
from mvmci.bench.law import fitted
from mvmci.bench.report import CONTROL, Candidate, Ceiling, Curve, Diagnosis, Window

OWN = {("loop", "executor"), ("way", "executor")}  # bottlenecks that belong to an access

LEAST_DIFFERENCE = 0.05  # of a rate: less is noise, however many windows agree

Rates = dict[int, list[float]]  # jobs/s of each repetition, by workers


def draw(
    candidates: Sequence[Candidate], windows: Iterable[Window], diagnoses: Sequence[Diagnosis]
) -> list[Curve]:
    """One for each candidate and profile of which something ended, in the candidates' order: of closed loops
    alone, and of windows that count. Where an executor's own knee was not reached it has a ceiling."""
    rates: dict[tuple[str, str], Rates] = {}
    for one in windows:
        if one.loop == "closed" and one.counts:
            points = rates.setdefault((one.candidate, one.profile), {})
            points.setdefault(one.workers, []).append(one.rate)
    drawn = [
        _curve(one, profile, points)
        for one in candidates
        for (name, profile), points in rates.items()
        if name == one.name and any(points[min(points)])
    ]
    for place, curve in enumerate(drawn):
        rows = [one for one in diagnoses if (one.candidate, one.profile) == (curve.candidate, curve.profile)]
        if rows and not is_own(curve, control_of(curve, drawn, candidates), rows):
            last = max(rows, key=lambda one: one.workers)
            drawn[place] = msgspec.structs.replace(curve, ceiling=ceiling(last, curve.rates))
    return drawn


def control_of(curve: Curve, drawn: Iterable[Curve], candidates: Iterable[Candidate]) -> Curve | None:
    """The curve of the control in the same profile."""
    names = {one.name for one in candidates if one.access == CONTROL}
    return next((one for one in drawn if one.candidate in names and one.profile == curve.profile), None)


def is_own(curve: Curve, control: Curve | None, diagnoses: Iterable[Diagnosis]) -> bool:
    """Whether the knee is that of an executor: it comes before the control's, and what bounds it is an
    executor's. `diagnoses` are those of the curve."""
    if control is None or not is_before(curve.knee, control.knee):
        return False
    seen = seen_at(curve, diagnoses)
    found = named(seen.findings if seen else [])
    return (found.cause, found.whose) in OWN


def seen_at(curve: Curve | None, diagnoses: Iterable[Diagnosis]) -> Diagnosis | None:
    """What was seen where the knee is: at the first point beyond it where something was full; else at the
    first beyond it, or at the last of all."""
    rows = sorted(diagnoses, key=lambda one: one.workers)
    knee = curve.knee.at if curve is not None else None
    beyond = [one for one in rows if knee is not None and one.workers >= knee] or rows[-1:]
    return next((one for one in beyond if one.findings), next(iter(beyond), None))


def ceiling(seen: Diagnosis, rates: Mapping[int, Sequence[float]]) -> Ceiling | None:
    """That of one executor, by the time that a job took of its loop at the load of `seen`; None where there
    is no executor, or its loop did nothing. The first point of `rates` tells what a worker does."""
    ran = sum(one.ran for one in seen.evidence.units if one.role == "executor")
    if not seen.rate or not ran:
        return None
    loop_ms, least = 1e3 * ran / seen.rate, min(rates)
    one = statistics.fmean(rates[least]) / least
    return Ceiling(
        workers=seen.workers, loop_ms=loop_ms, rate=1e3 / loop_ms, workers_at_most=1e3 / loop_ms / one
    )


def rate_at(curve: Curve, workers: float) -> float | None:
    """Jobs/s of so many, straight between the measured points; None beyond them."""
    for (left, low), (right, high) in itertools.pairwise(sorted(curve.means.items())):
        if left <= workers <= right:
            return low + (high - low) * (workers - left) / (right - left)
    return curve.means.get(round(workers)) if workers == round(workers) else None


class Ratio(NamedTuple):
    """Of one rate to another, and by how much it may be off: two standard deviations."""

    at: float
    margin: float

    @property
    def differs(self) -> bool:
        """Whether there is a difference that is not noise."""
        return abs(self.at - 1) > max(self.margin, LEAST_DIFFERENCE)


def versus(one: Curve, other: Curve, workers: float) -> Ratio | None:
    """What `one` does of what `other` does; None where one of them was not measured with so many."""
    rates = rate_at(one, workers), rate_at(other, workers)
    if rates[0] is None or not rates[1]:
        return None
    off = math.hypot(*(_off(curve, workers) for curve in (one, other)))
    ratio = rates[0] / rates[1]
    return Ratio(ratio, 2 * off * ratio)


def most_of_both(one: Curve, other: Curve) -> int:
    """The most workers with which both were measured; 0 for none."""
    return max(one.means.keys() & other.means.keys(), default=0)


def _off(curve: Curve, workers: float) -> float:
    """What the rate of so many is off by, relative: as the worse known of its neighbours."""
    noise = noise_of(curve.rates)
    left = max((n for n in noise if n <= workers), default=min(noise))
    right = min((n for n in noise if n >= workers), default=max(noise))
    return max(noise[n] / math.sqrt(len(curve.rates[n])) for n in (left, right))


def _curve(candidate: Candidate, profile: str, rates: Rates) -> Curve:
    means = means_of(rates)
    return Curve(
        candidate=candidate.name,
        profile=profile,
        slots=candidate.slots,
        rates=dict(sorted(rates.items())),
        means=means,
        efficiency=efficiency(means),
        knee=find_knee(rates),
        laws=fitted({n: rate for n, rate in means.items() if rate}, candidate.slots),
    )
