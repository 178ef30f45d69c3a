"""What a run refuses to measure, since its figures would say something else than what they seem to."""

from __future__ import annotations

import click
import pytest

from mvmci.bench.load import Loaded
from mvmci.bench.run import _check_measurable
from mvmci.bench.session import as_shown
from mvmci.cli.bench import Rate, _name
from mvmci.errors import Usage


def alone(*, ended: int, failed: int) -> Loaded:
    return Loaded(
        loop="closed",
        at_once=1,
        began=0.0,
        over=6.0,
        seconds=6.0,
        first=1,
        last=9,
        ended=ended,
        recorded=ended,
        failed=failed,
        samples_us=[],
        late_ms=0.0,
        ids=["b-1"] * ended,
    )


def test_jobs_that_outlast_a_window_are_refused() -> None:
    with pytest.raises(Usage, match="build: one at a time, no two jobs ended within 6 s"):
        _check_measurable("build", alone(ended=0, failed=0))


def test_jobs_that_all_fail_are_refused_and_one_is_named() -> None:
    with pytest.raises(Usage, match="each of 3 jobs failed, b-1 was one"):
        _check_measurable("build", alone(ended=3, failed=3))
    _check_measurable("build", alone(ended=3, failed=2))


def test_a_module_is_not_taken_for_a_profile_of_ours_for_its_name() -> None:
    assert (_name("jobs/light.wasm"), _name("jobs/build.wasm")) == ("module light", "build")


@pytest.mark.parametrize("rate", ["inf", "nan", "1e9", "0"])
def test_what_is_no_rate_that_can_be_planned_is_refused(rate: str) -> None:
    with pytest.raises(click.BadParameter):
        Rate().convert(rate, None, None)


def test_what_a_job_finds_in_its_environment_is_not_told_to_who_reads_the_report() -> None:
    words = ["mvmci", "bench", "--env", "KEY=s3cret", "--env=TOKEN=s3cret", "--env", "PATH", "--arg", "a=b"]
    assert as_shown(words) == [
        "mvmci",
        "bench",
        "--env",
        "KEY=…",
        "--env=TOKEN=…",
        "--env",
        "PATH",
        "--arg",
        "a=b",
    ]
