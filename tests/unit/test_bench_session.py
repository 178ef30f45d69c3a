"""A run that is cut still has its report, and the budget that is asked for is one that is enough."""

from __future__ import annotations

import asyncio
import re

import pytest

from mvmci.bench.page import page
from mvmci.bench.profiles import PROFILES
from mvmci.bench.report import Report, decode, encode
from mvmci.bench.run import Found
from mvmci.bench.session import Options, _check_budget, _kept, _up_and_down_s
from mvmci.bench.table import table
from mvmci.config.quantity import parse_duration
from mvmci.errors import NotYet, Usage
from tests.harness.reports import make_report


def options(budget_s: float = 900.0) -> Options:
    return Options(
        files=[], profiles={name: PROFILES[name] for name in ("waiting", "light")}, budget_s=budget_s
    )


def measured_until(ended: BaseException | None, found: Found, *, is_done: bool = False) -> list[Report]:
    """The reports that are kept of a run which has `found` so much when that ends it."""
    kept: list[Report] = []
    try:
        with _kept(options(), print, kept.append) as session:
            session.found, session._candidates = found, make_report().candidates
            session._machines, session.is_done = make_report().machines, is_done
            if ended is not None:
                raise ended
    except type(ended):  # type: ignore[misc]
        pass
    return kept


@pytest.mark.parametrize(
    ("ended", "why"),
    [
        (None, ""),
        (asyncio.CancelledError(), "it was interrupted"),
        (NotYet("1 job has not ended"), "1 job has not ended"),
    ],
)
def test_what_was_measured_is_told_whatever_ended_it(ended: BaseException | None, why: str) -> None:
    windows = [*make_report().windows]
    (report,) = measured_until(ended, Found(windows=windows))
    assert (report.cut, len(report.windows), len(report.curves)) == (why, len(windows), 8)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_a_report_of_a_few_windows_can_be_shown(count: int) -> None:
    whole = make_report()
    found = Found(windows=[*whole.windows[:count]], lives=[*whole.lives[:1]])
    (report,) = measured_until(NotYet("too late"), found)
    assert decode(encode(report)).cut == "too late"
    assert table(report)
    assert page(report)


def test_what_fails_behind_the_measuring_cuts_nothing() -> None:
    found = Found(windows=[*make_report().windows])
    (report,) = measured_until(NotYet("a unit does not end"), found, is_done=True)
    assert report.cut == ""


def test_where_nothing_was_measured_there_is_no_report() -> None:
    assert measured_until(NotYet("too late"), Found()) == []


@pytest.mark.parametrize("levels", [(1,), (1, 2), (1, 2, 4, 8, 16, 32)])
@pytest.mark.parametrize("candidates", [1, 2, 5])
def test_the_budget_that_is_asked_for_is_enough(candidates: int, levels: tuple[int, ...]) -> None:
    by_profile = dict.fromkeys(("waiting", "light"), levels)
    ends_s = _up_and_down_s(candidates, max(levels))
    with pytest.raises(Usage) as told:
        _check_budget(options(1.0), candidates, by_profile, ends_s)
    assert told.value.hint is not None
    (needed,) = re.findall(r"--budget (\d+[sm])", told.value.hint)
    _check_budget(options(parse_duration(needed) / 1000), candidates, by_profile, ends_s)
    assert ("1 clusters" in told.value.message, "1 cluster " in told.value.message) == (
        False,
        candidates == 1,
    )


def test_less_is_refused_however_little() -> None:
    def is_enough(seconds: float) -> bool:
        try:
            _check_budget(options(seconds), 2, {"light": (1, 2)})
        except Usage:
            return False
        return True

    enough = [is_enough(seconds) for seconds in range(10, 600, 10)]
    assert enough == sorted(enough) and not enough[0] and enough[-1]
