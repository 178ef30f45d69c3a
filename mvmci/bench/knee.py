"""The knee: where a curve of throughput leaves 90 % of what it would be if each worker added as much.

It is a measured thing: read between the two measured points on both sides of that, and not from a law that
was fitted to all of them. A law that is wrong gives a narrow interval that excludes the truth
(`mvmci.bench.law` is drawn beside). Its interval comes from drawing the repetitions of each point again.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Mapping, Sequence

import msgspec

SHARE = 0.9  # of linear
DRAWS = 1_000
LEVEL = 0.95
PRIOR = 4  # repetitions that the noise of all points together counts for at each of them

Curve = Mapping[int, Sequence[float]]  # workers, and the throughput of each repetition, jobs/s


class Knee(msgspec.Struct, frozen=True, kw_only=True):
    """In workers. `at` is None where the curve does not leave the line up to `most` workers, `high` where
    some draws do not; `between` are the measured points on both sides."""

    at: float | None
    low: float
    high: float | None
    between: tuple[int, int] | None
    most: int


def find_knee(curve: Curve, *, seed: int = 1, share: float = SHARE) -> Knee:
    """The knee of `curve`, whose least number of workers is what linear is told by."""
    means = {workers: statistics.fmean(rates) for workers, rates in sorted(curve.items())}
    at, most = crossing(efficiency(means), share), max(means)
    lower, upper = _band(curve, means, seed)
    low, last = crossing(lower, share), max((n for n, one in upper.items() if one >= share), default=None)
    high = (
        None if last in (None, most) else crossing({n: one for n, one in upper.items() if n >= last}, share)
    )
    return Knee(
        at=at,
        low=most if low is None else low,
        high=high,
        between=None if at is None else _around(means, at),
        most=most,
    )


def efficiency(means: Mapping[int, float]) -> dict[int, float]:
    """Of each number of workers, which part of linear it reaches; never more than a smaller number does.

    Noise alone lets a curve rise again: neighbours that do are taken together (isotonic regression, by
    pooling adjacent violators: Ayer et al. 1955).
    """
    least = min(means)
    blocks: list[tuple[float, int]] = []  # mean, and of how many points
    for workers in sorted(means):
        value, count = means[workers] * least / (means[least] * workers), 1
        while blocks and blocks[-1][0] < value:
            mean, several = blocks.pop()
            value, count = (mean * several + value * count) / (several + count), several + count
        blocks.append((value, count))
    values = [value for value, count in blocks for _ in range(count)]
    return dict(zip(sorted(means), values, strict=True))


def crossing(line: Mapping[int, float], share: float = SHARE) -> float | None:
    """Where `line` first passes below `share`, between two points; None where it does not."""
    points = list(line.items())
    for (left, above), (right, below) in itertools.pairwise(points):
        if below < share <= above:
            return left + (right - left) * (above - share) / (above - below)
    return None


def _around(means: Mapping[int, float], at: float) -> tuple[int, int]:
    return max(one for one in means if one <= at), min(one for one in means if one >= at)


def _band(curve: Curve, means: Mapping[int, float], seed: int) -> tuple[dict[int, float], dict[int, float]]:
    """Between what the efficiency lies at each point, by as much as repetitions differ.

    Where the band holds the share, the knee can be: that covers it as often as the band covers a point. A few
    repetitions say little of how noisy a point is, so that is weighed against the noise of all points, and
    is itself drawn. Deviations are drawn from all points together, in units of each one's own noise.
    """
    rng = random.Random(seed)  # noqa: S311 - no secret
    off = {n: [rate / means[n] - 1 for rate in rates] for n, rates in curve.items()}
    squares = {n: sum(value**2 for value in each) for n, each in off.items()}
    freedom = {n: len(each) - 1 for n, each in off.items()}
    pooled = sum(squares.values()) / max(1, sum(freedom.values()))
    noise = {n: math.sqrt((PRIOR * pooled + squares[n]) / (PRIOR + freedom[n])) for n in off}
    scaled = [
        value / noise[n] * math.sqrt(len(each) / freedom[n])
        for n, each in off.items()
        if noise[n] and freedom[n]
        for value in each
    ] or [0.0]
    least = min(means)
    drawn: dict[int, list[float]] = {n: [] for n in means}
    for _ in range(DRAWS):
        moved = {}
        for n, mean in means.items():
            known = min(PRIOR, sum(freedom.values())) + freedom[n]
            spread = noise[n] * math.sqrt(known / (2 * rng.gammavariate(known / 2, 1))) if known else 0.0
            moved[n] = mean * (1 + spread * statistics.fmean(rng.choices(scaled, k=len(curve[n]))))
        for n, rate in moved.items():
            drawn[n].append(rate * least / (moved[least] * n))
    tail = int(DRAWS * (1 - LEVEL) / 2)
    ordered = {n: sorted(values) for n, values in drawn.items()}
    return {n: one[tail] for n, one in ordered.items()}, {n: one[-1 - tail] for n, one in ordered.items()}
