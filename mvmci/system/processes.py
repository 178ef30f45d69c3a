"""Processes that other processes know by a file: whom a number means, and how we are started again.

A process id is used again. With its start time beside it, it means one process for ever; a signal goes
through a pidfd, which was compared with that time after it was opened.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

import mvmci
from mvmci.errors import Usage

KEPT = ("MVMCI_LOG",)  # how much units say
_START_TIME = 19  # of the fields of /proc/<pid>/stat behind the command's name


def mend_program() -> None:
    """See that the files that this program is made of are there. The zipapp puts in how."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """One process, now or in the past."""

    pid: int
    started: int  # in ticks since the machine started


def heeded(*signums: int) -> list[int]:
    """Those of `signums` that were not ignored when this process was started, or since."""
    return [signum for signum in signums if signal.getsignal(signum) is not signal.SIG_IGN]


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


def runs_zipapp() -> bool:
    """Whether we run from the one file, not from a source tree."""
    return zipfile.is_zipfile(sys.argv[0])


def this_program() -> list[str]:
    """How to start this program again: the zipapp, or the package that runs now."""
    isolated = [flag for flag, on in (("-I", sys.flags.isolated), ("-S", sys.flags.no_site)) if on]
    if runs_zipapp():
        return [sys.executable, *isolated, os.path.abspath(sys.argv[0])]
    return [sys.executable, *isolated, "-m", "mvmci"]


def program_file() -> Path:
    """The one file that mvmci is. Raises Usage where it runs from its source."""
    path = Path(sys.argv[0]).resolve()
    if not zipfile.is_zipfile(path):
        raise Usage(
            "other machines get the one file that mvmci is, and this one runs from its source",
            hint="use mvmci.pyz, which `./just zipapp` builds",
        )
    return path


def program_digest(program: Sequence[str] = ()) -> str:
    """What tells this build, or that of `program`, from another one: the zipapp's SHA-256, or the version
    of a source tree. Raises OSError."""
    for path in program[1:] if program else sys.argv[:1]:  # the first word of a program is Python
        if zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return mvmci.__version__


def clean_environment(root: Path) -> dict[str, str]:
    """Ours, for processes that stay: without options that were meant for this call alone."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MVMCI_") or key in KEPT}
    env["MVMCI_STATE"] = str(root)
    return env | _source(env)


def _source(env: Mapping[str, str]) -> dict[str, str]:
    """Where `-m mvmci` finds the package, whatever the directory; the zipapp finds itself."""
    if runs_zipapp():
        return {}
    here = str(Path(mvmci.__file__).resolve().parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (here, env.get("PYTHONPATH"))))}
