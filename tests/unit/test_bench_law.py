"""Laws beside a curve: their coefficients are found again, and one that is far off is not shown."""

from __future__ import annotations

import pytest

from mvmci.bench.knee import crossing, efficiency
from mvmci.bench.law import (
    OFF_MOST,
    Gunther,
    Law,
    Queue,
    fit_gunther,
    fit_queue,
    fitted,
    left_out,
)
from tests.unit.test_bench_knee import WAITING

POINTS = (1, 2, 4, 8, 12, 16, 24, 32, 48)


def of(law: Law, points: tuple[int, ...] = POINTS) -> dict[int, float]:
    return {n: law.rate(n) for n in points}


def waiting(access: str) -> dict[int, float]:
    return dict(zip(POINTS, WAITING[access][0], strict=True))


@pytest.mark.parametrize(
    "law",
    [
        Gunther(15.2, 0.023, 0.0013),
        Gunther(15.2, 0.1, 0.0),
        Gunther(15.2, 0.0, 0.002),
        Gunther(15.2, 0.0, 0.0),
    ],
)
def test_exact_figures_give_the_coefficients_of_gunthers_law_back(law: Gunther) -> None:
    found = fit_gunther(of(law))
    assert found.one == pytest.approx(law.one)
    assert found.contention == pytest.approx(law.contention, abs=1e-9)
    assert found.coherency == pytest.approx(law.coherency, abs=1e-9)
    assert left_out(of(law), fit_gunther) < 1e-6


def test_no_coefficient_of_gunthers_law_is_below_zero() -> None:
    better_than_linear = {n: 15.0 * n**1.1 for n in POINTS}
    found = fit_gunther(better_than_linear)
    assert (found.contention, found.coherency) == (0, 0)


@pytest.mark.parametrize("law", [Queue(0.002, 0.1, 2), Queue(0.01, 0.12, 2), Queue(0.004, 0.3, 4)])
def test_exact_figures_give_the_times_of_a_queue_back(law: Queue) -> None:
    found = fit_queue(of(law), law.at_once)
    assert found.demand_s == pytest.approx(law.demand_s, rel=0.02)
    assert found.delay_s == pytest.approx(law.delay_s, rel=0.02)


def test_a_queue_is_limited_by_its_station_and_by_nothing_while_it_is_idle() -> None:
    law = Queue(0.01, 0.09, 1)
    assert law.rate(1) == pytest.approx(10)
    assert law.rate(200) == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(("access", "says"), [("per-worker", 18.4), ("shared", 13.7), ("peer", 13.0)])
def test_gunthers_law_misses_knees_that_were_measured(access: str, says: float) -> None:
    """So that no law gives a knee: it said 18 where 25 was measured."""
    law = fit_gunther(waiting(access))
    everywhere = {n: law.rate(n) for n in range(1, 49)}
    assert crossing(efficiency(everywhere)) == pytest.approx(says, abs=0.15)


def test_how_far_a_law_is_off_is_told_by_points_that_it_was_not_fitted_to() -> None:
    points = of(Gunther(15.2, 0.02, 0.0)) | {48: 100.0}  # a last point that the others know nothing of
    without = fit_gunther({n: rate for n, rate in points.items() if n != 48})
    assert left_out(points, fit_gunther) == pytest.approx(without.rate(48) / 100 - 1)
    assert max(abs(fit_gunther(points).rate(n) / rate - 1) for n, rate in points.items()) < left_out(
        points, fit_gunther
    )


def test_a_law_that_is_far_off_is_not_shown() -> None:
    shown = {access: {law.law for law in fitted(waiting(access), 2)} for access in WAITING}
    assert shown == {
        "per-worker": {"gunther", "queue"},
        "shared": {"gunther", "queue"},
        "peer": {"gunther"},  # the queue is off by a quarter there
    }
    assert left_out(waiting("peer"), lambda some: fit_queue(some, 2)) > OFF_MOST
    assert fitted({1: 15.0, 2: 29.0, 4: 51.0}, 2) == []


def test_what_is_shown_of_a_law_can_be_drawn_and_says_how_far_it_is_off() -> None:
    law = fitted(waiting("shared"), 2)[0]
    assert set(POINTS) <= set(law.rates)
    assert law.off == pytest.approx(left_out(waiting("shared"), fit_gunther))
    assert law.text == "Gunther's law: 18.8 jobs/s of one worker, contention 0.0037, coherency 0.00037"
    many = {n: 15.0 * n for n in (1, 10, 100, 1_000)}
    assert len(fitted(many, 1)[0].rates) < 80
