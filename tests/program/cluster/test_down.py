"""How a cluster ends, and how it is to be in front of it: `down`, Ctrl-C, its terminal, its keeper killed."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mvmci.runtime import GRACE_S
from tests.harness.cluster import BUSY, SMALLEST, Cluster
from tests.harness.ports import own_port
from tests.harness.program import Mvmci, assert_sentence
from tests.harness.waiting import LONG_S, until

Make = Callable[..., Cluster]
Guest = Callable[[str], Path]


def test_down_leaves_no_process_no_port_and_no_file_but_the_data(cluster: Make) -> None:
    demo = cluster()
    url = demo.up("--json").json["url"]
    jobs, pids = demo.jobs(), demo.pids()
    ours = [demo.folder / "units" / name / "identity.json" for name in pids if name != "broker-1"]
    before = [path.read_bytes() for path in ours]
    assert demo.down().text == "demo is down\n"
    demo.assert_nothing_is_left()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    host, _, port = url.removeprefix("nats://").rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)
    assert set(demo.states().values()) == {"down"}
    assert demo.down().text == "nothing of demo was running\n"
    for verb in (("list",), ("ticket", "ls"), ("drain", "worker-1")):
        assert_sentence(demo.mvmci(*verb), 6, "demo is down here", f"`mvmci up {demo.file}` starts it")
    # And all of it comes back: jobs, port, and who the units are.
    assert demo.up("--json").json["url"] == url
    assert [path.read_bytes() for path in ours] == before
    assert set(jobs) < set(demo.jobs())
    done = demo.down("--purge")
    assert done.text == f"demo is down\n{demo.folder} was removed\n"
    assert not demo.folder.exists()
    demo.mvmci.assert_nothing_runs()
    assert_sentence(demo.mvmci("down"), 6, "no cluster is known here")


def test_a_grace_that_is_over_hands_jobs_back_and_counts_no_attempt(cluster: Make, guest: Guest) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    demo.up()
    order = ["submit", guest("sleeper"), "--attempts", "1", "--", "50", "100"]
    job = demo.mvmci(*order).text.strip()
    until(lambda: demo.mvmci.look("status", job)["status"] == "running")
    start = time.monotonic()
    demo.down("--grace", "200ms")
    assert time.monotonic() - start < GRACE_S
    demo.assert_nothing_is_left()
    demo.up()
    assert demo.mvmci("wait", job).code == 0
    assert demo.mvmci.look("status", job)["attempts"] == 1


def test_no_unit_outlives_a_killed_supervisor_and_up_goes_on(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    demo.up()
    os.kill(json.loads((demo.folder / "supervisor.json").read_text())["pid"], signal.SIGKILL)
    demo.mvmci.assert_nothing_runs()
    assert set(demo.states().values()) == {"down"}
    assert "+ start broker-1 on local" in demo.up().text
    demo.all_ready()


# ---- In the foreground


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_the_foreground_ctrl_c_brings_it_down(cluster: Make, signum: int, code: int) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    up = demo.mvmci.start("up", demo.file, *BUSY, new_session=True)
    up.hears("demo is ready; Ctrl-C brings it down\n")
    assert "worker-1 is ready\n" in up.said().decode()
    demo.all_ready()
    os.killpg(up.pid, signum)  # as a terminal does it
    done = up.end()
    assert done.code == code
    assert done.err == "bringing demo down; again to hurry\n"
    assert demo.mvmci.processes() == []  # by now, and not a moment later
    demo.assert_nothing_is_left()


def test_in_the_foreground_ctrl_c_before_it_is_ready_brings_it_down_too(cluster: Make) -> None:
    demo = cluster()
    up = demo.mvmci.start("up", demo.file, *BUSY)
    until(lambda: (demo.folder / "units.json").exists())
    up.signal(signal.SIGINT)
    done = up.end()
    assert done.code == 130
    assert "Traceback" not in done.err
    demo.assert_nothing_is_left()


def test_detached_ctrl_c_leaves_what_runs_and_the_same_command_goes_on(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    up = demo.mvmci.start("up", demo.file, *BUSY, "--detach")
    until(lambda: (demo.folder / "units.json").exists())
    up.signal(signal.SIGINT)
    done = up.end()
    assert (done.code, done.err) == (
        130,
        "interrupted: the same command goes on, `mvmci down` stops what runs\n",
    )
    before = {name: pid for name, pid in demo.pids().items() if pid}
    assert before
    demo.up()
    assert before.items() <= demo.pids().items()


def test_in_the_foreground_it_ends_with_its_terminal(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    up = demo.mvmci.start("up", demo.file, *BUSY)
    up.hears("demo is ready")
    up.kill()
    demo.mvmci.assert_nothing_runs()
    demo.assert_nothing_is_left()


def test_in_the_foreground_it_tells_what_becomes_of_the_units_and_ends_with_a_down(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    up = demo.mvmci.start("up", demo.file, *BUSY)
    up.hears("demo is ready")
    heard = len(up.said())
    os.kill(demo.pids()["worker-1"] or 0, signal.SIGKILL)
    up.hears("worker-1 was started again\n", after=heard)
    demo.all_ready()
    demo.down()
    done = up.end()
    assert (done.code, done.err) == (0, "demo was brought down\n")
    demo.assert_nothing_is_left()


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, mvmci: Mvmci, *args: str | Path) -> None:
        self._ours, theirs = pty.openpty()
        command = [mvmci.python, str(mvmci.zipapp), *map(str, args)]
        env = mvmci.environment(TERM="xterm", COLUMNS="120")
        self.process = subprocess.Popen(
            command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def hears(self, text: str) -> None:
        end = time.monotonic() + LONG_S
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            self.shown += os.read(self._ours, 1 << 16).decode(errors="replace")

    def types(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def end(self) -> int:
        try:
            while data := os.read(self._ours, 1 << 16):
                self.shown += data.decode(errors="replace")
        except OSError:
            pass  # nobody is on the other side any more
        os.close(self._ours)
        return self.process.wait(LONG_S)


def test_on_a_terminal_there_is_a_table_that_lives(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    terminal = Terminal(demo.mvmci, "up", demo.file, *BUSY)
    terminal.hears("demo is ready; Ctrl-C brings it down")
    terminal.hears("0/2")
    assert "ISOLATION" in terminal.shown
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    demo.assert_nothing_is_left()


def test_on_a_terminal_it_asks_before_it_stops_something(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "2"))
    demo.up()
    before = demo.pids()
    demo.write(SMALLEST.replace("3", "1"))
    for answer in ("n\n", "\n", signal.SIGINT):
        terminal = Terminal(demo.mvmci, "up", demo.file, *BUSY)
        terminal.hears("go on? [y/N]")
        if isinstance(answer, str):
            terminal.types(answer)
        else:
            os.kill(terminal.process.pid, answer)  # with nothing typed, it ends at once
        assert terminal.end() == 130
        assert demo.pids() == before


def test_in_the_foreground_what_ran_before_goes_on_after_ctrl_c(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "1"))
    demo.up()
    # Every unit starts anew, and with them what keeps them running: that is not ours alone either.
    demo.write(SMALLEST.replace("3", "1") + f"broker: {{listen: '127.0.0.1:{own_port()}'}}\n")
    up = demo.mvmci.start("up", demo.file, *BUSY, "--yes")
    up.hears("demo is ready; Ctrl-C ends this view: it ran before, and goes on\n")
    demo.all_ready()
    before = demo.pids()
    up.signal(signal.SIGINT)
    done = up.end()
    assert (done.code, done.err) == (130, "demo goes on; `mvmci down` stops it\n")
    demo.all_ready()
    assert demo.pids() == before


def test_what_changed_while_it_asked_is_planned_again_and_not_applied(cluster: Make) -> None:
    demo = cluster(SMALLEST.replace("3", "2"))
    demo.up()
    demo.write(SMALLEST.replace("3", "1"))
    terminal = Terminal(demo.mvmci, "up", demo.file, *BUSY)
    terminal.hears("go on? [y/N]")
    demo.up()
    after = demo.pids()
    terminal.types("y\n")
    terminal.hears("demo has changed meanwhile: planned again")
    terminal.hears("nothing to change: 3 units of demo are ready")
    assert terminal.end() == 0
    assert demo.pids() == after
