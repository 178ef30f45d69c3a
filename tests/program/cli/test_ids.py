"""An id names one job for ever: the same order again is the same job, another order is refused."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.program import Mvmci, assert_sentence, fresh, steps
from tests.harness.server import Server

Guest = Callable[[str], Path]


@pytest.mark.parametrize(
    ("name", "rest", "code"), [("hello", ["one"], 0), ("exit", ["3"], 1), ("trap", [], 1), ("exit200", [], 1)]
)
def test_a_finished_command_is_shown_again_and_not_run_again(
    mvmci: Mvmci, guest: Guest, name: str, rest: list[str], code: int
) -> None:
    job = fresh("twice")
    order = ["run", guest(name), "--id", job, "--", *rest]
    first = mvmci(*order)
    before = mvmci.journal(job).read_bytes()
    second = mvmci(*order)
    assert (first.code, second.code) == (code, code)
    assert first.out == second.out
    said = [line for line in first.err.splitlines() if "compiling" not in line]
    assert [
        said[0],
        "it has already ended; this is its recorded result",
        *said[1:],
    ] == second.err.splitlines()
    assert mvmci.journal(job).read_bytes() == before


def test_a_finished_workflow_is_shown_again_and_does_nothing(
    mvmci: Mvmci, script: Path, server: Server
) -> None:
    job = fresh("twice")
    several = [{"http": {"url": f"{server.url}/a"}}, {"log": "x"}, {"random": None}]
    order = ["run", script, "--id", job, *server.allow, "--input", steps(*several)]
    first, second = mvmci(*order), mvmci(*order)
    assert (first.code, first.out, second.code) == (0, second.out, 0)
    assert server.paths() == ["/a"]
    assert mvmci(*order, "--json").json == mvmci.status(job)


def test_a_timed_out_job_stays_timed_out(mvmci: Mvmci, guest: Guest) -> None:
    order = ["run", guest("loop"), "--id", fresh("twice"), "--timeout", "1s"]
    assert [mvmci(*order).code, mvmci(*order).code] == [124, 124]


OTHERS: list[dict[str, Any]] = [
    {"module": "exit"},
    {"rest": ["other"]},
    {"options": ["--env", "A=1"]},
    {"options": ["--timeout", "59m"]},
    {"options": ["--artifact", "*"]},
    {"options": ["--queue", "other"]},
    {"options": ["--dir", "."]},
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_another_order_under_the_same_id_is_refused(
    mvmci: Mvmci, guest: Guest, tmp_path: Path, other: dict[str, Any]
) -> None:
    job = fresh("taken")
    assert mvmci("run", guest("hello"), "--id", job, "--", "one").code == 0
    before = mvmci.journal(job).read_bytes()
    module, rest = guest(other.get("module", "hello")), other.get("rest", ["one"])
    done = mvmci("run", module, "--id", job, *other.get("options", []), "--", *rest, cwd=tmp_path)
    assert_sentence(done, 2, f"the id {job} is taken by another job")
    assert mvmci.journal(job).read_bytes() == before


def test_another_input_under_the_same_id_is_refused(mvmci: Mvmci, script: Path) -> None:
    order = ["run", script, "--id", fresh("taken"), "--input"]
    assert mvmci(*order, steps({"now": 1})).code == 0
    assert_sentence(mvmci(*order, steps({"now": 2})), 2, "is taken by another job")


def test_a_job_that_another_process_runs_is_left_alone(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("held")
    order = ["run", guest("sleeper"), "--id", job, "--", "20"]
    running = mvmci.start(*order)
    running.hears("tick 30\n")
    second = mvmci(*order)
    assert (second.code, second.out) == (5, b"")
    assert f"another process is running {job}" in second.err
    assert "hint: " in second.err
    assert "Traceback" not in second.err
    assert running.alive
    running.hears("tick ", after=len(running.said()))
    status = mvmci.status(job)
    assert (status["status"], status["attempts"]) == ("running", 1)
    running.signal(signal.SIGINT)
    assert running.end().code == 130


def test_different_jobs_run_side_by_side(mvmci: Mvmci, guest: Guest, tmp_path: Path) -> None:
    running = []
    for number in range(3):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / f"only-{number}").write_text("")
        running.append(mvmci.start("run", guest("sleeper"), "--dir", directory, "--", "20"))
    for one in running:
        one.hears("tick 5\n")
    slots = mvmci.state / "_host" / "slots"
    at_work = [sorted(path.name for path in place.glob("work/*")) for place in slots.iterdir()]
    assert sorted(filter(None, at_work)) == [["only-0"], ["only-1"], ["only-2"]]
    for one in running:
        one.signal(signal.SIGTERM)
    assert [one.end().code for one in running] == [143, 143, 143]
    mvmci.assert_slots_are_clean()


def test_the_same_job_started_twice_at_once_runs_once(mvmci: Mvmci, script: Path, server: Server) -> None:
    job = fresh("race")
    several = [{"http": {"url": f"{server.url}/{number}"}} for number in range(5)]
    order = ["run", script, "--id", job, *server.allow, "--input", steps(*several)]
    ends = [one.end() for one in [mvmci.start(*order) for _ in range(3)]]
    assert {one.code for one in ends} <= {0, 5}
    assert 0 in {one.code for one in ends}
    assert server.paths() == [f"/{number}" for number in range(5)]
    for one in ends:
        assert "Traceback" not in one.err
        assert "bug" not in one.err
