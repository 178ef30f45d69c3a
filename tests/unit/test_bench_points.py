"""Which window comes next: each number of workers once, what is to be repeated, then the widest interval."""

from __future__ import annotations

from collections import Counter

import pytest

from mvmci.bench.points import REPEATS_MAX, ROUNDS, Point, Points

LEVELS = {"waiting": (1, 2, 4, 8), "light": (1, 2)}
CANDIDATES = ("per-worker", "peer")


def linear(point: Point) -> float:
    return 10.0 * point.workers


def first_pass(points: Points) -> list[Point]:
    taken = []
    while points.left:
        taken.append(point := points.next())
        points.add(point, linear(point), marked=False)
    return taken


def test_each_number_of_workers_is_measured_once_the_least_first() -> None:
    taken = first_pass(Points(CANDIDATES, LEVELS))
    wanted = [(one, profile, n) for one in CANDIDATES for profile, counts in LEVELS.items() for n in counts]
    assert sorted(taken) == sorted(wanted)
    assert {point.workers for point in taken[:4]} == {1}
    assert [point.workers for point in taken] != sorted(point.workers for point in taken)


def test_candidates_take_turns_in_an_order_of_chance_that_a_seed_repeats() -> None:
    orders = [first_pass(Points(CANDIDATES, LEVELS, seed=seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_far_beyond_the_line_no_more_workers_are_measured() -> None:
    points = Points(["peer"], {"waiting": (1, 2, 4, 8)})
    taken = []
    while points.left:
        taken.append(point := points.next())
        points.add(point, 10.0 + point.workers, marked=False)
    assert [point.workers for point in taken] == [1, 2, 4]  # at 4 they do 14 of 44


def test_a_marked_window_comes_again_and_counts_at_last() -> None:
    points = Points(["peer"], {"waiting": (1,)})
    counted = [points.add(points.next(), 10.0, marked=True) for _ in range(REPEATS_MAX + 1)]
    assert counted == [False] * REPEATS_MAX + [True]
    assert points.curve("peer", "waiting") == {1: [10.0]}


def test_a_machine_that_is_never_quiet_does_not_repeat_for_ever() -> None:
    points, counted = Points(CANDIDATES, LEVELS), Counter[bool]()
    for _ in range(200):
        point = points.next()
        counted[points.add(point, linear(point), marked=True)] += 1
    assert counted[False] <= 51


def test_then_the_knee_that_is_known_least_is_measured() -> None:
    points = Points(CANDIDATES, {"waiting": (1, 2, 4, 8)})
    first_pass(points)
    for _ in range(6):  # of these, one is known well and bends nowhere
        for workers in (1, 2, 4, 8):
            points.add(Point("per-worker", "waiting", workers), 10.0 * workers, marked=False)
    for rate in (5.0, 9.0):  # and the other is not
        points.add(Point("peer", "waiting", 8), 8 * rate, marked=False)
    assert {points.next().candidate for _ in range(10)} == {"peer"}


@pytest.mark.parametrize("levels", [(1,), (4,)])
def test_one_number_of_workers_alone_is_repeated(levels: tuple[int, ...]) -> None:
    points = Points(["peer"], {"waiting": levels})
    first_pass(points)
    assert points.next() == Point("peer", "waiting", *levels)


def test_a_profile_without_a_knee_has_a_few_rounds_and_no_more() -> None:
    points = Points(CANDIDATES, LEVELS, without_knee=["light"])
    taken = Counter(point for point in first_pass(points) if point.profile == "light")
    assert set(taken.values()) == {ROUNDS}
    assert {points.next().profile for _ in range(20)} == {"waiting"}


def test_where_no_profile_has_a_knee_the_time_is_used_all_the_same() -> None:
    points = Points(["peer"], {"light": (1, 2)}, without_knee=["light"])
    first_pass(points)
    assert points.next().profile == "light"


def test_the_first_pass_ends_with_the_last_number_of_workers_that_no_window_had() -> None:
    points = Points(CANDIDATES, LEVELS, without_knee=["light"])
    for _ in CANDIDATES:
        for _ in (*LEVELS["waiting"], *LEVELS["light"]):
            assert points.is_first_pass
            points.add(point := points.next(), linear(point), marked=False)
    assert not points.is_first_pass
    assert points.left  # more rounds of the other profile


def test_a_window_in_which_nothing_ended_is_no_end_of_the_run() -> None:
    points = Points(["peer"], {"waiting": (1, 2)})
    while points.left:
        point = points.next()
        points.add(point, 0.0 if point.workers == 1 else 3.0, marked=False)
    assert points.next() == Point("peer", "waiting", 1)


def test_none_is_missing_once_each_was_measured_even_if_that_is_to_come_again() -> None:
    points = Points(CANDIDATES, {"waiting": (1, 2)})
    for still in (True, False):
        assert points.missing
        points.add(points.next(), 10.0, marked=True)
        assert points.missing is still
