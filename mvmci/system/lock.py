"""One process at a time: a lock that says who holds it, let go of by the kernel however its holder ends."""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from mvmci.errors import LockHeld


def acquire(file: Path, busy: str, hint: str) -> FileLock:
    """The lock of `file`, held. Raises LockHeld: who holds it, before `busy`."""
    lock = FileLock(file, mode=0o600, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockHeld(f"{file.read_text() or 'another process'} {busy}", hint=hint) from None
    return lock


@contextlib.contextmanager
def hold(file: Path, busy: str, hint: str, who: str = "") -> Iterator[None]:
    """Be the only one that has `file`, which says who that is: `who`, or this process. Raises LockHeld."""
    lock = acquire(file, busy, hint)
    since = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    try:
        file.write_text(f"{who or this_one()}, since {since},")
        yield
    finally:
        if file.exists():
            file.write_text("")
        lock.release()


def this_one() -> str:
    """This process, to whoever waits for it."""
    return f"process {os.getpid()} of {_user()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have them
        return str(os.getuid())
