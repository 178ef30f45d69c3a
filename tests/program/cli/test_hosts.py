"""Hosts as they are: whatever its umask, limits, signals and streams, a verb works or says why."""

from __future__ import annotations

import dataclasses
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.places import need
from tests.harness.program import Mvmci, fresh, steps
from tests.harness.waiting import until

Guest = Callable[[str], Path]
PASSABLE = {"_host", "_host/slots", "_host/slots/0", "_host/code"}


def through_bash(mvmci: Mvmci, script: str) -> Mvmci:
    return dataclasses.replace(mvmci, prefix=("bash", "-c", script, "bash"))


def with_umask(program: Mvmci, umask: str, **changes: Path) -> Mvmci:
    return dataclasses.replace(through_bash(program, f'umask {umask}; exec "$@"'), **changes)


@pytest.mark.parametrize("umask", ["077", "000"])
def test_jobs_run_and_nothing_is_open_whatever_the_umask(
    program: Mvmci, script: Path, tmp_path: Path, umask: str
) -> None:
    state = tmp_path / "made" / "state"
    step = {"exec": {"argv": ["sh", "-c", "umask; echo >made"]}}
    done = with_umask(program, umask, state=state)(
        "run", script, "--allow-exec", "sh", "--input", steps(step)
    )
    assert (done.code, done.json[0]["stdout"]) == (0, "0022\n"), done
    for path in (state.parent, state, *state.rglob("*")):
        mode, name = stat.S_IMODE(path.stat().st_mode), str(path.relative_to(state.parent))
        if path.is_dir():
            assert mode == (0o711 if name.partition("/")[2] in PASSABLE else 0o700), name
        else:
            assert mode == (0o444 if path.suffix == ".cwasm" else 0o600), name


