"""What a rate of jobs needs, calculated from what was measured: never more than a plan, and marked as such.

Up to where a curve keeps 90 % of linear, workers are read from it. Beyond, each is taken to do what it did
there, on machines that have the processors for it; and of executors there are as many as carry the rate, each
what one was seen to carry or, where the machine ended first, nine tenths of its ceiling.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from mvmci.bench import figures
from mvmci.bench.judged import is_doubtful, is_failing
from mvmci.bench.knee import SHARE
from mvmci.bench.report import Candidate, Capacity, Curve, Demand, Report

RATES = tuple(10.0**power for power in range(-3, 6))  # jobs/s
LESS, FURTHER = 50, 10  # times what was measured: the least and the greatest rate that is told
FULL = 0.7  # of the time that processors are planned to be busy
DAY_S = 86_400


def capacities(report: Report) -> Iterator[Capacity]:
    """What round rates need, of all that was measured and has not too much against it."""
    by_name = {one.name: one for one in report.candidates}
    for profile in () if is_doubtful(report) else report.profiles:
        for curve in (one for one in report.curves if one.profile == profile):
            demand = figures.first_of(report.demands, curve.candidate, profile)
            if demand is not None and not is_failing(report, curve):
                yield from capacity(by_name[curve.candidate], curve, demand)


def capacity(candidate: Candidate, curve: Curve, demand: Demand) -> Iterator[Capacity]:
    """What round rates of these jobs need."""
    most = max(curve.means.values())
    for rate in (rate for rate in RATES if most / LESS <= rate <= FURTHER * most):
        workers, executors = workers_for(curve, rate), _executors(candidate, curve, rate)
        yield Capacity(
            candidate=candidate.name,
            profile=curve.profile,
            rate=rate,
            workers=workers,
            executors=executors,
            cores=rate * demand.cpu_ms / 1e3 / FULL,
            memory_bytes=workers * demand.worker_bytes + executors * demand.executor_bytes,
            disk_bytes_a_day=round(rate * DAY_S * demand.broker_bytes),
            beyond=rate > carried(curve),
        )


def carried(curve: Curve) -> float:
    """The rate up to which each worker added at least 90 % of what the first did, as far as was measured."""
    return figures.in_rate(curve) or curve.means[max(curve.means)]


def workers_for(curve: Curve, rate: float) -> int:
    """How many make that rate."""
    most = curve.knee.at or curve.knee.most
    points = [
        (0.0, 0.0),
        *((n, curve.means[n]) for n in sorted(curve.means) if n < most),
        (most, carried(curve)),
    ]
    for (left, low), (right, high) in itertools.pairwise(points):
        if rate <= high:
            return max(1, math.ceil(left + (right - left) * (rate - low) / (high - low)))
    return math.ceil(most * rate / carried(curve))


def pays_from_s(workers: int, slots: int, rate: float) -> float:
    """How long jobs must last, in seconds, for so many workers to be busy: any shorter ones would need a
    greater rate than the highest that was measured."""
    return workers * slots / rate


def _executors(candidate: Candidate, curve: Curve, rate: float) -> int:
    if not candidate.executors:
        return 0
    one = SHARE * curve.ceiling.rate if curve.ceiling else carried(curve) / candidate.executors
    return max(candidate.executors, math.ceil(rate / one))
