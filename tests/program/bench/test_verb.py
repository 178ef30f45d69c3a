"""`mvmci bench` as it is typed: a report whose counts are those of the journals, and nothing that is left."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mvmci.bench.report import Report, decode
from mvmci.bench.run import SETTLE_S, WINDOW_S
from tests.harness.cluster import Cluster
from tests.harness.program import Mvmci, Running
from tests.harness.waiting import until

PEER = "cluster: demo\naccess: peer\nexecutors: {slots: 1}\nworkers: {count: 1, slots: 2}\n"
QUICK = ("--profile", "light", "--workers", "1,2", "--budget", "3m")
PATIENCE_S = 900.0


@pytest.fixture(scope="module")
def mvmci(program: Mvmci, tmp_path_factory: pytest.TempPathFactory) -> Mvmci:
    state = tmp_path_factory.mktemp("bench") / "state"
    return dataclasses.replace(program, state=state, patience_s=PATIENCE_S)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("files") / "mine.yaml"
    found.write_text(PEER)
    return found


def left(mvmci: Mvmci) -> list[str]:
    """What there is of a bench: folders and processes."""
    return [*map(str, mvmci.state.glob("_bench")), *mvmci.processes()]


@pytest.fixture(scope="module")
def measured(mvmci: Mvmci, file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """A report, and the page of it."""
    page = tmp_path_factory.mktemp("page") / "bench.html"
    done = mvmci("bench", file, *QUICK, "--loads", "50", "--json", "--page", page)
    assert done.code == 0, done
    assert left(mvmci) == []
    return decode(done.out), page.read_text()


def test_a_file_is_measured_beside_a_control_that_shares_nothing(measured: tuple[Report, str]) -> None:
    report, _ = measured
    assert {one.name: one.access for one in report.candidates} == {"mine": "peer", "control": "per-worker"}
    for curve in report.curves:
        assert sorted(curve.rates) == [1, 2]
        assert all(rate > 0 for rates in curve.rates.values() for rate in rates)
    assert "executors.slots" in " ".join(report.candidates[0].changed)


def test_its_counts_are_those_of_the_journals(measured: tuple[Report, str]) -> None:
    counted = measured[0].counted
    assert counted.submitted == counted.ended_once > 100
    assert (counted.lost, counted.twice) == (0, 0)
    assert counted.in_windows == counted.heard > 0
    floods = [(one.jobs, one.succeeded, one.failed, one.lost, one.twice) for one in measured[0].floods]
    assert floods == [(50, 50, 0, 0, 0)] * 2


def test_it_ends_in_a_verdict_whose_figures_are_on_the_page(measured: tuple[Report, str]) -> None:
    report, page = measured
    assert report.verdict.sentences
    for sentence in (*report.verdict.sentences, *report.verdict.unseen):
        assert all(f'id="{figure}"' in page for figure in sentence.figures), sentence


def test_an_interrupt_takes_everything_down(mvmci: Mvmci, file: Path) -> None:
    running = mvmci.start("bench", file, *QUICK)
    until(lambda: "warming" in running.said("err").decode(), lambda: running.said("err"))
    running.process.send_signal(signal.SIGINT)
    assert running.end(PATIENCE_S).code == 130
    assert left(mvmci) == []


def windows(running: Running) -> int:
    """How many were told."""
    return running.said("err").count(b"min left: ")


def test_an_interrupt_among_windows_tells_what_was_measured_until_then(
    mvmci: Mvmci, file: Path, tmp_path: Path
) -> None:
    page = tmp_path / "bench.html"
    running = mvmci.start("bench", file, *QUICK, "--json", "--page", page)
    until(lambda: windows(running) >= 3, lambda: running.said("err"))
    running.process.send_signal(signal.SIGINT)
    done = running.end(PATIENCE_S)
    report = decode(done.out)
    assert (done.code, report.cut) == (130, "it was interrupted")
    assert len(report.windows) >= 3
    assert report.curves
    assert report.counted.submitted == report.counted.ended_once + report.counted.open
    assert (report.counted.lost, report.counted.twice) == (0, 0)
    assert "</html>" in page.read_text()
    assert done.err.splitlines()[-1].startswith("interrupted: all clusters are down again")
    assert left(mvmci) == []


def test_a_worker_that_dies_in_a_window_is_told_and_the_run_goes_on(mvmci: Mvmci, file: Path) -> None:
    """That of each cluster: one of these is being measured. It may be between two windows, so once more, at
    another moment."""
    running = mvmci.start("bench", file, *QUICK, "--json")
    shares = itertools.cycle((0.5, 0.9, 0.7))
    while b"worker-1 was started again" not in running.said("err") and running.alive:
        told = windows(running)
        until(lambda told=told: windows(running) > told or not running.alive)  # type: ignore[misc]
        then = time.monotonic() + SETTLE_S + WINDOW_S * next(shares)
        until(lambda then=then: time.monotonic() > then)  # type: ignore[misc]
        for line in mvmci.processes():
            if "units/worker-1/config" in line:
                os.kill(int(line.split()[0]), signal.SIGKILL)
    done = running.end(PATIENCE_S)
    assert done.code == 0, done
    report = decode(done.out)
    assert report.cut == ""
    assert any("worker-1 was started again" in one.marks for one in report.windows)
    assert report.counted.submitted == report.counted.ended_once
    assert left(mvmci) == []


def test_one_that_is_killed_leaves_nothing_that_runs_and_the_next_one_clears_up(
    mvmci: Mvmci, file: Path
) -> None:
    running = mvmci.start("bench", file, *QUICK)
    until(lambda: "warming" in running.said("err").decode(), lambda: running.said("err"))
    running.process.send_signal(signal.SIGKILL)
    running.end(PATIENCE_S)
    mvmci.assert_nothing_runs()
    (folder,) = mvmci.state.glob("_bench/mine/bench-*")
    again = mvmci.start("bench", file, *QUICK)
    until(lambda: "warming" in again.said("err").decode(), lambda: again.said("err"))
    assert not folder.exists()
    again.process.send_signal(signal.SIGINT)
    again.end(PATIENCE_S)
    assert left(mvmci) == []


def test_two_at_once_would_measure_each_other(mvmci: Mvmci, file: Path) -> None:
    running = mvmci.start("bench", file, *QUICK)
    until(lambda: "bringing" in running.said("err").decode(), lambda: running.said("err"))
    second = mvmci("bench", file, *QUICK)
    assert second.code == 5
    assert "measures here" in second.err
    running.process.send_signal(signal.SIGINT)
    running.end(PATIENCE_S)
    assert left(mvmci) == []


WRONG = {
    ("--profile", "wating"): "did you mean waiting",
    ("--workers", "0"): "is not of the form 1,2,4",
    ("--workers", "1,x"): "is not of the form 1,2,4",
    ("--budget", "1s"): "--budget",
    ("--rate", "0"): "--rate",
    ("--module", "nowhere.wasm"): "nowhere.wasm",
    ("--input", "1"): "--module",
    ("--arg", "1"): "--module",
    ("--page", "/nowhere/page.html"): "there is no folder /nowhere",
    ("--page", "/dev/null/page.html"): "there is no folder /dev/null",
    ("--save", "/"): "is a directory",
    ("--page", "same", "--save", "same"): "it is named twice",
}


@pytest.mark.parametrize(("options", "said"), WRONG.items(), ids=" ".join)
def test_what_cannot_be_measured_is_one_sentence(
    mvmci: Mvmci, file: Path, options: tuple[str, ...], said: str
) -> None:
    done = mvmci("bench", file, *options)
    assert (done.code, done.out) == (2, b"")
    assert said in done.err
    assert "Traceback" not in done.err
    assert left(mvmci) == []


def test_a_file_that_is_wrong_is_told_with_its_line(mvmci: Mvmci, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("cluster: demo\nwrokers: {}\n")
    page, save = tmp_path / "bench.html", tmp_path / "bench.json"
    done = mvmci("bench", bad, "--page", page, "--save", save)
    assert done.code == 2
    assert "bad.yaml:2:1" in done.err
    assert not page.exists() and not save.exists()


def test_jobs_that_all_fail_are_not_measured_and_it_is_said_why(
    mvmci: Mvmci, file: Path, guest: Callable[[str], Path]
) -> None:
    done = mvmci("bench", file, "--module", guest("exit200"), "--workers", "1", "--budget", "2m")
    assert (done.code, done.out) == (2, b"")
    assert "jobs failed: exit: 200" in done.err
    assert left(mvmci) == []


def test_no_report_is_written_over_what_is_measured(mvmci: Mvmci, file: Path) -> None:
    done = mvmci("bench", file, "--save", file.parent / ".." / file.parent.name / file.name)
    assert (done.code, file.read_text()) == (2, PEER)
    assert "it is named twice" in done.err


@pytest.fixture(scope="module")
def access() -> str:
    """One of its workers takes no jobs of those that are measured."""
    return "workers: [{count: 2, slots: 2}, {name: gpu, count: 1, slots: 1, queues: [gpu]}]\n"


def test_a_cluster_that_is_up_is_measured_as_it_is(loaded: Cluster) -> None:
    before = loaded.mvmci.look("ps")
    done = loaded.mvmci("bench", "--profile", "light", "--budget", "2m", "--json")
    assert done.code == 0, done
    report = decode(done.out)
    assert (report.against, [one.name for one in report.candidates]) == ("demo", ["demo"])
    assert report.verdict.access == ""
    assert report.verdict.unseen
    assert report.counted.submitted == report.counted.ended_once
    assert [one["pid"] for one in loaded.mvmci.look("ps")["units"]] == [one["pid"] for one in before["units"]]