def test_a_home_that_is_new_is_not_left_open_by_the_umask(program: Mvmci, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    done = with_umask(program, "000", home=home, state=home / "state")("version")
    assert done.code == 0, done
    assert stat.S_IMODE((home / ".cache").stat().st_mode) == 0o700


# ---- Streams

CLOSED = "the output cannot be written: it is closed"
FULL = "the output cannot be written: No space left on device"


LOST = "exec 3> >(:); wait $!;"  # from here on, the reader of 3 has gone
GONE = ">&3 3>&-"


@pytest.fixture(scope="module")
def a_job(mvmci: Mvmci, guest: Guest) -> str:
    """One that `list` shows."""
    job = fresh("there")
    assert mvmci("run", guest("hello"), "--id", job).code == 0
    return job


@pytest.mark.parametrize(
    ("redirect", "verb", "code", "said"),
    [
        (">/dev/full", "version", 125, FULL),
        (">/dev/full", "list --local", 125, FULL),
        (">/dev/full", "--help", 125, FULL),
        (">/dev/full", "run", 125, FULL),
        (">&-", "version", 125, CLOSED),
        (">&-", "run", 125, CLOSED),
        ("2>&-", "version", 0, ""),
        ("2>&-", "run", 0, ""),
        ("2>&-", "status nothing --local", 2, ""),
        ("2>/dev/full", "status nothing --local", 2, ""),
        ("<&-", "version", 0, ""),
        ("<&-", "run", 0, ""),
        ("<&-", "run --stdin -", 2, "standard input cannot be read: it is closed"),
        ("<&- >&- 2>&-", "run", 125, ""),
        (GONE, "version", 141, ""),
        (GONE, "list --local", 141, ""),
        (GONE, "--help", 141, ""),
        (GONE, "run", 141, ""),
    ],
)
def test_a_stream_that_is_full_closed_or_gone_is_a_sentence_and_a_code(
    mvmci: Mvmci, guest: Guest, a_job: str, redirect: str, verb: str, code: int, said: str
) -> None:
    words = verb.split()
    if words[0] == "run":
        words.insert(1, str(guest("hello")))
    done = through_bash(mvmci, f'{LOST} "$@" {redirect}')(*words)
    assert done.code == code, done
    assert said in done.err
    assert "bug" not in done.err
    assert "Traceback" not in done.err


# ---- Signals


def test_a_signal_that_was_ignored_at_the_start_stays_so(mvmci: Mvmci, guest: Guest) -> None:
    nohup = through_bash(mvmci, """trap '' HUP INT TERM; exec "$@" """)
    running = nohup.start("run", guest("sleeper"), "--", "500", "4")
    running.hears("tick 0\n")
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        running.signal(signum)
    done = running.end()
    assert (done.code, done.text) == (0, "tick 0\ntick 1\ntick 2\ntick 3\n"), done


# ---- Limits

FORBIDS_MAKING_CODE = """
import ctypes, os, sys
assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0  # as MemoryDenyWriteExecute= of systemd does
os.execvp(sys.argv[1], sys.argv[1:])
"""
LIMITS = {
    "address space": (("bash", "-c", 'ulimit -v 4000000; exec "$@"', "bash"), "raise `ulimit -v`"),
    "open files": (("bash", "-c", 'ulimit -n 64; exec "$@"', "bash"), "64 open files"),
    "code": ((sys.executable, "-c", FORBIDS_MAKING_CODE), "MemoryDenyWriteExecute=no"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_host_that_can_run_no_guest_says_so_and_the_job_goes_on_elsewhere(
    alone: Mvmci, guest: Guest, limit: str
) -> None:
    prefix, said = LIMITS[limit]
    if limit == "code":
        unable = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
        need(not unable, "this kernel cannot forbid code to be made (6.3 can)")
    limited = dataclasses.replace(alone, prefix=prefix)
    order = ("run", guest("hello"), "--id", "a")
    done = limited(*order)
    assert done.code == 125
    assert "Error: this host" in done.err
    assert said in done.err
    told = limited("doctor", "--json")
    assert told.code == 1
    (found,) = (check for check in told.json if check["name"] == "guests")
    assert not found["ok"]
    assert said in f"{found['found']} {found['hint']}"
    assert alone(*order).code == 0


def test_a_soft_limit_of_open_files_is_raised(alone: Mvmci, guest: Guest) -> None:
    done = through_bash(alone, 'ulimit -Sn 64; exec "$@"')("run", guest("hello"))
    assert (done.code, done.text) == (0, "arg hello.wasm\n"), done


# ---- The cache


def test_a_cache_that_is_cleaned_under_a_process_is_put_back(
    alone: Mvmci, guest: Guest, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    there, end = os.pipe()
    try:
        running = alone.start("run", guest("hello"), "--stdin", "-", stdin=there, SHIV_ROOT=str(root))
        os.write(end, b"x")
        until(lambda: not select.select([there], [], [], 0)[0])  # it has read that, and waits for more
        shutil.rmtree(root)
    finally:
        os.close(there)
        os.close(end)
    done = running.end()
    assert (done.code, done.text) == (0, "arg hello.wasm\nx"), done
    assert {path.name for path in root.iterdir()} == {
        ".mvmci_lock",
        *(path.name for path in root.glob("mvmci_*")),
    }


# ---- Python


def test_a_python_that_needs_a_library_path_runs_guests_too(
    alone: Mvmci, guest: Guest, tmp_path: Path
) -> None:
    python = tmp_path / "python3"
    python.write_text(
        f"""#!/bin/bash
        [ "$LD_LIBRARY_PATH" = /opt/python/lib ] || {{ echo "cannot open libpython.so" >&2; exit 127; }}
        exec -a "$0" {alone.python} "$@"
        """
    )
    python.chmod(0o755)
    needing = dataclasses.replace(alone, python=str(python), env={"LD_LIBRARY_PATH": "/opt/python/lib"})
    done = needing("run", guest("hello"))
    assert (done.code, done.text) == (0, "arg hello.wasm\n"), done
