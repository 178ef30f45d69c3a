"""The benchmark of a cluster, with tiny numbers: that it measures, not what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.__main__ import scratch
from benchmarks.cluster import Lines, Scale
from benchmarks.compare import Scale as Rounds
from benchmarks.compare import compare
from benchmarks.figures import lines_table
from benchmarks.program import DIST
from tests.harness.places import IN_CI

TINY = Scale(rounds=1, batch=50, alone=3, effects=5, replayed=20, starts=1)
GROWTH = growth.Scale(
    rounds=1, bulk=20, alone=2, workers=(), units=(4, 8), ended=(0, 500), effects=(), bytes=(), rest_s=1.0
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where it may write; nothing is left of it."""
    for needed in (DIST / "mvmci.pyz", DIST / "examples" / "tiny.wasm"):
        if not needed.exists():
            message = f"no {needed.name}: build it with ./just zipapp examples"
            pytest.fail(message) if IN_CI else pytest.skip(message)
    with scratch(tmp_path) as found:
        yield found
    assert not found.exists()


async def test_every_line_about_a_cluster_is_a_number(folder: Path) -> None:
    lines = await Lines(folder / "cluster", TINY).measure()
    assert len(lines) > 10
    for line in lines:
        assert line.values, line.what
        assert all(math.isfinite(value) for value in line.values), line
        if line.what != "an effect, journaled":  # that is a difference, of few here
            assert min(line.values) >= 0, line
    assert lines_table(lines).count("\n") == len(lines) + 1


def test_mvmci_and_what_lies_below_it_are_measured_alike(folder: Path) -> None:
    outcomes = compare(folder, ["mvmci", "jetstream", "batches"], Rounds(rounds=1, seconds=0.05, alone=3))
    for name, outcome in outcomes.items():
        assert not outcome.missing, (name, outcome.missing)
        assert len(outcome.noop) == 1 and outcome.noop[0] > 0
        assert set(outcome.cpu) >= {"client", "broker"}
    assert len(outcomes["mvmci"].alone) == len(outcomes["jetstream"].alone) == 3
    assert outcomes["mvmci"].durability == outcomes["jetstream"].durability == "sync_interval: always"


async def test_jobs_that_were_written_as_ended_are_no_work(folder: Path) -> None:
    section = await growth.more_ended(folder / "ended", GROWTH)
    assert set(section.rows) == {"0", "500"}
    are_figures(section)


async def test_units_at_rest_are_measured(folder: Path) -> None:
    section = await growth.more_units(folder / "units", GROWTH)
    assert set(section.rows) == {"4", "8"}
    are_figures(section)


def are_figures(section: growth.Section) -> None:
    for cells in section.rows.values():
        assert len(cells) == len(section.columns)
        assert all(values and all(map(math.isfinite, values)) for values in cells)
