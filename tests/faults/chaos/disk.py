"""A disk that can lose its power: ext4 in a file, mounted through a loop device.

What the file system has written to its device is in the file; what it only has in its own page cache is
not. So a copy of the file is the disk as a power cut at that instant would leave it. The kernel must
write nothing while it is copied, or the copy would show a time that never was: it is looked for, and
the copy made again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SIZE_BYTES = 256 << 20
COPIES_MAX = 50
TOOLS = ("mkfs.ext4", "losetup", "mount", "umount", "dd", "sync", "unshare")
WRITES, IN_FLIGHT = 4, 8  # of the fields of /sys/block/<device>/stat


def missing() -> str:
    """Why there can be no such disk here; empty if there can."""
    if os.geteuid() != 0:
        return "only root can mount a file system"
    lacks = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(lacks)} (e2fsprogs, mount, util-linux) are not there" if lacks else ""


@dataclass
class Disk:
    """A disk that is mounted. `image` is the file that it lies in."""

    image: Path
    folder: Path
    device: str

    def copy(self, to: Path) -> None:
        """Make `to` the disk as it is at one instant. Whoever writes to files there stands still."""
        for _ in range(COPIES_MAX):
            before = self._writes()
            # A new file: whoever still has the last copy mounted would go on writing to it.
            to.unlink(missing_ok=True)
            # Every byte is read: where `cp` asks for holes, it may take what is being written for one.
            _run("dd", f"if={self.image}", f"of={to}", "bs=1M", "conv=sparse", "status=none")
            if before is not None and before == self._writes():
                return
        raise AssertionError("the kernel never stopped writing")

    def sync(self) -> None:
        """Let everything that was written so far be on the disk."""
        _run("sync", "-f", self.folder)

    def _writes(self) -> int | None:
        """How many writes the device has done; None while it is at one."""
        stat = Path(f"/sys/block/{self.device}/stat").read_text().split()
        return None if stat[IN_FLIGHT] != "0" else int(stat[WRITES])


@contextmanager
def new_disk(folder: Path) -> Iterator[Disk]:
    """An empty disk, mounted beneath `folder`."""
    image = folder / "disk.img"
    with open(image, "wb") as file:
        file.truncate(SIZE_BYTES)
    _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
    with mounted(image, folder / "disk") as disk:
        yield disk


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Disk]:
    """The disk that lies in `image`, for as long as the block lasts.

    On a loop device of its own. `mount -o loop` takes the one that the file was mounted through before if
    that is still there, and with it what was on the disk then; and it is there while any process with
    mounts of its own (a sandbox, a container, another host) was started meanwhile and lives.
    """
    folder.mkdir(exist_ok=True)
    device = _run("losetup", "--find", "--show", image).strip()
    try:
        _run("mount", "-o", "data=ordered", device, folder)
        try:
            yield Disk(image, folder, Path(device).name)
        finally:
            _run("umount", folder)
    finally:
        _run("losetup", "--detach", device)


def _run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
    return done.stdout
