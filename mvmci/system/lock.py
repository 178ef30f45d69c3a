"""One process at a time: a lock that says who holds it, let go of by the kernel however its holder ends."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from mvmci.errors import LockHeld


def acquire(file: Path, busy: str, hint: str) -> int:
    """A descriptor that holds the lock of `file`. Raises LockHeld: who holds it, before `busy`."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise LockHeld(f"{file.read_text() or 'another process'} {busy}", hint=hint) from None
        if os.fstat(descriptor).st_nlink:  # else its holder removed it before it let go
            return descriptor
        os.close(descriptor)


@contextlib.contextmanager
def hold(file: Path, busy: str, hint: str, who: str = "", *, inherited: int | None = None) -> Iterator[int]:
    """Be the only one that has `file`, which says who that is: `who`, or this process. Raises LockHeld.

    Yields the descriptor that holds it. A process that keeps it open over an exec has not let go of the
    lock in between, and names it as `inherited`.
    """
    descriptor = acquire(file, busy, hint) if inherited is None else inherited
    os.set_inheritable(descriptor, False)
    since = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    try:
        file.write_text(f"{who or this_one()}, since {since},")
        yield descriptor
    finally:
        if file.exists():
            file.write_text("")
        os.close(descriptor)


def this_one() -> str:
    """This process, to whoever waits for it."""
    return f"process {os.getpid()} of {_user()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have them
        return str(os.getuid())
