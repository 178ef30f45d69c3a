"""Two laws of how throughput grows with workers, which are drawn beside what was measured. They give no knee.

Gunther's      X(N) = λN / (1 + σ(N-1) + κN(N-1)): waiting for each other, and keeping each other informed
               (N. Gunther, "A General Theory of Computational Scalability Based on Rational Functions", 2008)
a queue        jobs pass one station that serves them one by one, and wait elsewhere for a time that is theirs
               alone (exact mean value analysis: Reiser and Lavenberg, 1980)

How far a law is off is told by leaving out each point in turn: what the others say of it, against it. One
that is further off than `OFF_MOST` there is not shown at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mvmci.bench.report import Fitted

Points = Mapping[int, float]  # workers, and jobs/s
GRID, STEP_LEAST = 12, 1e-3
TINY = 1e-15
OFF_MOST = 0.2  # of what was measured
POINTS_LEAST = 4  # so that three say what the fourth is
DRAWN = 64  # points of a law, about


def fitted(points: Points, at_once: int) -> list[Fitted]:
    """The laws to draw beside `points`, of `at_once` jobs each: those that are not far off."""
    if len(points) < POINTS_LEAST:
        return []
    gunther, queue = fit_gunther(points), fit_queue(points, at_once)
    found = [
        Fitted(
            law="gunther",
            text=f"Gunther's law: {gunther.one:.1f} jobs/s of one worker, contention "
            f"{gunther.contention:.4f}, coherency {gunther.coherency:.5f}",
            rates=_drawn(gunther, points),
            off=left_out(points, fit_gunther),
        ),
        Fitted(
            law="queue",
            text=f"a queue: {queue.demand_s * 1e3:.1f} ms of one station a job, {queue.delay_s * 1e3:.0f} ms "
            "elsewhere",
            rates=_drawn(queue, points),
            off=left_out(points, lambda some: fit_queue(some, at_once)),
        ),
    ]
    return [law for law in found if law.off <= OFF_MOST]


def _drawn(law: Law, points: Points) -> dict[int, float]:
    least, most = min(points), max(points)
    return {n: law.rate(n) for n in sorted({*points, *range(least, most, 1 + (most - least) // DRAWN)})}


class Law(Protocol):
    """One that was fitted."""

    def rate(self, workers: float) -> float:
        """Jobs/s of so many workers."""


@dataclass(frozen=True)
class Gunther:
    """Gunther's law: the rate of one worker, contention σ and coherency κ."""

    one: float
    contention: float
    coherency: float

    def rate(self, workers: float) -> float:
        more = workers - 1
        return self.one * workers / (1 + self.contention * more + self.coherency * workers * more)


@dataclass(frozen=True)
class Queue:
    """A station that takes `demand_s` a job, `delay_s` elsewhere, and `at_once` jobs of each worker."""

    demand_s: float
    delay_s: float
    at_once: int

    def rate(self, workers: float) -> float:
        return self.rates([workers])[0]

    def rates(self, workers: Sequence[float]) -> list[float]:
        """Those of several, in one go: the times of so many jobs follow from those of one less."""
        waiting, by_jobs = 0.0, [0.0]
        for jobs in range(1, round(max(workers) * self.at_once) + 1):
            response_s = self.demand_s * (1 + waiting)
            by_jobs.append(jobs / (response_s + self.delay_s))
            waiting = by_jobs[-1] * response_s
        return [by_jobs[round(each * self.at_once)] for each in workers]


def fit_gunther(points: Points) -> Gunther:
    """The least sum of squared relative errors, with neither coefficient below zero.

    N/X is linear in three coefficients; where one would be negative, the best fit has it, or both, at zero.
    """
    best: tuple[float, list[float]] | None = None
    for used in ((0, 1, 2), (0, 1), (0, 2), (0,)):
        rows = [[rate / n * (1.0, n - 1.0, n * (n - 1.0))[k] for k in used] for n, rate in points.items()]
        solved = _least_squares(rows)
        if solved is None or min(solved) < 0:
            continue
        off = sum((math.fsum(map(math.prod, zip(row, solved, strict=True))) - 1) ** 2 for row in rows)
        if best is None or off < best[0] - TINY:
            coefficients = dict(zip(used, solved, strict=True))
            best = off, [coefficients.get(k, 0.0) for k in range(3)]
    assert best is not None
    first, contention, coherency = best[1]
    return Gunther(1 / first, contention / first, coherency / first)


def _least_squares(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """What brings each row's sum nearest to 1; None where the rows do not tell."""
    size = len(rows[0])
    matrix = [
        [math.fsum(row[i] * row[j] for row in rows) for j in range(size)]
        + [math.fsum(row[i] for row in rows)]
        for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda place: abs(matrix[place][i]))
        if abs(matrix[pivot][i]) < TINY:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for j in range(size):
            if j != i:
                factor = matrix[j][i] / matrix[i][i]
                matrix[j] = [x - factor * y for x, y in zip(matrix[j], matrix[i], strict=True)]
    return [matrix[i][size] / matrix[i][i] for i in range(size)]


def fit_queue(points: Points, at_once: int) -> Queue:
    """The least sum of squared relative errors: the best of a grid, refined."""

    def off(demand_s: float, delay_s: float) -> float:
        told = Queue(demand_s, delay_s, at_once).rates(list(points))
        return sum((one / rate - 1) ** 2 for one, rate in zip(told, points.values(), strict=True))

    least_s = 1 / max(points.values())  # no station is quicker than what has passed it
    alone_s = min(n * at_once / rate for n, rate in points.items())
    demands = (least_s * 0.2 * 1.3**place for place in range(GRID))
    delays = [alone_s * (0.2 + 0.1 * place) for place in range(GRID)]
    best = min((off(*both), *both) for both in itertools.product(demands, delays))
    step = 0.15
    while step > STEP_LEAST:
        _, demand_s, delay_s = best
        factors = itertools.product((1 - step, 1, 1 + step), repeat=2)
        near = ((demand_s * one, delay_s * other) for one, other in factors)
        found = min((off(*both), *both) for both in near)
        if found[0] < best[0] - TINY:
            best = found
        else:
            step /= 2
    return Queue(best[1], best[2], at_once)


def left_out(points: Points, fit: Callable[[Points], Law]) -> float:
    """The greatest relative error of what the other points say of one. At least `POINTS_LEAST` are needed."""
    return max(
        abs(fit({n: rate for n, rate in points.items() if n != one}).rate(one) / points[one] - 1)
        for one in points
    )
