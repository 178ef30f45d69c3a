"""What a rate of jobs needs is read from a curve, goes on where that ends, and says so."""

from __future__ import annotations

import pytest

from mvmci.bench import figures
from mvmci.bench.capacity import FULL, capacities, capacity, carried, pays_from_s, workers_for
from mvmci.bench.curves import draw
from mvmci.bench.report import Capacity, Ceiling, Curve, Demand
from tests.unit.test_bench_verdict import LOOP, MOVED, PROCESSORS, WAITED, candidate, replace, reported

DEMAND = Demand(
    candidate="shared",
    profile="waiting",
    workers=24,
    cpu_ms=5.0,
    worker_bytes=50_000_000,
    executor_bytes=80_000_000,
    broker_bytes=2_000,
)


def waiting(name: str) -> Curve:
    """Its curve, with no ceiling: what bounds it is its own."""
    return next(
        one for one in reported({"waiting": WAITED}, {"shared": [MOVED]}).curves if one.candidate == name
    )


def needed(name: str, curve: Curve) -> dict[float, Capacity]:
    return {row.rate: row for row in capacity(candidate(name), curve, DEMAND)}


def test_round_rates_are_told_within_what_was_measured_and_ten_times_beyond() -> None:
    rows = needed("shared", waiting("shared"))
    assert list(rows) == [10, 100, 1_000]
    assert [row.beyond for row in rows.values()] == [False, False, True]
    slow = waiting("shared")
    slow = replace(slow, means={n: rate / 1_000 for n, rate in slow.means.items()})
    assert list(needed("shared", slow)) == [0.01, 0.1, 1]


def test_workers_are_read_from_the_curve_until_that_leaves_the_line() -> None:
    curve = waiting("shared")
    assert workers_for(curve, 18.0) == 1
    assert workers_for(curve, 100.0) == 6  # between 4, which do 73, and 8, which do 142
    assert workers_for(curve, 273.0) == 16
    assert workers_for(curve, 0.1) == 1


def test_beyond_its_knee_each_worker_does_what_it_did_there() -> None:
    curve = waiting("shared")
    assert curve.knee.at is not None
    assert carried(curve) == pytest.approx(0.9 * curve.means[1] * curve.knee.at, rel=0.001)
    assert workers_for(curve, 10 * carried(curve)) == pytest.approx(10 * curve.knee.at, abs=1)
    rates = [workers_for(curve, rate) for rate in range(1, 2_000)]
    assert rates == sorted(rates)


def test_of_executors_there_are_as_many_as_carry_the_rate() -> None:
    rows = needed("shared", waiting("shared"))
    assert (rows[100].executors, rows[1_000].executors) == (1, 4)  # 276 jobs/s each
    assert needed("per-worker", waiting("per-worker"))[1_000].executors == 0
    pool = replace(waiting("shared"), candidate="pool")
    assert needed("pool", pool)[1_000].executors == 8  # that curve is of two
    assert needed("pool", pool)[10].executors == 2  # which it has
    row = needed("shared", waiting("shared"))[1_000]
    assert figures.capacity(row, candidate("shared"))[3] == "4 (pool)"  # it has one, and can have no more
    assert figures.capacity(row, candidate("pool"))[3] == "4"


def test_where_the_machine_ended_first_an_executor_is_taken_by_its_ceiling() -> None:
    ceiling = Ceiling(workers=24, loop_ms=1.0, rate=1_000.0, workers_at_most=50.0)
    assert needed("shared", replace(waiting("shared"), ceiling=ceiling))[1_000].executors == 2


def test_processors_memory_and_disk_follow_from_the_demand_of_a_job() -> None:
    row = needed("shared", waiting("shared"))[100]
    assert row.cores == pytest.approx(100 * 0.005 / FULL)
    assert row.memory_bytes == 6 * DEMAND.worker_bytes + DEMAND.executor_bytes
    assert row.disk_bytes_a_day == 100 * 86_400 * 2_000


def test_a_curve_that_did_not_bend_is_carried_to_its_end() -> None:
    curve = waiting("per-worker")
    straight = replace(curve, knee=replace(curve.knee, at=None, between=None, most=16))
    short = replace(straight, means={n: rate for n, rate in curve.means.items() if n <= 16})
    assert carried(short) == pytest.approx(300.0)
    assert workers_for(short, 600.0) == 32


def test_many_workers_are_busy_only_with_jobs_that_last() -> None:
    assert pays_from_s(1_000, 2, 584.0) == pytest.approx(3.42, abs=0.01)
    assert pays_from_s(200, 2, 225.0) == pytest.approx(1.78, abs=0.01)


def test_a_ceiling_is_drawn_only_where_an_executors_own_knee_was_not_reached() -> None:
    own = reported({"waiting": WAITED}, {"shared": [LOOP], "peer": [PROCESSORS]})
    ceilings = {one.candidate: one.ceiling for one in own.curves}
    assert ceilings["shared"] is None
    assert ceilings["peer"] is not None
    assert ceilings["peer"].workers == 48
    assert ceilings["peer"].loop_ms == pytest.approx(1e3 * 0.55 / 584, rel=0.02)  # it ran for 55 % there
    assert ceilings["peer"].rate == pytest.approx(1e3 / ceilings["peer"].loop_ms)
    assert ceilings["peer"].workers_at_most == pytest.approx(ceilings["peer"].rate / 19.0)


def test_a_curve_is_of_closed_windows_that_count_and_of_nothing_where_nothing_ended() -> None:
    report = reported({"waiting": WAITED})
    some = [
        replace(one, counts=False)
        if one.workers == 48
        else replace(one, loop="open")
        if one.workers == 32
        else one
        for one in report.windows
    ]
    drawn = draw(report.candidates, some, [])
    assert {one.candidate for one in drawn} == {"per-worker", "shared", "peer"}
    assert all(sorted(one.means) == [1, 2, 4, 8, 12, 16, 24] for one in drawn)
    nothing = [replace(one, ended=0) if one.candidate == "peer" else one for one in report.windows]
    assert {one.candidate for one in draw(report.candidates, nothing, [])} == {"per-worker", "shared"}


def test_nothing_is_planned_by_windows_that_are_doubted_or_by_jobs_that_failed() -> None:
    demands = [DEMAND, replace(DEMAND, candidate="peer")]
    report = replace(reported({"waiting": WAITED}, {"shared": [MOVED], "peer": [MOVED]}), demands=demands)
    assert {row.candidate for row in capacities(report)} == {"shared", "peer"}
    failed = [
        replace(one, failed=one.ended // 50) if one.candidate == "peer" else one for one in report.windows
    ]
    assert {row.candidate for row in capacities(replace(report, windows=failed))} == {"shared"}
    doubted = [replace(one, marks=["other programs took 60% of the machine"]) for one in report.windows]
    assert list(capacities(replace(report, windows=doubted))) == []
