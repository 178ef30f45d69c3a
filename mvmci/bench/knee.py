"""The knee: where a curve of throughput leaves 90 % of what it would be if each worker added as much.

It is a measured thing: where the straight line between the two measured points on both sides of it crosses
that, and not read from a law that was fitted to all points. A law that is wrong gives a narrow interval that
excludes the truth (`mvmci.bench.law` is drawn beside).

The interval says where the curve itself may cross. For how well a point is known the repetitions are drawn
again (B. Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979). Between two points nothing was
measured, and all that is taken for granted there is that more workers never do less in all, and that none
adds more than the one before it. So the interval never leaves the measured points.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
from collections.abc import Mapping, Sequence

import msgspec

SHARE = 0.9  # of linear
# Of so many draws of a point the five least and the five greatest are left out: 2.5 %, and not 5 %. Points
# are added where a curve seems to cross, so chance has more than one go.
DRAWS, TAIL = 399, 5
EXPECTED, EXPECTED_FOR = 0.05, 2  # what one window is off by, before anything is known, and its repetitions
PRIOR = 4  # repetitions that the noise of the points near it counts for at each point
WIDE = 0.25  # of the knee: points on both sides of it that are further apart get another between them

Curve = Mapping[int, Sequence[float]]  # workers, and the throughput of each repetition, jobs/s


class Knee(msgspec.Struct, frozen=True, kw_only=True):
    """In workers. `at` is None where the curve does not leave the line up to `most` workers, `high` where
    that cannot be excluded; `between` are the measured points on both sides."""

    at: float | None
    low: float
    high: float | None
    between: tuple[int, int] | None
    most: int

    @property
    def width(self) -> float:
        """Of the interval, as a part of the knee."""
        return ((self.high or self.most) - self.low) / (self.at or self.most)


def find_knee(curve: Curve, *, seed: int = 1, share: float = SHARE) -> Knee:
    """The knee of `curve`, whose least number of workers is what linear is told by. Raises ValueError where
    that did nothing."""
    means = means_of(curve)
    lower, upper = _band(curve, seed)
    most, at = max(means), crossing(efficiency(means), share)
    surely_above = max(n for n, reached in lower.items() if reached >= share)
    low = crossing({n: reached for n, reached in lower.items() if n >= surely_above}, share)
    surely_below = min((n for n, reached in upper.items() if reached < share), default=None)
    high = None if surely_below is None else _at_most(upper, surely_below, share)
    return Knee(
        at=at,
        low=min(most if low is None else low, at or most),
        high=None if high is None else max(high, at or 0.0),
        between=None if at is None else _around(means, at),
        most=most,
    )


def is_before(one: Knee, other: Knee) -> bool:
    """Whether `one` is surely the earlier: each lies outside of the other's interval."""
    if one.at is None or one.high is None:
        return False
    return one.at < other.low and one.high < (other.most if other.at is None else other.at)


def means_of(curve: Curve) -> dict[int, float]:
    """One rate for each number of workers. Raises ValueError where the least number of them did nothing."""
    means = {workers: statistics.fmean(rates) for workers, rates in sorted(curve.items())}
    if not means or means[min(means)] <= 0:
        raise ValueError("the least number of workers ended no job")
    return means


def efficiency(means: Mapping[int, float]) -> dict[int, float]:
    """Of each number of workers, which part of linear it reaches; never more than a smaller number does.

    Noise alone lets a curve rise again: neighbours that do are taken together (isotonic regression, by
    pooling adjacent violators: Ayer et al., "An Empirical Distribution Function for Sampling with Incomplete
    Information", 1955).
    """
    blocks: list[tuple[float, int]] = []  # mean, and of how many points
    for value in _of_linear(means).values():
        count = 1
        while blocks and blocks[-1][0] < value:
            mean, several = blocks.pop()
            value, count = (mean * several + value * count) / (several + count), several + count
        blocks.append((value, count))
    values = [value for value, count in blocks for _ in range(count)]
    return dict(zip(sorted(means), values, strict=True))


def crossing(line: Mapping[int, float], share: float = SHARE) -> float | None:
    """Where throughput, straight between the points of `line`, first falls below `share` of linear; None
    where it does not. `line` has the part of linear that each number of workers reaches."""
    beyond = [(workers, workers * (reached - share)) for workers, reached in line.items()]
    for (left, above), (right, below) in itertools.pairwise(beyond):
        if below < 0 <= above:
            return left + (right - left) * above / (above - below)
    return None


