"""CPythons of several versions: those of this machine, and one of a newer Debian than this machine's."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.harness import debian
from tests.harness.places import ROOT, need

SUITES = {"3.14": "forky"}  # who has what few machines have yet
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
VERSION = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
# What we start sees the directories of the tests and nothing else of this machine.
INTO = """
tree=$1; shift
mount --rbind /dev "$tree/dev" && mount -t proc proc "$tree/proc"
for place in "$1" "$2"; do mkdir -p "$tree$place" && mount --rbind "$place" "$tree$place"; done
shift 2
exec chroot "$tree" "$@"
"""


def find_python(version: str) -> list[str]:
    """What starts a Python of `version`, with the files of the tests at their places."""
    for python in _interpreters(version):
        try:
            done = subprocess.run([python, "-E", "-c", VERSION], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        if done.stdout.strip() == version:
            return [python]
    apt = shutil.which("apt-get") and os.geteuid() == 0 and KEYRING.exists()
    need(version in SUITES and apt, f"no Python {version} on this machine, nor apt to fetch it")
    tree = ROOT / "build" / f"python-{version}-{platform.machine()}"
    if not tree.exists():
        _fetch(version, SUITES[version], tree)
    places = [tempfile.gettempdir(), str(ROOT)]
    return ["unshare", "--mount", "sh", "-euc", INTO, "sh", str(tree), *places, f"/usr/bin/python{version}"]


def _interpreters(version: str) -> Iterator[str]:
    """Where one may be: on PATH, or among those of pyenv."""
    yield f"python{version}"
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from (str(path) for path in versions.glob(f"{version}.*/bin/python{version}"))


def _fetch(version: str, suite: str, tree: Path) -> None:
    """Lay the packages of another Debian out in `tree`, with an apt that knows nothing of this machine."""
    tree.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix="python-") as folder:
        apt, part = Path(folder) / "apt", Path(folder) / "tree"
        for place in ("etc/preferences.d", "etc/apt.conf.d", "lists/partial", "cache/archives/partial"):
            (apt / place).mkdir(parents=True)
        (apt / "status").touch()
        source = f"deb [signed-by={KEYRING}] {debian.mirror(debian.codename())} {suite} main\n"
        (apt / "etc" / "sources.list").write_text(source)
        told = {"": apt, "::Etc": apt / "etc", "::State": apt, "::State::status": apt / "status"}
        told |= {"::State::lists": apt / "lists", "::Cache": apt / "cache"}
        options = [f"-oDir{name}={path}" for name, path in told.items()]
        options += ["-oAPT::Sandbox::User=root", "-oDir::Bin::dpkg=/usr/bin/dpkg"]
        install = ["--yes", "--no-install-recommends", "--download-only", "install", f"python{version}"]
        for command in (["update"], install):
            subprocess.run(["apt-get", "-qq", *options, *command], capture_output=True, check=True)
        for merged in ("bin", "lib", "lib64", "sbin"):
            (part / "usr" / merged).mkdir(parents=True)
            (part / merged).symlink_to(f"usr/{merged}")
        for place in ("dev", "proc"):
            (part / place).mkdir()
        for package in (apt / "cache" / "archives").glob("*.deb"):
            subprocess.run(["dpkg", "--extract", package, part], check=True)
        part.rename(tree)
