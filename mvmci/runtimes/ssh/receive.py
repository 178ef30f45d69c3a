"""Takes a program on a host: its bytes from standard input, into DIRECTORY/bin/DIGEST.pyz.

This is sent over ssh before the bytes, and run by the host's Python: the standard library alone. It answers
with lines of JSON: whether it wants the bytes, and then where they are or why not. A program is there whole,
synced and with its digest, or not at all; what was interrupted leaves a temporary file, which the next one
removes. The programs that were used last are kept, and those that something runs or is to run.

    receive.py DIGEST DIRECTORY SIZE
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import sys

KEPT = 3
PIECE_BYTES = 1 << 20
PART = ".part-"


def say(**answer: object) -> None:
    """One line, at once."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def locked(path: str, flags: int = 0) -> int:
    """A descriptor that holds the lock of a file, which is made."""
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | flags)
    except OSError:
        os.close(opened)
        raise
    return opened


def is_whole(path: str, digest: str) -> bool:
    """Whether the program is there, bit by bit."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(PIECE_BYTES), b""):
                found.update(piece)
    except FileNotFoundError:
        return False
    return found.hexdigest() == digest


def sweep(folder: str) -> None:
    """Remove what nobody is writing any more."""
    for path in glob.glob(os.path.join(glob.escape(folder), PART + "*")):
        try:
            os.close(locked(path, fcntl.LOCK_NB))
        except OSError:
            continue  # somebody is
        os.unlink(path)


def new_part(folder: str) -> "tuple[str, int]":
    """A temporary file of ours, locked for as long as we live."""
    path = os.path.join(folder, f"{PART}{os.getpid()}")
    return path, locked(path)


def take(part: int, digest: str, size: int) -> bool:
    """Write what is sent, and see that it is all of that."""
    found, left = hashlib.sha256(), size
    while left:
        piece = sys.stdin.buffer.read(min(left, PIECE_BYTES))
        if not piece:
            return False
        left -= len(piece)
        found.update(piece)
        view = memoryview(piece)
        while view:
            view = view[os.write(part, view) :]
    os.fsync(part)
    return found.hexdigest() == digest


def is_used(directory: str, digest: str) -> bool:
    """Whether a process was started with it, or some supervisor is to start it."""
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob(
        os.path.join(glob.escape(directory), "*", "desired.json")
    ):
        try:
            with open(path, "rb") as file:
                if digest.encode() in file.read() and path != f"/proc/{os.getpid()}/cmdline":
                    return True
        except OSError:
            continue
    return False


def remove_old(directory: str, folder: str) -> None:
    """Keep the programs that were used last."""
    found = [entry for entry in os.scandir(folder) if entry.name.endswith(".pyz")]
    found.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in found[KEPT:]:
        if not is_used(directory, entry.name[:-4]):
            os.unlink(entry.path)


def receive(digest: str, directory: str, size: int) -> str:
    """Have the program there; its path."""
    folder = os.path.join(directory, "bin")
    os.makedirs(folder, 0o700, exist_ok=True)
    path = os.path.join(folder, digest + ".pyz")
    lock = locked(os.path.join(folder, ".lock"))
    sweep(folder)
    if is_whole(path, digest):
        os.utime(path)
        say(wanted=False)
    else:
        part, opened = new_part(folder)
        os.close(lock)  # what is sent may take long, or never come
        try:
            say(wanted=True)
            if not take(opened, digest, size):
                raise OSError(errno.EIO, "it did not arrive whole")
            os.fchmod(opened, 0o700)
            os.rename(part, path)
        except BaseException:
            os.unlink(part)
            raise
        lock = locked(os.path.join(folder, ".lock"))
    inside = os.open(folder, os.O_RDONLY)
    os.fsync(inside)
    remove_old(directory, folder)
    os.close(lock)
    return path


if __name__ == "__main__":
    os.umask(0o077)
    try:
        say(path=receive(sys.argv[1], sys.argv[2], int(sys.argv[3])))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        say(why_not=error.strerror or str(error), full=full)
        sys.exit(1)
