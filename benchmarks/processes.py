"""Processes: starting and stopping those that the benchmark needs, and what they use, by /proc.

Only the standard library, because peers run this in environments of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
STOP_S = 10.0
START_S = 60.0
LOOK_EVERY_S = 0.02
PDEATHSIG = 1
_libc = ctypes.CDLL(None)

Group = Mapping[str, Sequence[int]]  # a name, and the processes that have it


def start(
    command: Sequence[object], log: Path, *, user: str | None = None, **env: str
) -> subprocess.Popen[bytes]:
    """Start a server that dies with us, whatever becomes of us; what it says goes to `log`."""

    def die_with_parent() -> None:
        _libc.prctl(PDEATHSIG, signal.SIGKILL)

    with log.open("ab") as file:
        return subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=ROOT,
            env={**os.environ, **env},
            user=user,
            preexec_fn=die_with_parent,
            start_new_session=True,  # Ctrl-C is for us alone, and we end it in order
        )


def stop(process: subprocess.Popen[Any], signum: int = signal.SIGTERM) -> None:
    """Ask it to end, and make it when it takes too long."""
    if process.poll() is None:
        process.send_signal(signum)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(there: Callable[[], bool], what: str, *, alive: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until `there()`; raises RuntimeError when it takes too long, or `alive` has ended."""
    end = time.monotonic() + START_S
    while not there():
        if time.monotonic() > end or (alive is not None and alive.poll() is not None):
            raise RuntimeError(f"{what} did not start")
        time.sleep(LOOK_EVERY_S)


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    (port,) = free_ports(1)
    return port


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that are there still."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        texts = [Path(f"/proc/{pid}/task/{thread}/children").read_text() for thread in threads]
    except OSError:
        return []  # it is gone
    return [int(child) for text in texts for child in text.split()]


def family(pid: int, without: Iterable[int] = ()) -> list[int]:
    """`pid` and all that it has started, except those of `without` and what they started."""
    found = [pid]
    for child in children(pid):
        if child not in without:
            found += family(child, without)
    return found


def families(groups: Group) -> dict[str, list[int]]:
    """Each group with all that its processes have started and that no group names."""
    named = {pid for pids in groups.values() for pid in pids}
    return {name: [one for pid in pids for one in family(pid, named)] for name, pids in groups.items()}


def cpu_s(pid: int) -> float:
    """User and system time of `pid`, and of those of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS


def cpu_of(groups: Group) -> dict[str, float]:
    """Seconds of each group so far."""
    return {name: sum(map(cpu_s, pids)) for name, pids in families(groups).items()}


def busy_s() -> float:
    """Seconds that all processors together were busy so far, by whomever."""
    user, nice, system, _idle, _waiting, interrupts, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft) / TICKS


def resident_mb(pid: int) -> float:
    """Megabytes of memory that `pid` has in use, shared pages included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0
