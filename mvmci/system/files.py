"""Files that are written whole or not at all, and that only we can read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


def private_opener(path: str, flags: int) -> int:
    """An `opener` for `open`: a file that it makes can be read by us alone."""
    return os.open(path, flags, 0o600)


def create_private(path: Path) -> IO[bytes]:
    """A new file at `path`, 0600, open for writing. Raises FileExistsError.

    It is not to be awaited from a thread: who is called off meanwhile would leave the file, open.
    """
    return open(path, "xb", opener=private_opener)


def write_private(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Put `data` at `path`, 0600: readers see all of it, or what was there before.

    With `synced`, a power cut leaves it. What a process leaves behind that is killed in the middle has its
    number in its name, and `sweep` removes it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb", opener=private_opener) as file:
            file.write(data)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if synced:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sweep(folder: Path) -> None:
    """Remove from `folder` what processes left that were killed in the middle of a `write_private`."""
    for part in folder.glob(".*"):
        number = part.name.rpartition(".")[2]
        if number.isdecimal() and not Path("/proc", number).exists():
            part.unlink(missing_ok=True)
