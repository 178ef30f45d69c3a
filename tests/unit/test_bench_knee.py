"""The knee is read between measured points, and its interval holds the true one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from mvmci.bench.knee import (
    SHARE,
    Knee,
    crossing,
    efficiency,
    find_knee,
    is_before,
    means_of,
    next_workers,
)

Shape = Callable[[float], float]  # throughput by workers, that of one worker is 1

POINTS = [1, 2, 4, 8, 16, 24, 32, 48]
# What `waiting` gave on two cores, jobs/s by workers of two slots, and where 90 % of linear ended.
WAITING = {
    "per-worker": ([19.4, 39.0, 77.1, 153, 231, 300, 429, 476, 514], 24.9),
    "shared": ([18.8, 37.3, 73.1, 142, 212, 273, 341, 392, 456], 16.3),
    "peer": ([19.0, 37.5, 75.3, 144, 202, 267, 375, 455, 584], 10.8),
}
SHAPES: dict[str, Shape] = {
    "linear, then no more": lambda n: min(n, 20),
    "linear, then hardly more": lambda n: min(n, 20 + 0.1 * (n - 20)),
    "slowly bending": lambda n: n / (1 + 0.012 * (n - 1)),
    "as Gunther's law": lambda n: n / (1 + 0.004 * (n - 1) + 0.0004 * n * (n - 1)),
    "as Gunther's law, early and with a peak": lambda n: n / (1 + 0.01 * (n - 1) + 0.01 * n * (n - 1)),
    "never bending": lambda n: n / (1 + 0.001 * (n - 1)),
}
NOISES = [0.02, 0.05, 0.1]


def exact(rates: Shape, points: list[int] = POINTS) -> dict[int, list[float]]:
    return {n: [15 * rates(n)] * 3 for n in points}


def measured(shape: Shape, noise: float, rng: random.Random, *, growing: bool) -> dict[int, list[float]]:
    """A run, of two to four repetitions at each point: as noisy everywhere, or ever more with workers."""
    return {
        n: [
            15
            * shape(n)
            * max(0.05, 1 + rng.gauss(0, noise * (0.4 + 0.6 * min(1, n / 16) if growing else 1)))
            for _ in range(rng.choice((2, 3, 4)))
        ]
        for n in POINTS
    }


def truth(shape: Shape) -> float | None:
    low, high = 1.0, float(POINTS[-1])
    if shape(high) >= SHARE * high:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if shape(middle) >= SHARE * middle else (low, middle)
    return low


def covered(runs: int, shape: Shape, noise: float, *, growing: bool) -> int:
    """Of so many runs, in how many the interval holds the truth; of a curve that never bends, that it may
    not."""
    rng, true, held = random.Random(f"{noise} {growing}"), truth(shape), 0
    for _ in range(runs):
        knee = find_knee(measured(shape, noise, rng, growing=growing))
        if true is None:
            held += knee.high is None
        else:
            held += knee.low <= true and (knee.high is None or true <= knee.high)
    return held


@pytest.mark.parametrize("access", WAITING)
def test_the_knee_is_where_the_line_between_two_measured_points_crosses_nine_tenths(access: str) -> None:
    rates, wanted = WAITING[access]
    curve = dict(zip([1, 2, 4, 8, 12, 16, 24, 32, 48], [[rate] for rate in rates], strict=True))
    knee = find_knee(curve)
    assert knee.at == pytest.approx(wanted, abs=0.05)
    assert knee.between is not None
    left, right = knee.between
    assert curve[left][0] / left >= SHARE * curve[1][0] > curve[right][0] / right
    assert left <= knee.at <= right


def test_linear_is_told_by_the_least_number_of_workers() -> None:
    curve = exact(lambda n: min(n, 20), [4, 8, 16, 32])
    assert efficiency(means_of(curve)) == pytest.approx({4: 1, 8: 1, 16: 1, 32: 20 / 32})
    assert find_knee(curve).at == pytest.approx(16 + 16 * 1.6 / 10.4)


def test_where_noise_lets_a_curve_rise_again_neighbours_are_taken_together() -> None:
    assert efficiency({1: 10, 2: 20, 4: 34, 8: 72, 16: 80}) == pytest.approx(
        {1: 1, 2: 1, 4: 0.875, 8: 0.875, 16: 0.5}
    )
    line = list(efficiency({1: 10, 2: 21, 4: 39, 8: 81}).values())
    assert line == sorted(line, reverse=True)


def test_a_curve_that_does_not_bend_has_no_knee_and_at_least_as_many_as_were_measured() -> None:
    knee = find_knee(exact(lambda n: n))
    assert (knee.at, knee.high, knee.between) == (None, None, None)
    assert knee.low == knee.most == 48
    assert knee.width == 0


@pytest.mark.parametrize("name", SHAPES)
def test_neither_the_knee_nor_its_interval_leaves_the_measured_points(name: str) -> None:
    rng = random.Random(3)
    for noise in (0.02, 0.1, 0.4):
        for growing in (True, False):
            knee = find_knee(measured(SHAPES[name], noise, rng, growing=growing))
            at = knee.most if knee.at is None else knee.at
            assert min(POINTS) <= knee.low <= at
            assert knee.high is None or at <= knee.high <= knee.most


def test_the_interval_spans_what_nobody_measured_between_two_points() -> None:
    """Exact figures, and yet the curve may cross anywhere between, if more workers never do less in all."""
    steady = {n: [15.0 * min(n, 20)] * 40 for n in POINTS}
    knee = find_knee(steady)
    assert knee.high is not None
    assert knee.low < 20 / SHARE < knee.high


def test_one_repetition_at_each_point_is_not_taken_for_certainty() -> None:
    for repetitions in (1, 2):
        knee = find_knee({n: [15 * SHAPES["slowly bending"](n)] * repetitions for n in POINTS})
        assert knee.width > 0.5


def test_more_repetitions_narrow_the_interval() -> None:
    rng = random.Random(2)
    shape = SHAPES["as Gunther's law"]
    many = {n: [15 * shape(n) * (1 + rng.gauss(0, 0.03)) for _ in range(40)] for n in POINTS}
    few = {n: rates[:3] for n, rates in many.items()}
    assert find_knee(many).width < find_knee(few).width


def test_the_same_figures_give_the_same_interval() -> None:
    curve = measured(SHAPES["slowly bending"], 0.05, random.Random(1), growing=False)
    assert find_knee(curve) == find_knee(dict(reversed(curve.items())))


def test_a_curve_whose_first_point_ended_nothing_is_none() -> None:
    for curve in ({1: [0.0], 2: [20.0]}, {}):
        with pytest.raises(ValueError, match="ended no job"):
            find_knee(curve)
    assert find_knee({1: [15.0], 2: [30.0], 4: [0.0]}).between == (2, 4)


def test_the_interval_holds_the_truth_in_93_of_100_runs() -> None:
    cells = [
        (shape, noise, growing) for shape in SHAPES.values() for noise in NOISES for growing in (True, False)
    ]
    runs = -(-1_000 // len(cells))
    held = [covered(runs, shape, noise, growing=growing) for shape, noise, growing in cells]
    assert sum(held) >= 0.93 * runs * len(cells)
    assert sum(held) >= 1_000 * 0.93


def test_points_are_added_upwards_until_the_curve_bends_or_there_are_no_more() -> None:
    curve = exact(lambda n: n, [1, 2, 4])
    assert next_workers(curve, 48) == 8
    assert next_workers(curve, 6) == 6
    assert next_workers(curve, 4) in (1, 4)


def test_a_wide_bracket_is_halved_and_then_its_points_are_repeated() -> None:
    curve = exact(lambda n: min(n, 20), [1, 2, 4, 8, 16, 32])
    for _ in range(30):
        workers = next_workers(curve, 32)
        curve.setdefault(workers, []).append(15 * min(workers, 20))
    knee = find_knee(curve)
    assert knee.between is not None
    assert knee.between[1] - knee.between[0] <= 0.25 * 20 / SHARE
    assert {len(curve[workers]) for workers in (2, 4, 8)} == {3}
    assert all(len(curve[workers]) > 3 for workers in (1, *knee.between))


def test_of_points_that_could_be_on_either_side_the_noisiest_is_repeated() -> None:
    curve = {1: [15.0] * 4, 8: [114.0] * 4, 9: [118.0, 126.0, 112.0, 132.0], 10: [132.0] * 4}
    assert next_workers(curve, 10) == 9


def test_windows_where_they_teach_most_narrow_the_interval_more_than_windows_in_turn() -> None:
    shape = SHAPES["linear, then hardly more"]
    widths = {"in turn": 0.0, "where they teach most": 0.0}
    for run in range(4):
        for way in widths:
            rng = random.Random(run)
            curve = measured(shape, 0.05, rng, growing=True)
            for place in range(24):
                turn = POINTS[place % len(POINTS)]
                workers = turn if way == "in turn" else next_workers(curve, 48)
                rate = 15 * shape(workers) * (1 + rng.gauss(0, 0.05))
                curve[workers] = [*curve.get(workers, []), rate]
            widths[way] += find_knee(curve).width
    assert widths["where they teach most"] < 0.8 * widths["in turn"]


def test_crossing_is_that_of_throughput() -> None:
    assert crossing({16: 1.0, 32: 0.5}) == pytest.approx(16 / SHARE)  # flat between: 16 jobs at once in all
    assert crossing({1: 1.0, 2: 0.95}) is None


def between(at: float | None, low: float, high: float | None) -> Knee:
    return Knee(at=at, low=low, high=high, between=None, most=48)


@pytest.mark.parametrize(
    ("one", "other", "before"),
    [
        ((16.3, 5.7, 19.4), (25.2, 24.2, 25.9), True),  # `shared` and the control, waiting
        ((11.1, 9.5, 16.0), (25.2, 24.2, 25.9), True),
        ((3.2, 2.6, 4.2), (4.0, 3.0, 4.9), False),  # the same of effects: the machine
        ((3.5, 2.5, 5.8), (4.0, 3.0, 4.9), False),
        ((3.5, 3.0, 5.8), (4.0, 3.6, 4.9), False),  # the other lies in the interval of the one
        ((3.5, 3.0, 3.8), (4.0, 3.2, 4.9), False),  # and the one in that of the other
        ((16.3, 5.7, 19.4), (None, 40.0, None), True),
        ((16.3, 5.7, 19.4), (None, 12.0, None), False),
        ((16.3, 5.7, 50.0), (None, 40.0, None), False),  # where the other may be is not known beyond 48
        ((16.3, 5.7, None), (25.2, 24.2, 25.9), False),
        ((None, 48.0, None), (None, 48.0, None), False),
        ((25.2, 24.2, 25.9), (16.3, 5.7, 19.4), False),
    ],
)
def test_one_knee_is_before_another_where_each_lies_outside_of_the_others_interval(
    one: tuple[float | None, float, float | None],
    other: tuple[float | None, float, float | None],
    before: bool,
) -> None:
    assert is_before(between(*one), between(*other)) is before
