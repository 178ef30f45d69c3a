"""What a terminal shows of a report: its figures, within the terminal, and nothing that moves the cursor."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from mvmci.bench import figures
from mvmci.bench.report import Report
from mvmci.bench.table import CELL, LABEL, WIDTH, table
from mvmci.jobs.times import WORDS
from tests.harness.reports import make_report
from tests.unit.test_printed import HOSTILE

replace: Any = msgspec.structs.replace


def cells(report: Report, profile: str) -> dict[str, list[str]]:
    """Of the lines of a profile's table, by what stands at their beginning."""
    block = next(one for one in table(report).split("\n\n") if one.startswith(profile.upper()))
    starts = range(LABEL, WIDTH, CELL)
    return {
        line[:LABEL].strip(): [line[at : at + CELL].strip() for at in starts]
        for line in block.splitlines()[1:]
    }


def value(cell: str) -> float:
    return float(re.split(r"[ /(%]", cell)[0].replace(",", ""))


@pytest.mark.parametrize("profile", ["waiting", "light"])
def test_every_figure_of_a_profile_is_that_of_the_report(profile: str) -> None:
    report = make_report()
    shown = cells(report, profile)
    curves = [one for one in report.curves if one.profile == profile]
    assert [one.strip(" *") for one in shown["jobs/s, of linear"]] == [one.candidate for one in curves]
    for place, curve in enumerate(curves):
        for workers, mean in curve.means.items():
            rate, share = shown[f"{workers} worker{'s' * (workers > 1)}"][place].split()
            assert value(rate) == pytest.approx(mean, abs=max(0.051, mean * 0.005))
            assert value(share) == pytest.approx(min(100, curve.efficiency[workers] * 100), abs=0.51)
        knee, has_knee = curve.knee.at, profile not in report.without_knee
        assert knee is not None and ("knee, workers" in shown) == has_knee
        if has_knee:
            assert value(shown["knee, workers"][place]) == pytest.approx(knee, abs=0.051)
            assert value(shown["jobs at once"][place]) == pytest.approx(knee * curve.slots, abs=0.051)
        late = figures.first_of(report.latencies, curve.candidate, profile)
        assert late is not None
        low, high = shown["as a closed loop"][place].split(" / ")
        assert (value(low), value(high)) == pytest.approx((late.closed["p50"], late.closed["p99"]), abs=0.51)
        alone, loaded = figures.lives(report, curve.candidate, profile)
        assert alone is not None and loaded is not None
        for part in ("queue", "writes"):
            told = map(value, shown[WORDS[part]][place].split(" → "))
            assert list(told) == pytest.approx([alone.parts[part], loaded.parts[part]], abs=0.051)


def test_the_rate_of_a_knee_lies_between_what_was_measured_on_both_sides() -> None:
    for curve in make_report().curves:
        rate, between = figures.in_rate(curve), curve.knee.between
        assert rate is not None and between is not None
        low, high = sorted(curve.means[workers] for workers in between)
        assert low <= rate <= high


def test_four_candidates_and_two_profiles_fit_a_screen() -> None:
    lines = table(make_report()).splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= WIDTH


def test_more_candidates_than_fit_go_on_below_beside_the_control() -> None:
    report = make_report()
    more = [replace(report.candidates[1], name=f"other-{place}") for place in range(4)]
    lines = table(replace(report, candidates=[*report.candidates, *more])).splitlines()
    heads = [line.split()[2:] for line in lines if line.startswith("jobs/s, of linear")]
    assert [head[1] for head in heads[:3]] == ["per-worker"] * 3
    assert {"shared", "peer", "pool", *(one.name for one in more)} <= {
        name for head in heads for name in head
    }
    assert max(map(len, lines)) <= WIDTH


def test_what_was_withdrawn_is_no_bottleneck_and_what_stands_is_told_to_do_so() -> None:
    shown = cells(make_report(), "waiting")
    assert shown["bottleneck"] == ["processors", "executor's loop", "executor's loop", "processors"]
    assert shown[""] == ["likely", "confirmed", "confirmed", "likely, not slots"]


def test_windows_that_count_in_spite_of_a_mark_are_listed_with_it() -> None:
    report = make_report()
    text = table(report)
    stayed = [one for one in report.windows if one.marks and one.counts]
    assert stayed
    for one in stayed:
        assert f"{one.candidate}, {one.profile}, {one.workers} workers: {one.marks[0]}" in text


def test_the_verdict_comes_last_and_ends_with_its_command() -> None:
    report = make_report()
    text = " ".join(table(report).split())
    for one in (*report.verdict.sentences, *report.verdict.unseen):
        assert one.text in text
    assert text.index("WAITING:") < text.index(report.verdict.sentences[0].text)
    assert text.endswith(f"$ {report.verdict.command}")


def test_lost_jobs_are_told_by_their_number() -> None:
    report = make_report()
    text = table(replace(report, counted=replace(report.counted, lost=3, twice=2)))
    assert "3 were lost and 2 ended" in text


def test_nothing_that_a_report_says_moves_the_cursor_or_leaves_the_terminal() -> None:
    report = msgspec.convert(_hostile(msgspec.to_builtins(make_report())), Report, strict=False)
    lines = table(report).splitlines()
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if len(line) > WIDTH and not line.startswith("$ ")] == []  # it is copied


def _hostile(value: Any, key: str = "") -> Any:
    """The same with each text of it made longer by what a terminal obeys."""
    told = {
        "name",
        "candidate",
        "file",
        "text",
        "why",
        "tried",
        "command",
        "model",
        "marks",
        "unit",
        "against",
        "kernel",
    }
    match value:
        case dict():
            return {name: _hostile(one, name) for name, one in value.items()}
        case list() | tuple():
            return [_hostile(one, key) for one in value]
        case str() if key in told:
            return value + HOSTILE
        case _:
            return value
