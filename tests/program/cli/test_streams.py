"""What goes into a guest and what comes out of it: streams, arguments, workspace, artifacts, logs."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.program import Mvmci, assert_sentence, fresh, steps
from tests.harness.waiting import until

Guest = Callable[[str], Path]


def test_a_guest_has_the_variables_and_files_it_was_given_and_no_others(
    mvmci: Mvmci, guest: Guest, tmp_path: Path
) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a").mkdir()
    (tmp_path / "skipped.log").write_text("")
    (tmp_path / ".mvmciignore").write_text("*.log\n")
    done = mvmci("run", guest("hello"), "--env", "A=1", "--env", "B=x=y z", "--env", "C=", "--dir", tmp_path)
    assert done.code == 0
    files = ["file .mvmciignore", "file a", "file b.txt"]
    assert done.text.splitlines() == ["arg hello.wasm", "env A=1", "env B=x=y z", "env C=", *files]


def test_stdin_is_empty_unless_given(mvmci: Mvmci, guest: Guest) -> None:
    done = mvmci("run", guest("hello"), stdin=b"not for the guest")
    assert done.text == "arg hello.wasm\n"


BYTES = bytes(range(256)) * 5000


def test_stdin_comes_from_a_file_byte_by_byte(mvmci: Mvmci, guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BYTES)
    done = mvmci("run", guest("hello"), "--stdin", tmp_path / "in")
    assert done.out == b"arg hello.wasm\n" + BYTES


def test_stdin_comes_from_a_pipe_byte_by_byte(mvmci: Mvmci, guest: Guest) -> None:
    done = mvmci("run", guest("hello"), "--stdin", "-", stdin=BYTES)
    assert done.out == b"arg hello.wasm\n" + BYTES


def test_waiting_for_stdin_can_be_interrupted(mvmci: Mvmci, guest: Guest) -> None:
    there, never = os.pipe()
    try:
        running = mvmci.start("run", guest("hello"), "--stdin", "-", stdin=there)
        os.write(never, b"x")
        until(lambda: not select.select([there], [], [], 0)[0])  # it has read that, and waits for more
        running.signal(signal.SIGINT)
        done = running.end()
        assert (done.code, done.out, done.err.strip()) == (130, b"", "")
    finally:
        os.close(there)
        os.close(never)


def test_options_come_from_variables_too(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("variable")
    done = mvmci("run", guest("sleeper"), "--", "10", MVMCI_TIMEOUT="1s", MVMCI_ID=job)
    assert done.code == 124
    assert mvmci.status(job)["reason"] == "timeout: more than 1s"


def test_a_preview_2_component_is_a_command(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("component")
    done = mvmci("run", guest("component"), "--id", job)
    assert done.code == 0
    assert mvmci.status(job)["kind"] == "command"
    assert mvmci("run", guest("component"), "--", "one").code == 1


def test_tmp_is_empty_at_first_and_every_job_has_its_own(mvmci: Mvmci, guest: Guest) -> None:
    for _ in range(2):
        done = mvmci("run", guest("files"))
        assert (done.code, done.text.splitlines()[-1]) == (0, "moved moved.txt")
    mvmci.assert_slots_are_clean()


# ---- Artifacts


def test_no_artifact_is_a_warning(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("no-artifacts")
    assert mvmci("run", guest("files"), "--id", job, "--artifact", "*.json").code == 0
    done = mvmci("artifacts", job, "--local")
    assert (done.code, done.out) == (0, b"")
    assert done.err == f"warning: {job} left no artifacts\n"


def test_artifacts_do_not_leave_their_directory_by_a_link(mvmci: Mvmci, guest: Guest, tmp_path: Path) -> None:
    job = fresh("artifacts")
    assert mvmci("run", guest("files"), "--id", job, "--artifact", "a").code == 0
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    assert_sentence(mvmci("artifacts", job, "--local", "--output", tmp_path / "out"), 2, "would lie outside")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_a_failed_job_left_is_kept_too(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("failed")
    args = ["--id", job, "--dir", guest("hello").parent.parent.parent / "mvmci" / "wit", "--artifact", "**"]
    assert mvmci("run", guest("exit"), *args, "--", "7").code == 1
    assert mvmci("artifacts", job, "--local").text == "workflow.wit\n"


# ---- Logs


@pytest.mark.parametrize("attempt", ["1", "2"])
def test_logs_of_one_attempt_can_be_asked_for(mvmci: Mvmci, guest: Guest, attempt: str) -> None:
    job = fresh("attempts")
    order = ["run", guest("sleeper"), "--id", job, "--", "50", "10"]
    first = mvmci.start(*order)
    first.hears("tick 1\n")
    first.kill()
    assert mvmci(*order).code == 0
    ticks = [f"tick {number}" for number in range(10)]
    lines = mvmci("logs", job, "--local", "--attempt", attempt).text.splitlines()
    assert lines == (ticks[: len(lines)] if attempt == "1" else ticks)
    assert mvmci("logs", job, "--local").text.splitlines() == ticks


def test_logs_of_a_workflow_are_on_stderr_and_once_whatever_happened(mvmci: Mvmci, script: Path) -> None:
    job = fresh("logs")
    several = [{"log": "first"}, {"sleep": 300}, {"log": "second"}, {"sleep": 300}, {"log": "third"}]
    order = ["run", script, "--id", job, "--input", steps(*several)]
    running = mvmci.start(*order)
    running.hears("second\n", "err")
    running.kill()
    assert mvmci(*order).code == 0
    logs = mvmci("logs", job, "--local", "-f")
    assert (logs.out, logs.err) == (b"", "first\nsecond\nthird\n")


def test_a_reader_that_goes_away_does_no_harm(mvmci: Mvmci, guest: Guest) -> None:
    job = fresh("gone")
    assert mvmci("run", guest("sleeper"), "--id", job, "--", "1", "100").code == 0
    there, end = os.pipe()
    os.close(there)
    command = [mvmci.python, str(mvmci.zipapp), "logs", job, "--local"]
    done = subprocess.run(
        command, env=mvmci.environment(), stdout=end, stderr=subprocess.PIPE, check=False, text=True
    )
    os.close(end)
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr
