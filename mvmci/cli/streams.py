"""The three standard streams as they are found: closed, full, or with nobody at the other end.

A result that cannot be written is a failure with a sentence, a reader that has gone ends us quietly, and talk
that nobody can hear is dropped. No descriptor of ours is ever 0, 1 or 2. Libraries do not see an `OSError`:
each would end the process in a way of its own.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import select
import sys
from typing import Any, TextIO

from mvmci.errors import MvmciError, Usage

STDIN, STDOUT, STDERR = 0, 1, 2
EXIT_PIPE = 141


class ReaderGone(Exception):
    """Nobody reads our output any more, and so nobody is left to tell."""

    exit_code = EXIT_PIPE


class OutputLost(MvmciError):
    """What a verb prints cannot be written."""


def hold_streams() -> None:
    """Take the streams into our care; called once, before anything else is opened."""
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None or not _is_usable(number):  # a use fails as on a closed one; talk may be dropped
            _put(os.open(os.devnull, os.O_RDONLY if number == STDOUT else os.O_WRONLY), number)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(_In(STDIN, "rb", closefd=False)), *_coding(sys.stdin))
    sys.stdout = _text(_Out(STDOUT, "wb", closefd=False), sys.stdout)
    sys.stderr = _text(_Talk(STDERR, "wb", closefd=False), sys.stderr)


def let_go() -> None:
    """Write what is still to be written. Raises OutputLost, ReaderGone; whatever is left is then dropped."""
    try:
        sys.stdout.flush()
    finally:
        _put(os.open(os.devnull, os.O_WRONLY), STDOUT)


def write_all(number: int, data: bytes) -> None:
    """Write all of `data` to the stream `number`, waiting while there is no room. Raises as a verb may."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(number, view) :]
        except BlockingIOError:  # who shares it with us made it so
            poll = select.poll()
            poll.register(number, select.POLLOUT)
            poll.poll()
        except BrokenPipeError:
            raise ReaderGone from None
        except OSError as error:
            raise OutputLost(f"the output cannot be written: {_why(error)}") from None


def _is_usable(number: int) -> bool:
    """Whether it can be read, or written: a script that starts us may have got the number of a closed one."""
    try:
        access = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return False
    return access in (os.O_RDWR, os.O_RDONLY if number == STDIN else os.O_WRONLY)


def _put(descriptor: int, number: int) -> None:
    """Have `number` mean what `descriptor` does, also in programs that we become."""
    if descriptor == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(descriptor, number)
        os.close(descriptor)


def _text(raw: io.FileIO, found: TextIO | None) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(raw), *_coding(found), line_buffering=raw.isatty())


def _coding(found: TextIO | None) -> tuple[str, str]:
    """As the locale says it; what it has no character for is shown by its number."""
    if found is None:
        return "utf-8", "replace"
    return found.encoding, "backslashreplace" if found.errors in (None, "strict") else found.errors


class _In(io.FileIO):
    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise _unreadable(error) from None

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise _unreadable(error) from None


def _why(error: OSError) -> str:
    return "it is closed" if error.errno == errno.EBADF else error.strerror or str(error)


def _unreadable(error: OSError) -> Usage:
    return Usage(f"standard input cannot be read: {_why(error)}")


class _Out(io.FileIO):
    def write(self, data: Any) -> int:
        write_all(self.fileno(), bytes(data))
        return len(data)


class _Talk(_Out):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except (OutputLost, ReaderGone):
            return len(data)
