"""Files that are written whole or not at all, and folders: ours alone to read, whatever the umask."""

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


def private_folder(path: Path) -> Path:
    """`path`, made if it is missing, and what is missing above it: 0700. One that is there stays as it is."""
    for folder in reversed((path, *path.parents)):
        if not folder.exists() or (folder == path and not path.is_dir()):
            folder.mkdir(0o700, exist_ok=True)  # somebody else may make it at the same time
            folder.chmod(0o700)  # the umask had its say
    return path


def passable_folder(path: Path) -> Path:
    """`path`, which others may enter but not list: 0711. What is missing above it is made, 0700."""
    private_folder(path).chmod(0o711)
    return path


def write_private(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Put `data` at `path`, 0600: readers see all of it, or what was there before.

    With `synced`, a power cut leaves it. What a process leaves behind that is killed in the middle has its
    number in its name, and `sweep` removes it.
    """
    private_folder(path.parent)
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
