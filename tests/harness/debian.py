"""A small Debian, made and not pulled: what the tests' containers and their hosts are made on.

Its files come from the mirror that this machine's apt uses, by debootstrap. They are kept in build/, so that
this takes its minute once.

    build/debian-RECIPE.tar     the files
    build/debian-RECIPE/        the same unpacked, with what a host has besides

    python -m tests.harness.debian      makes both, and prints the folder
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import filelock

from tests.harness.places import ROOT

INCLUDED = (
    "cron",
    "dbus",
    "dbus-user-session",
    "haproxy",
    "iproute2",
    "libpam-systemd",
    "openssh-server",
    "procps",
    "python3",
    "sudo",
    "systemd",
    "systemd-sysv",
)
EMPTIED = (
    "var/cache/apt/archives",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
)
# What each host is to have of its own, or a minimal one has not: this machine's names, timers, a console.
REMOVED = (
    "etc/hostname",
    "etc/machine-id",
    "etc/resolv.conf",
    "etc/ssh/ssh_host_*_key*",
    "etc/systemd/system/*.wants/*.timer",
    "etc/systemd/system/*.wants/e2scrub_reap.service",
    "etc/systemd/system/*.wants/getty@tty1.service",
    "etc/systemd/system/*.wants/haproxy.service",
)
USER = "ci"
USER_ID = 1000


def archive() -> Path:
    """The files in an archive; made, unless it is there."""
    suite = codename()
    recipe = hashlib.sha256(repr((suite, INCLUDED, EMPTIED)).encode()).hexdigest()[:12]
    path = ROOT / "build" / f"debian-{recipe}.tar"
    path.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            _pack(suite, path)
    return path


def tree() -> Path:
    """The root of a host: with systemd and sshd, without keys, and with a user who may linger."""
    packed = archive()
    path = packed.with_suffix("")
    with filelock.FileLock(f"{packed}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent, prefix="debian-") as folder:
                (part := Path(folder) / "tree").mkdir(mode=0o755)
                _unpack(packed, part)
                part.rename(path)
    return path


def codename() -> str:
    """The Debian of this machine."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "bookworm")


def mirror(suite: str) -> str:
    """Where this machine gets the packages of `suite`."""
    asked = ["apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    found = (line.split() for line in told.splitlines())
    mirrors = [line[2] for line in found if line[:2] == [suite, "main"]]
    assert mirrors, f"apt knows no packages of {suite}: apt-get update"
    return mirrors[0]


def _pack(suite: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="debian-") as folder:
        root, part = Path(folder) / "tree", Path(folder) / "tar"
        included = f"--include={','.join(INCLUDED)}"
        made = subprocess.run(
            # It mounts /proc in there. In mounts of its own, none is left for a later removal to walk into
            # when this is killed.
            ["unshare", "--mount", "debootstrap", "--variant=minbase", included, suite, root, mirror(suite)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
        for place in EMPTIED:
            shutil.rmtree(root / place, ignore_errors=True)
            (root / place).mkdir(parents=True)
        subprocess.run(["tar", "--create", "--file", part, "--directory", root, "."], check=True)
        part.replace(path)


def _unpack(packed: Path, root: Path) -> None:
    subprocess.run(["tar", "--extract", "--file", packed, "--directory", root], check=True)
    for pattern in REMOVED:
        for path in root.glob(pattern):
            path.unlink()
    added = ["useradd", "--create-home", "--uid", str(USER_ID), "--shell", "/bin/bash", USER]
    subprocess.run(["chroot", root, *added], check=True)
    lingers = root / "var/lib/systemd/linger" / USER
    lingers.parent.mkdir(exist_ok=True)
    lingers.touch()


if __name__ == "__main__":
    print(tree())
