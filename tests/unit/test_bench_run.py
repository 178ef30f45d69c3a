"""What a run refuses to measure, since its figures would say something else than what they seem to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import click
import msgspec
import pytest

from mvmci.bench.bottleneck import Finding
from mvmci.bench.evidence import seen_between
from mvmci.bench.load import Loaded
from mvmci.bench.points import Points
from mvmci.bench.run import Run, _check_measurable, at_last, cold_engines
from mvmci.bench.session import as_shown
from mvmci.cli.bench import Progress, Rate, _name
from mvmci.cluster.metrics import UnitMetrics
from mvmci.errors import Usage
from tests.harness.reports import make_report
from tests.unit.test_bench_evidence import look, unit


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
        _check_measurable("build", alone(ended=0, failed=0), "")


def test_jobs_that_all_fail_are_refused_and_it_is_said_why() -> None:
    with pytest.raises(Usage, match="each of 3 jobs failed: exit 7"):
        _check_measurable("build", alone(ended=3, failed=3), "exit 7")
    _check_measurable("build", alone(ended=3, failed=2), "exit 7")


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


def test_jobs_that_failed_are_no_throughput() -> None:
    window = msgspec.structs.replace(make_report().windows[0], ended=50, failed=10, seconds=4.0)
    assert window.rate == 10.0
    assert alone(ended=60, failed=30).rate == 5.0


@pytest.mark.parametrize(("failed", "marks"), [(0, []), (1, []), (2, ["2 of 100 jobs failed"])])
def test_a_window_in_which_more_than_one_of_a_hundred_failed_has_that_against_it(
    failed: int, marks: list[str]
) -> None:
    window = msgspec.structs.replace(
        make_report().windows[0], ended=100, failed=failed, others=0.0, late_ms=0.0, calibration_us=0
    )
    run = Run([], {}, Points([], {}), print)
    assert run._marks(window) == marks


def test_an_engine_is_warm_once_no_slot_has_its_first_job_and_as_many_jobs_ended() -> None:
    def told(slots_run: int, ended: int) -> dict[str, UnitMetrics]:
        return {"executor-1": unit(0, slots_run=slots_run, jobs={"succeeded": ended})}

    first, name = told(3, 70), {"executor-1"}
    assert cold_engines(name, first, told(5, 80), told(6, 90)) == name  # one more has run
    assert cold_engines(name, first, told(6, 70), told(6, 75)) == name  # six have, and five jobs ended
    assert cold_engines(name, first, told(6, 70), told(6, 76)) == set()
    assert cold_engines(name, first, told(6, 76), {}) == name  # it tells nothing
    assert cold_engines(name, first, told(0, 70), told(0, 70)) == name


def test_time_is_kept_for_what_is_to_come_by_what_the_same_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    staged: Any = SimpleNamespace(name="peer", most=8)
    run = Run([staged], {}, Points([], {}), print)
    run._ends_at = 120.0
    assert run._fits("diagnosis") and not run._fits("raise")
    run._took = {"diagnosis": [15.0, 25.0], "raise": [5.0]}
    assert run._fits("raise") and run._fits("diagnosis") and not run._fits("diagnosis", "raise")
    key = ("peer", "waiting")
    window = msgspec.structs.replace(make_report().windows[0], candidate=key[0], profile=key[1], seconds=5.0)
    run.found.windows = [msgspec.structs.replace(window, workers=2, ended=20)]
    run._floods = [(key, 160)]  # of which eight workers are taken to do 16 a second
    assert run._fits("raise")
    run.found.windows.append(msgspec.structs.replace(window, workers=8, ended=50))  # and do ten
    assert not run._fits("raise")


def test_progress_is_told_in_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    run = Run([], {}, Points(["peer"], {"waiting": (1, 2)}), print)
    run._ends_at, run._took = 190.0, {"window": [10.0]}
    assert run._progress() == "window 0 of about 9, 2 min left"
    run._ends_at = 105.0
    assert run._progress() == "window 0 of about 2, 1 min left"


def test_a_window_that_was_to_be_run_again_and_was_not_counts_where_no_other_does() -> None:
    one = msgspec.structs.replace(make_report().windows[0], marks=["slow"], counts=False)
    several = [msgspec.structs.replace(one, number=n, workers=n % 2 + 1) for n in range(4)]
    several.append(msgspec.structs.replace(one, number=4, workers=1, counts=True))
    assert [one.counts for one in at_last(several)] == [False, False, False, True, True]


@pytest.mark.parametrize(("others", "warned"), [([0.1, 0.6], False), ([0.4, 0.6], True)])
def test_that_others_use_the_machine_is_said_before_the_time_is_spent(
    others: list[float], warned: bool
) -> None:
    told: list[str] = []
    run = Run([], {}, Points([], {}), told.append)
    seen = seen_between(look(0), look(1), is_local=True, slotted=())
    run.found.rest = {
        (str(n), "light"): msgspec.structs.replace(seen, others=one) for n, one in enumerate(others)
    }
    run._warn()
    assert [line.startswith("warning: other programs take 40%") for line in told] == [True] * warned


def test_on_a_terminal_progress_is_one_line_and_a_warning_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    told = Progress()
    for sentence in ("bringing", "warning: slow", "warming"):
        told.tell(sentence)
    told.end()
    lines = capsys.readouterr().err.replace("\r\x1b[K", "\r").split("\n")
    assert [line.rpartition("\r")[2].rpartition("0:00 ")[2] for line in lines] == ["warning: slow", ""]


@pytest.mark.parametrize(("after", "stands"), [(113.0, False), (140.0, True)])
async def test_what_was_raised_moved_it_if_that_is_more_than_windows_differ_by(
    monkeypatch: pytest.MonkeyPatch, after: float, stands: bool
) -> None:
    """Closed loops at that point were 92 and 108; that an open one made half of it says nothing."""

    @contextlib.asynccontextmanager
    async def raised(*_: object) -> AsyncIterator[tuple[str, str]]:
        yield "1", "3"

    async def nothing(*_: object) -> None:
        pass

    async def watched(*_: object, **__: object) -> tuple[object, object]:
        return SimpleNamespace(others=0.0), SimpleNamespace(rate=after)

    told = make_report()
    at = msgspec.structs.replace(
        told.diagnoses[0],
        candidate="peer",
        profile="waiting",
        workers=4,
        rate=100.0,
        findings=[Finding(cause="slots", whose="executor", why="they are full")],
    )
    one = msgspec.structs.replace(
        told.windows[0], candidate="peer", profile="waiting", seconds=1.0, workers=4
    )
    rates = [(1, 25, "closed"), (4, 92, "closed"), (4, 108, "closed"), (4, 50, "open")]
    staged: Any = SimpleNamespace(
        name="peer", candidate=told.candidates[2], set_workers=nothing, jobs_at_once=16
    )
    run = Run([staged], {}, Points([], {}), print)
    run.found.diagnoses = [at]
    run.found.windows = [
        msgspec.structs.replace(one, workers=workers, ended=ended, loop=loop)
        for workers, ended, loop in rates
    ]
    monkeypatch.setattr("mvmci.bench.run.raised", raised)
    monkeypatch.setattr(run, "warm", nothing)
    monkeypatch.setattr(run, "_watched", watched)
    await run.raise_(0)
    (found,) = run.found.diagnoses[0].findings
    assert (found.stands, "100.0 → " in found.tried) == (stands, True)
