"""Each limit ends its own job with its name, while a job beside it notices nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mvmci.system.text import one_line
from tests.harness.program import Mvmci, Outcome, Running, fresh, steps

Guest = Callable[[str], Path]

# 2 to the power of 10 processes if nobody stops it, each for half a minute.
BOMB = "bomb() { [ $1 -gt 0 ] && { bomb $(($1 - 1)) & bomb $(($1 - 1)) & }; sleep 30.5; }; bomb 9"


@pytest.fixture(scope="module")
def neighbour(mvmci: Mvmci, guest: Guest) -> Iterator[Running]:
    """A job that counts for as long as the tests of this module run."""
    running = mvmci.start("run", guest("sleeper"), "--id", fresh("neighbour"), "--", "20")
    running.hears("tick 0\n")
    yield running
    running.signal(signal.SIGTERM)
    done = running.end()
    assert done.code == 128 + signal.SIGTERM
    lines = done.text.splitlines()
    assert lines == [f"tick {number}" for number in range(len(lines))]


@pytest.fixture
def limited(mvmci: Mvmci, neighbour: Running) -> Iterator[Callable[..., tuple[Outcome, Any]]]:
    """Runs a job, and gives how it ended and its status."""

    def run(*args: str | Path) -> tuple[Outcome, Any]:
        job = fresh("limited")
        done = mvmci("run", args[0], "--id", job, *args[1:])
        status = mvmci.status(job)
        if done.code:
            said = one_line(f"{job} {status['status']}: {status['reason']}".rstrip())
            assert done.err.rstrip().removesuffix("\\n").endswith(said)
        assert "Traceback" not in done.err or "Traceback" in status["reason"]
        return done, status

    yield run
    # What is heard now was printed after the limit was reached.
    neighbour.hears("tick ", after=len(neighbour.said()))
    assert neighbour.alive
    assert [one for one in mvmci.processes() if "sleep\\x00" in one] == []


def assert_failed(done: Outcome, status: Any, limit: str) -> None:
    assert (done.code, status["status"]) == (1, "failed")
    assert status["reason"].startswith(f"{limit}: ")


def test_an_endless_loop_ends_with_its_time(limited: Any, guest: Guest) -> None:
    done, status = limited(guest("loop"), "--timeout", "2s")
    assert (done.code, status["status"]) == (124, "timed_out")
    assert status["reason"] == "timeout: more than 2s"


def test_an_endless_workflow_ends_with_its_time(limited: Any, script: Path) -> None:
    done, status = limited(script, "--timeout", "3s", "--input", steps({"loop": None}))
    assert (done.code, status["status"]) == (124, "timed_out")
    assert status["reason"] == "timeout: more than 3s"


def test_a_program_that_never_ends_ends_with_the_jobs_time(limited: Any, script: Path) -> None:
    step = {"exec": {"argv": ["sleep", "61.25"], "timeout_ms": 0}}
    done, status = limited(script, "--timeout", "3s", "--allow-exec", "sleep", "--input", steps(step))
    assert (done.code, status["reason"]) == (124, "timeout: more than 3s")


def test_endless_memory_is_refused(limited: Any, guest: Guest) -> None:
    done, status = limited(guest("memory"), "--memory", "64MiB")
    assert_failed(done, status, "memory")
    assert done.text.startswith("no more memory after ")


def test_endless_output_is_cut_off(limited: Any, guest: Guest) -> None:
    done, status = limited(guest("output"), "--output-limit", "1MiB")
    assert_failed(done, status, "output")
    assert len(done.out) == 1 << 20
    assert done.text.startswith("line 0 of an output that has no end\nline 1 of")


def test_endless_output_on_stderr_is_cut_off(limited: Any, guest: Guest) -> None:
    done, status = limited(guest("output"), "--output-limit", "100000", "--", "stderr")
    assert_failed(done, status, "output")
    assert done.out == b""


def test_a_workspace_that_fills_up_ends_its_job(limited: Any, guest: Guest, mvmci: Mvmci) -> None:
    done, status = limited(guest("disk"), "--disk", "32MiB")
    assert_failed(done, status, "workspace")


def test_a_file_that_grows_ends_at_the_workspaces_size(limited: Any, guest: Guest) -> None:
    done, status = limited(guest("disk"), "--disk", "32MiB", "--", "one")
    assert (done.code, status["status"]) == (1, "failed")
    assert status["reason"].startswith(("workspace: ", "exit: 1"))


def test_a_stack_overflow_is_named(limited: Any, guest: Guest) -> None:
    assert_failed(*limited(guest("stack")), "stack")


def test_a_trap_is_named_and_what_came_before_is_kept(limited: Any, guest: Guest) -> None:
    done, status = limited(guest("trap"))
    assert_failed(done, status, "trap")
    assert done.text == "about to trap\n"
    assert status["exit_code"] is None


@pytest.mark.parametrize(("name", "args", "code"), [("exit200", [], 200), ("exit", ["--", "3"], 3)])
def test_an_exit_code_is_passed_on_in_the_status(
    limited: Any, guest: Guest, name: str, args: list[str], code: int
) -> None:
    done, status = limited(guest(name), *args)
    assert (done.code, status["status"]) == (1, "failed")
    assert (status["exit_code"], status["reason"]) == (code, f"exit: {code}")


# ---- Workflows


def test_a_workflow_fails_with_its_own_reason(limited: Any, script: Path) -> None:
    done, status = limited(script, "--input", steps({"fail": "no good"}))
    assert (done.code, status["status"], status["reason"]) == (1, "failed", "no good")


def test_an_exception_is_the_reason(limited: Any, script: Path) -> None:
    done, status = limited(script, "--input", steps({"raise": True}))
    assert (done.code, status["status"]) == (1, "failed")
    assert "RuntimeError: raised by a step" in status["reason"]


def test_a_workflow_that_traps_is_named(limited: Any, script: Path) -> None:
    assert_failed(*limited(script, "--input", steps({"trap": True})), "trap")


def test_a_workflow_that_recurses_for_ever_fails(limited: Any, script: Path) -> None:
    done, status = limited(script, "--input", steps({"recurse": True}))
    assert (done.code, status["status"]) == (1, "failed")
    # Python looks after its own stack, and comes to its end before the guest's.
    assert "Stack overflow" in status["reason"] or status["reason"].startswith("stack: ")


def test_a_workflow_that_grows_for_ever_fails_for_memory(limited: Any, script: Path) -> None:
    assert_failed(*limited(script, "--memory", "128MiB", "--input", steps({"grow": True})), "memory")


def test_a_workflow_that_logs_too_much_is_cut_off(limited: Any, script: Path) -> None:
    several = [{"log": "x" * 999}] * 20
    done, status = limited(script, "--output-limit", "10000", "--input", steps(*several))
    assert_failed(done, status, "output")
    assert done.err.count("x" * 999 + "\n") == 10


def test_a_response_that_is_not_json_never_gets_out(limited: Any, script: Path) -> None:
    done, status = limited(script, "--input", steps({"respond": {"number": 1}}))
    assert (done.code, status["response"]) == (0, {"number": 1})


# ---- Native programs


def run_program(limited: Any, script: Path, *argv: str) -> tuple[Outcome, Any]:
    step = {"exec": {"argv": argv, "timeout_ms": 60_000}}
    found: tuple[Outcome, Any] = limited(script, "--allow-exec", argv[0], "--input", steps(step))
    return found


def test_a_fork_bomb_is_stopped(limited: Any, script: Path) -> None:
    assert_failed(*run_program(limited, script, "sh", "-c", BOMB), "processes")


def test_a_flood_of_a_programs_output_is_stopped(limited: Any, script: Path) -> None:
    assert_failed(*run_program(limited, script, "yes"), "output")


def test_a_program_that_fills_the_workspace_is_stopped(limited: Any, script: Path) -> None:
    step = {"exec": {"argv": ["sh", "-c", "while :; do n=x$n; head -c 1000000 /dev/zero >$n; done"]}}
    done, status = limited(script, "--disk", "32MiB", "--allow-exec", "sh", "--input", steps(step))
    assert_failed(done, status, "workspace")


def test_a_program_that_is_not_allowed_is_denied_with_the_line_to_add(limited: Any, script: Path) -> None:
    done, _ = limited(script, "--input", steps({"exec": {"argv": ["git", "status"]}}))
    assert done.code == 0
    (answer,) = done.json
    assert answer["error"] == "denied"
    assert '"git"' in answer["text"]


def test_a_url_that_is_not_allowed_is_denied_with_the_line_to_add(limited: Any, script: Path) -> None:
    done, _ = limited(script, "--input", steps({"http": {"url": "http://127.0.0.1:9/"}}))
    assert done.code == 0
    (answer,) = done.json
    assert answer["error"] == "denied"
    assert "http://127.0.0.1:9" in answer["text"]
