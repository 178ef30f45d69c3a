"""The interval of a knee holds the true one, in each kind of curve that we could think of."""

from __future__ import annotations

import pytest

from tests.unit.test_bench_knee import NOISES, SHAPES, covered


@pytest.mark.parametrize("growing", [True, False], ids=["growing", "even"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_interval_holds_the_truth_in_93_of_100_runs_of_each_kind(
    name: str, noise: float, growing: bool
) -> None:
    assert covered(1_000, SHAPES[name], noise, growing=growing) >= 930
