"""What the watch beside the broker promises: it says that there is no room, and starts anew when there is."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvmci.roles import disk_watch
from mvmci.roles.broker import trouble
from mvmci.system.linux import dying_with_us
from tests.harness.waiting import until

SERVER = """
import signal, subprocess, sys
subprocess.Popen([sys.executable, "-I", "-S", *sys.argv[1:]])
signal.pause()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for nats-server, whose child watches `tmp_path`."""
    (tmp_path / disk_watch.LOG).write_bytes(b"[1] an earlier start: no space left on device\n")
    size = str((tmp_path / disk_watch.LOG).stat().st_size)
    disk_watch.say(str(tmp_path), "")
    command = [sys.executable, "-c", SERVER, disk_watch.__file__, str(tmp_path), size]
    with open("/dev/full", "wb") as full:  # its own log lies on the same disk
        process = subprocess.Popen(command, preexec_fn=dying_with_us(), stderr=full)
    yield process
    process.kill()
    process.wait()


def test_a_store_that_could_not_be_written_is_said_and_the_server_starts_anew_when_there_is_room(
    server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert trouble(tmp_path) == ""
    with open(tmp_path / disk_watch.LOG, "ab") as log:
        log.write(b"[1] [ERR] Critical write error: write 1.blk: no space left on device\n")
    until(lambda: trouble(tmp_path), lambda: "nothing is said")
    assert "no space left on device" in trouble(tmp_path)
    assert server.wait(60) == -signal.SIGTERM
