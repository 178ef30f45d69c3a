"""What the verbs do with a job, wherever it runs: here with `run`, or on a cluster with `submit --wait`."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness.program import (
    STATUS_KEYS,
    TIME,
    Mvmci,
    Outcome,
    Running,
    assert_sentence,
    fresh,
    steps,
)

Guest = Callable[[str], Path]


@dataclass(frozen=True)
class Place:
    """Where jobs run: how one is run to its end there, and the option of verbs that look at one."""

    mvmci: Mvmci
    run: tuple[str, ...]
    where: tuple[str, ...]

    def start(self, *args: str | Path) -> Running:
        return self.mvmci.start(*self.run, *args)

    def __call__(self, *args: str | Path) -> Outcome:
        return self.mvmci(*self.run, *args)

    def ask(self, verb: str, *args: str | Path) -> Outcome:
        return self.mvmci(verb, *self.where, *args)

    def status(self, job: str) -> Any:
        done = self.ask("status", job, "--json")
        assert done.code == 0, done
        return done.json

    def kinds(self, job: str) -> list[str]:
        """The kinds of its records."""
        return [record["record"] for record in self.ask("history", job, "--json").json]


@pytest.fixture(scope="module", params=["local", "cluster"])
def place(request: pytest.FixtureRequest, program: Mvmci, tmp_path_factory: pytest.TempPathFactory) -> Place:
    if request.param == "cluster":
        return Place(request.getfixturevalue("demo").mvmci, ("submit", "--wait"), ())
    local = dataclasses.replace(program, state=tmp_path_factory.mktemp("local") / "state")
    return Place(local, ("run",), ("--local",))


@pytest.fixture
def endless(place: Place, guest: Guest) -> Iterator[Callable[[str], Running]]:
    """Starts a job that prints for as long as nobody ends it; it is cancelled at the end."""
    jobs = []

    def start(job: str) -> Running:
        jobs.append(job)
        return place.start("--id", job, guest("sleeper"), "--", "15")

    yield start
    place.ask("cancel", *jobs)


# ---- How it ends


def test_both_streams_come_out_apart_and_nothing_else_does(place: Place, guest: Guest) -> None:
    job = fresh("streams")
    done = place("--id", job, guest("hello"), "--", "one", "two words")
    assert done.code == 0
    assert done.text == "arg hello.wasm\narg one\narg two words\n"
    # Beside them, what it compiles and, where it takes long, what the job waits for.
    said = [line for line in done.err.splitlines() if "compiling" not in line]
    assert [line for line in said if not line.startswith(f"{job}: waiting: ")] == [job, "hello on stderr"]
    logs = place.ask("logs", job)
    assert (logs.code, logs.out, logs.err) == (0, done.out, "hello on stderr\n")


def test_the_status_of_a_command_has_the_promised_keys(place: Place, guest: Guest) -> None:
    job = fresh("status")
    assert place("--id", job, guest("exit"), "--", "7").code == 1
    status = place.status(job)
    assert list(status) == STATUS_KEYS
    wanted = {
        "id": job,
        "queue": "default",
        "kind": "command",
        "status": "failed",
        "exit_code": 7,
        "attempts": 1,
        "epoch": 1,
    }
    assert wanted.items() <= status.items()
    for key in ("submitted_at", "started_at", "ended_at"):
        assert TIME.fullmatch(status[key])
    assert status["submitted_at"] <= status["started_at"] <= status["ended_at"]


def test_the_status_of_a_workflow_has_its_result_response_and_progress(place: Place, script: Path) -> None:
    job = fresh("status")
    several = [{"respond": {"url": "x"}}, {"progress": [1, 2, "half"]}, {"log": "talk"}]
    done = place("--id", job, script, "--input", steps(*several), "--json")
    assert done.code == 0
    assert "talk" in done.err.splitlines()
    assert done.json == place.status(job)
    assert done.json["result"] == [None, None, None]
    assert done.json["response"] == {"url": "x"}
    assert done.json["progress"] == {"done": 1, "total": 2, "message": "half"}
    assert done.json["exit_code"] is None


def test_a_result_is_printed_alone_on_stdout(place: Place, script: Path) -> None:
    done = place(script, "--input", steps({"log": "talk"}, {"random": None}))
    assert done.code == 0
    nothing, number = done.json
    assert nothing is None
    assert 0 <= number < 1 << 64


def test_a_job_whose_time_is_up_is_124(place: Place, guest: Guest) -> None:
    job = fresh("timeout")
    done = place("--id", job, guest("loop"), "--timeout", "1s")
    assert done.code == 124
    assert f"{job} timed_out: timeout: more than 1s" in done.err
    assert place.status(job)["status"] == "timed_out"


def test_a_job_has_the_files_of_its_directory_and_leaves_artifacts(
    place: Place, guest: Guest, tmp_path: Path
) -> None:
    job = fresh("artifacts")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "top.txt").write_text("mine")
    done = place("--id", job, guest("files"), "--dir", tmp_path / "in", "--artifact", "a/**/*.txt")
    assert done.code == 0
    listed = place.ask("artifacts", job, "--json").json
    assert [(one["path"], one["size"]) for one in listed] == [("a/b/c.txt", 10), ("a/d.txt", 8)]
    for _ in range(2):  # a second time replaces them
        written = place.ask("artifacts", job, "--output", tmp_path / "new" / "out")
        assert (written.code, written.text.split()) == (0, ["a/b/c.txt", "a/d.txt"])
    assert (tmp_path / "new/out/a/b/c.txt").read_text() == "a/b/c.txt\n"
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["top.txt"]
    assert (tmp_path / "in" / "top.txt").read_text() == "mine"


# ---- Under one id


def test_the_same_order_twice_is_one_job(place: Place, guest: Guest) -> None:
    job = fresh("twice")
    assert [place("--id", job, guest("exit"), "--", "3").code for _ in range(3)] == [1, 1, 1]
    assert (place.kinds(job).count("spec"), place.kinds(job).count("lease")) == (1, 1)


@pytest.mark.parametrize("other", [["--queue", "other"], ["--", "one"], ["--env", "A=b"]], ids=str)
def test_another_order_under_the_same_id_is_refused(place: Place, guest: Guest, other: list[str]) -> None:
    job = fresh("taken")
    assert place("--id", job, guest("exit")).code == 0
    assert_sentence(place("--id", job, guest("exit"), *other), 2, f"the id {job} is taken by another job")
    assert_sentence(place("--id", job, guest("hello")), 2, f"the id {job} is taken by another job")


# ---- Looking at it


def test_output_is_live_and_who_only_waits_can_be_interrupted(
    place: Place, endless: Callable[[str], Running]
) -> None:
    running = endless(fresh("live"))
    running.hears("tick 30\n")
    assert running.alive
    running.signal(signal.SIGINT)
    assert running.end().code == 130


def test_logs_follow_a_running_job_without_gap_or_repetition(
    place: Place, endless: Callable[[str], Running]
) -> None:
    job = fresh("follow")
    running = endless(job)
    running.hears("tick 10\n")
    followers = [place.mvmci.start("logs", *place.where, job, "-f") for _ in range(2)]
    followers[0].hears("tick 50\n")
    followers.append(place.mvmci.start("logs", *place.where, job, "--follow"))
    for follower in followers:
        follower.hears("tick 100\n")
    assert place.ask("cancel", job).code == 0
    ticks = running.end().text.splitlines()
    assert ticks == [f"tick {number}" for number in range(len(ticks))]
    for follower in followers:
        done = follower.end()
        assert done.code == 0
        assert done.text.splitlines() == ticks
    assert place.ask("logs", job).text.splitlines() == ticks


def test_history_has_every_record_and_a_replay_is_identical(place: Place, script: Path) -> None:
    job = fresh("history")
    assert (
        place("--id", job, script, "--input", steps({"sleep": 1}, {"random": None}, {"now": None})).code == 0
    )
    records = place.ask("history", job, "--json").json
    kinds = [one["record"] for one in records]
    assert kinds == ["spec", "lease", "intent", "result", "done"]
    assert all(TIME.fullmatch(one["at"]) for one in records)
    assert [line.split()[1] for line in place.ask("history", job).text.splitlines()] == kinds
    assert place.ask("replay", job).text == "identical\n"
    assert place.ask("history", job, "--json").json == records


@pytest.mark.parametrize("verb", ["status", "logs", "history", "artifacts", "replay", "cancel"])
def test_an_unknown_id_is_a_usage_error(place: Place, verb: str) -> None:
    done = place.ask(verb, "unknown")
    assert_sentence(done, 2, "there is no job unknown")
    assert "--local" not in done.err or place.where


def test_a_command_cannot_be_replayed(place: Place, guest: Guest) -> None:
    job = fresh("command")
    assert place("--id", job, guest("exit")).code == 0
    assert_sentence(place.ask("replay", job), 2, f"{job} cannot be replayed: it is a command")