def next_workers(curve: Curve, most: int, *, share: float = SHARE) -> int:
    """Which number of workers is to be measured next, so that the interval of the knee narrows most.

    Twice as many, up to `most`, while the curve does not leave the line; the middle between points that are
    far from each other; else the one whose repetition teaches most among those that could be on either side.
    """
    knee = find_knee(curve, share=share)
    if knee.between is None and knee.most < most:
        return min(2 * knee.most, most)
    if knee.at is not None and knee.between is not None:
        left, right = knee.between
        if right - left > max(1.0, WIDE * knee.at):
            return (left + right) // 2
    lower, upper = _band(curve, 1)
    undecided = [n for n in curve if lower[n] < share <= upper[n]]
    noise = noise_of(curve)
    deciding: set[int] = {min(curve), *(knee.between or (knee.most,)), *undecided}
    return max(sorted(deciding), key=lambda n: noise[n] / math.sqrt(len(curve[n]) * (len(curve[n]) + 1)))


def _of_linear(means: Mapping[int, float]) -> dict[int, float]:
    least = min(means)
    return {workers: means[workers] * least / (means[least] * workers) for workers in sorted(means)}


def _around(means: Mapping[int, float], at: float) -> tuple[int, int]:
    return max(one for one in means if one <= at), min(one for one in means if one >= at)


def _at_most(upper: Mapping[int, float], below: int, share: float) -> float:
    """Where a curve that is below `share` at `below`, and may not be at the point before, crosses at the
    latest: nowhere between did it do more in all than at `below`."""
    return max(upper[below] * below / share, *(n for n in upper if n < below))


def _band(curve: Curve, seed: int) -> tuple[dict[int, float], dict[int, float]]:
    """Between what parts of linear each point lies, by as much as repetitions differ.

    Where the band holds the share, the knee can be: that covers it as often as the band covers a point. A few
    repetitions say little of how noisy a point is, so that is itself drawn. Deviations are drawn from all
    points together, in units of each one's own noise.
    """
    means, noise = means_of(curve), noise_of(curve)
    scaled = [-1.0, 1.0]  # as is expected of noise before anything is known
    for n, rates in sorted(curve.items()):
        if len(rates) > 1 and means[n]:
            unit = noise[n] * means[n] * math.sqrt(1 - 1 / len(rates))
            scaled += [(rate - means[n]) / unit for rate in rates]
    rng = random.Random(seed)  # noqa: S311 - no secret
    drawn: dict[int, list[float]] = {}
    for n, rates in sorted(curve.items()):
        picked = iter(rng.choices(scaled, k=DRAWS * len(rates)))
        together = (sum(each) / len(rates) for each in zip(*[picked] * len(rates), strict=True))
        freedom = sum(len(curve[other]) - 1 for other in _near(curve, n))
        spreads = _spreads(min(PRIOR, EXPECTED_FOR + freedom) + len(rates) - 1)
        drawn[n] = [math.exp(noise[n] * spread * off) for spread, off in zip(spreads, together, strict=True)]
    least = min(means)
    lower, upper = {least: 1.0}, {least: 1.0}
    for n, reached in itertools.islice(_of_linear(means).items(), 1, None):
        ratios = sorted(one / other for one, other in zip(drawn[n], drawn[least], strict=True))
        lower[n], upper[n] = reached * ratios[TAIL], reached * ratios[-1 - TAIL]
    return lower, upper


def noise_of(curve: Curve) -> dict[int, float]:
    """What one window of each number of workers is off by: standard deviations, relative.

    What few repetitions say is weighed against the noise of the points near it. That of others says little:
    a machine that is itself at times slower is seen in windows that fill it, and in no others.
    """
    means = means_of(curve)
    squares = {
        n: sum((rate / means[n] - 1) ** 2 for rate in rates) if means[n] else 0.0
        for n, rates in curve.items()
    }
    freedom = {n: len(rates) - 1 for n, rates in curve.items()}
    noise = {}
    for n in curve:
        near = _near(curve, n)
        known = EXPECTED_FOR + sum(freedom[one] for one in near)
        of_near = (EXPECTED_FOR * EXPECTED**2 + sum(squares[one] for one in near)) / known
        noise[n] = math.sqrt((PRIOR * of_near + squares[n]) / (PRIOR + freedom[n]))
    return noise


def _near(curve: Curve, workers: int) -> list[int]:
    """The points with half to twice as many workers."""
    return [n for n in curve if workers <= 2 * n and n <= 2 * workers]


@functools.cache
def _spreads(freedom: int) -> Sequence[float]:
    """For each draw, how many times its estimate the true noise is: by a chi-square of that freedom."""
    rng = random.Random(freedom)  # noqa: S311 - no secret
    return [math.sqrt(freedom / 2 / rng.gammavariate(freedom / 2, 1)) for _ in range(DRAWS)]
