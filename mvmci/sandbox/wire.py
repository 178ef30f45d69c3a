"""Blocking frames on a descriptor: the child's side of the socket.

It uses `read` and `write_all` alone, so that a confined child needs no system call for sockets.
"""

from __future__ import annotations

import os

from mvmci.sandbox import frames

# How a child that could not say so in a frame tells its parent what went wrong.
EXIT_UNCONFINED = 71
EXIT_CRASHED = 72
EXIT_NO_CODE = 73


def read_task(fd: int) -> frames.ToSlot | None:
    """The next frame from the parent, None when it has closed the socket."""
    head = _read(fd, frames.LENGTH_BYTES)
    if head is None:
        return None
    body = _read(fd, int.from_bytes(head, "little"))
    return None if body is None else frames.to_slot.decode(body)


def send(fd: int, frame: frames.Frame) -> None:
    """Write `frame`, waiting for as long as the parent does not read. Raises ValueError, OSError."""
    write_all(fd, frames.encode(frame))


def write_all(fd: int, data: bytes | bytearray) -> None:
    """Write all of `data`. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _read(fd: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(fd, size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
