"""The reading verbs: their keys are promised to scripts, and they work while a job runs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.program import STATUS_KEYS, TIME, Mvmci, assert_sentence, fresh, steps
from tests.harness.server import Server

Guest = Callable[[str], Path]
READING = ["status", "logs", "history", "artifacts", "replay"]


def test_a_large_result_comes_back_whole(mvmci: Mvmci, script: Path) -> None:
    job = fresh("large")
    steps_ = steps(*[{"now": None}] * 20_000)
    order = ["run", script, "--id", job, "--input"]
    (mvmci.home / "large.json").write_text(steps_)
    done = mvmci(*order, f"@{mvmci.home}/large.json")
    assert (done.code, len(done.json)) == (0, 20_000)
    assert mvmci.status(job)["result"] == done.json


def test_a_running_job_is_seen_from_another_process(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("running")
    running = mvmci.start("run", guest("sleeper"), "--id", job, "--", "20")
    running.hears("tick 30\n")  # by now its lease is written
    status = mvmci.status(job)
    assert (status["status"], status["ended_at"]) == ("running", None)
    assert job in mvmci("list", "--local", "--status", "running").text
    assert mvmci("artifacts", job, "--local").err == f"warning: {job} has not ended\n"
    assert mvmci("replay", job, "--local").code == 2
    running.signal(signal.SIGINT)
    running.end()


def test_list_is_newest_first_and_can_be_narrowed(alone: Mvmci, guest: Guest) -> None:
    assert alone("list", "--local").err == "no jobs\n"
    assert alone("list", "--local", "--json").json == []
    for name, args in (("one", []), ("two", ["--", "1"]), ("three", ["--queue", "other"])):
        queue = args if name == "three" else []
        rest = args if name == "two" else []
        alone("run", guest("exit"), "--id", name, *queue, *rest)
    assert alone.jobs() == ["three", "two", "one"]
    found = alone("list", "--local", "--json", "--limit", "1").json
    assert [list(one) for one in found] == [STATUS_KEYS]
    assert found[0] == alone.status("three")

    def ids(*options: str) -> list[str]:
        return [one["id"] for one in alone("list", "--local", "--json", *options).json]

    assert ids("--status", "failed") == ["two"]
    assert ids("--queue", "default") == ["two", "one"]
    assert ids("--queue", "default", "--limit", "1") == ["two"]
    assert alone("list", "--local", "--limit", "3").err == ""
    less = alone("list", "--local", "--limit", "2")
    assert less.err == "the newest 2; there are more, and --limit 0 lists all\n"
    table = alone("list", "--local").text.splitlines()
    assert [line.split()[0] for line in table] == ["ID", "three", "two", "one"]


def test_history_has_every_record_with_its_time(mvmci: Mvmci, script: Path) -> None:
    job = fresh("history")
    several = [{"sleep": 1}, {"exec": {"argv": ["true"]}}]
    assert mvmci("run", script, "--id", job, "--allow-exec", "true", "--input", steps(*several)).code == 0
    records = mvmci("history", job, "--local", "--json").json
    kinds = [one["record"] for one in records]
    assert kinds == ["spec", "lease", "intent", "result", "intent", "result", "done"]
    assert all(TIME.fullmatch(one["at"]) for one in records)
    assert [one["kind"] for one in records if one["record"] == "intent"] == ["sleep", "exec"]
    assert [one["index"] for one in records if one["record"] == "result"] == [0, 1]
    told = mvmci("history", job, "--local")
    assert [line.split()[1] for line in told.text.splitlines()] == kinds


def test_a_replay_is_identical_and_does_nothing(mvmci: Mvmci, script: Path, server: Server) -> None:
    job = fresh("replay")
    url = server.url
    several = [{"http": {"url": f"{url}/a"}}, {"now": None}, {"random": None}, {"log": "x"}, {"sleep": 5}]
    order = ["run", script, "--id", job, "--allow-http", f"{url}/*", "--input", steps(*several)]
    assert mvmci(*order).code == 0
    before = mvmci.journal(job).read_bytes()
    done = mvmci("replay", job, "--local")
    assert (done.code, done.text, done.err) == (0, "identical\n", "2 effects\n")
    assert server.paths() == ["/a"]
    assert mvmci.journal(job).read_bytes() == before


@pytest.mark.parametrize("end", [{"fail": "no"}, {"raise": True}, {"trap": True}])
def test_a_failed_workflow_replays_as_well(mvmci: Mvmci, script: Path, end: dict[str, object]) -> None:
    job = fresh("replay")
    assert mvmci("run", script, "--id", job, "--input", steps({"sleep": 1}, end)).code == 1
    assert mvmci("replay", job, "--local").text == "identical\n"


def test_a_workflow_whose_time_was_up_replays_as_far_as_it_came(mvmci: Mvmci, script: Path) -> None:
    job = fresh("replay")
    several = [{"sleep": 1}, {"sleep": 9000}]
    assert mvmci("run", script, "--id", job, "--timeout", "2s", "--input", steps(*several)).code == 124
    assert mvmci("replay", job, "--local").text == "identical\n"


@pytest.mark.parametrize("verb", READING)
def test_a_malformed_id_is_a_usage_error(mvmci: Mvmci, verb: str) -> None:
    assert_sentence(mvmci(verb, "../jobs", "--local"), 2, "'../jobs' cannot be a job id")


@pytest.mark.parametrize("verb", [*READING, "list"])
def test_without_a_cluster_the_reading_verbs_say_so(mvmci: Mvmci, verb: str) -> None:
    args = [] if verb == "list" else ["unknown"]
    assert_sentence(mvmci(verb, *args), 6, "no cluster is known here", "--local")


def test_reading_an_unknown_job_leaves_nothing(alone: Mvmci) -> None:
    for verb in READING:
        alone(verb, "unknown", "--local")
    assert alone.jobs() == []
    assert not (alone.state / "_local" / "jobs").exists()


def test_who_follows_the_output_of_a_job_that_failed_is_told_so(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("failed")
    mvmci("run", guest("exit"), "--id", job, "--", "3")
    done = mvmci("logs", job, "--local", "-f")
    assert done.code == 0
    assert f"{job} failed: exit: 3" in done.err
