"""Processes that other processes know by a file: who a number meant, and who dies with whom.

A process id is used again. With its start time beside it, it means one process for ever; a signal goes
through a pidfd, which was compared with that time after it was opened.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

import mvmci

PR_SET_PDEATHSIG = 1
KEPT = ("MVMCI_LOG",)  # how much units say
_libc = ctypes.CDLL(None, use_errno=True)
_START_TIME = 19  # of the fields of /proc/<pid>/stat behind the command's name


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """One process, now or in the past."""

    pid: int
    started: int  # in ticks since the machine started


def this_process() -> Known:
    """Who we are."""
    started = _started(os.getpid())
    assert started is not None
    return Known(pid=os.getpid(), started=started)


def open_alive(known: Known) -> int | None:
    """A pidfd of that very process; None when it has ended. The caller closes it."""
    try:
        pidfd = os.pidfd_open(known.pid)
    except ProcessLookupError:
        return None
    if _started(known.pid) == known.started and not has_ended(pidfd):
        return pidfd
    os.close(pidfd)
    return None


def has_ended(pidfd: int) -> bool:
    """Whether its process has ended, also if nobody has reaped it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[_START_TIME])


def die_with(parent: int, signum: int) -> None:
    """Have the kernel send us `signum` when our parent dies; at once if it already has."""
    _libc.prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


def dying_with_us(signum: int) -> Callable[[], None]:
    """What a child does between fork and exec, so that it does not outlive us."""
    parent = os.getpid()
    return lambda: die_with(parent, signum)


def this_program() -> list[str]:
    """How to start this program again: the zipapp, or the package that runs now."""
    isolated = [flag for flag, on in (("-I", sys.flags.isolated), ("-S", sys.flags.no_site)) if on]
    if zipfile.is_zipfile(sys.argv[0]):
        return [sys.executable, *isolated, os.path.abspath(sys.argv[0])]
    return [sys.executable, *isolated, "-m", "mvmci"]


def clean_environment(root: Path) -> dict[str, str]:
    """Ours, for processes that stay: without options that were meant for this call alone."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MVMCI_") or key in KEPT}
    env["MVMCI_STATE"] = str(root)
    return env | _source(env)


def _source(env: Mapping[str, str]) -> dict[str, str]:
    """Where `-m mvmci` finds the package, whatever the directory; the zipapp finds itself."""
    if zipfile.is_zipfile(sys.argv[0]):
        return {}
    here = str(Path(mvmci.__file__).resolve().parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (here, env.get("PYTHONPATH"))))}
