"""A small process beside the broker, which sees what nats-server does not mend: a disk that was full once.

A stream of nats-server that could not be written stays so until the server starts anew. This process reads
the server's log. While there is no room it says so, in its own log and in the file `trouble`, which has its
bytes already; as soon as there is room again it stops the server, and whoever keeps that running starts it.
A server whose files were removed goes on as if they were there, and is stopped as well: then the loss shows.

The server does not sync the tokens of accounts, which say what was revoked: they are copied, and synced, as
soon as they were the same at two looks, so that none is copied while it is written.

It is given the broker's folder and dies with the server. It is run as a file, with the standard library
alone: a tenth of the memory of the whole program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

LOG, TROUBLE = "nats.log", "trouble"
RESOLVER, ACCOUNTS = "resolver", "accounts"
TROUBLE_BYTES = 1024  # of the file, which is written in place: a disk that is full makes no new ones
SIGNS = (b"no space left on device", b"disk quota exceeded", b"critical write error", b"input/output error")
ROOM_BYTES = 16 << 20  # to go on with
EVERY_S, QUIET_S = 0.5, 2.0


def say(folder: str, text: str) -> None:
    """Put `text` where verbs on this machine look for it."""
    data = text.encode()[:TROUBLE_BYTES].ljust(TROUBLE_BYTES)
    opened = os.open(os.path.join(folder, TROUBLE), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(opened, data, 0)
    finally:
        os.close(opened)


def room(folder: str) -> int:
    """The bytes that are free there."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def watch(folder: str, server: int, at: int) -> None:
    """Until the server is stopped. Its log counts from the place `at`."""
    log, failed, free_since, store = os.path.join(folder, LOG), b"", None, 0
    part = b""  # of a line
    tokens: dict[str, bytes] = {}
    while os.getppid() == server:
        time.sleep(EVERY_S)
        with contextlib.suppress(OSError):  # it is tried again
            tokens = keep_tokens(folder, tokens)
        before, store = store, _store(folder)
        if before not in (0, store):
            _log("the broker's store was removed: it starts anew")
            os.kill(server, signal.SIGTERM)
            return
        begun = part
        lines, part, at = _news(log, at)
        bad = [line for line in lines if any(sign in line.lower() for sign in SIGNS)]
        # The server writes each line at once: one that stays a part was cut where the disk was full.
        cut = part != b"" and part == begun and room(folder) < ROOM_BYTES
        if (bad or cut) and not failed:
            failed = bad[-1] if bad else SIGNS[0]
            why = next(sign for sign in SIGNS if sign in failed.lower()).decode()
            say(folder, f"the broker stores nothing: {why}, in {folder}")
            _log(f"the broker stores nothing: {why}; it starts again when there is room")
        if not failed or room(folder) < ROOM_BYTES or bad:
            free_since = None
        elif free_since is None:
            free_since = time.monotonic()
        elif time.monotonic() - free_since >= QUIET_S:
            _log("there is room again: the broker starts anew")
            os.kill(server, signal.SIGTERM)
            return


def keep_tokens(folder: str, before: dict[str, bytes]) -> dict[str, bytes]:
    """Copy the tokens of accounts that are as they were `before`; how they are now. Raises OSError."""
    resolver, accounts = os.path.join(folder, RESOLVER), os.path.join(folder, ACCOUNTS)
    now = {
        name: _read(os.path.join(resolver, name)) for name in os.listdir(resolver) if name.endswith(".jwt")
    }
    os.makedirs(accounts, mode=0o700, exist_ok=True)
    for name, token in now.items():
        if token and token == before.get(name) and token != _read(os.path.join(accounts, name)):
            _write_synced(accounts, name, token)
    return now


def _read(path: str) -> bytes:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return b""


def _write_synced(folder: str, name: str, data: bytes) -> None:
    part = os.path.join(folder, f".{name}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, os.path.join(folder, name))
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _store(folder: str) -> int:
    """Which folder the streams are in; 0 before there is one."""
    try:
        return os.stat(os.path.join(folder, "store", "jetstream")).st_ino
    except OSError:
        return 0


def _log(text: str) -> None:
    """On standard error, which may lie on the same disk."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _news(log: str, at: int) -> tuple[list[bytes], bytes, int]:
    """The whole lines behind the place `at`, the part of one that follows them, and where that begins.

    A log that was begun anew is read anew.
    """
    try:
        with open(log, "rb") as file:
            if os.fstat(file.fileno()).st_size < at:
                at = 0
            file.seek(at)
            data = file.read(1 << 20)
    except OSError:
        return [], b"", at
    end = data.rfind(b"\n") + 1
    return data[:end].splitlines(), data[end:], at + end


if __name__ == "__main__":
    watch(sys.argv[1], os.getppid(), int(sys.argv[2]))
