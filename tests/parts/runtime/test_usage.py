"""What a process and its family have used, as Linux counts it: while it computes, is stopped, has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mvmci.system import usage
from tests.harness.waiting import until

MS = 1_000
BURN = "while True: pass"
BURN_100_MS = "import time\nwhile time.process_time() < 0.1: pass"
Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start Python with a program; its process."""
    with ExitStack() as ending:

        def start_one(program: str) -> int:
            command = [sys.executable, "-S", "-c", program]
            process = ending.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            )
            ending.callback(os.killpg, process.pid, signal.SIGKILL)
            return process.pid

        yield start_one


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_that_computes_runs_and_one_that_is_stopped_does_not(start: Start) -> None:
    pid = start(BURN)
    until(lambda: usage.process(pid).loop_ran_us > 100 * MS)
    before = usage.process(pid)
    until(lambda: usage.process(pid).loop_ran_us > before.loop_ran_us + 50 * MS)
    until(lambda: usage.process(pid).cpu_us > before.cpu_us)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state(pid) == "T")
    stopped = usage.process(pid)
    busy = usage.machine().busy_us
    until(lambda: usage.machine().busy_us > busy)  # time passes
    assert usage.process(pid) == stopped


def test_a_process_whose_name_is_no_text_is_counted_as_any_other(start: Start) -> None:
    pid = start(f"open('/proc/self/comm', 'wb').write(b'\\xff) \\xc3')\n{BURN}")
    until(lambda: b"\xff" in Path(f"/proc/{pid}/stat").read_bytes())
    until(lambda: usage.process(pid).cpu_us > 0)


def test_what_children_use_is_counted_while_they_live_and_once_they_have_ended(start: Start) -> None:
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN_100_MS!r}])\n"
    ended = start(child + "sys.stdin.read()")
    until(lambda: usage.process(ended).children_us >= 90 * MS)  # it counts in steps of 10 ms
    living = start(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])")
    until(lambda: usage.process(living).children_us > 100 * MS)
    own = usage.process(living)
    assert own.memory_bytes > usage._resident(living)
    assert own.files >= 3


def test_of_a_process_that_has_ended_all_is_zero() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    used = usage.process(process.pid)
    assert (used.loop_ran_us, used.cpu_us, used.memory_bytes, used.files) == (0, 0, 0, 0)


def test_a_machine_has_processors_memory_and_one_start() -> None:
    found = usage.machine()
    assert found.processors == os.cpu_count()
    assert 0 < found.free_bytes <= found.memory_bytes
    assert found.boot == usage.machine().boot == usage.boot_id()
    assert len(found.boot) == 36
    assert found.busy_us > 0
