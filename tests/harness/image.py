"""The image that the tests' containers are made on: a small Debian with Python and haproxy, not pulled.

Its files come from the mirror that this machine's apt uses, by debootstrap. They are kept in build/, so that
this takes its minute once.

    python -m tests.harness.image      makes it, and prints its name
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.harness.places import ROOT

INCLUDED = ("haproxy", "python3")
EMPTIED = (
    "var/cache/apt/archives",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
)


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


def make(environment: dict[str, str]) -> str:
    """Make the image, unless it is there; its name."""
    suite = codename()
    recipe = hashlib.sha256(repr((suite, INCLUDED, EMPTIED)).encode()).hexdigest()[:12]
    name, archive = f"mvmci-tests:{recipe}", ROOT / "build" / f"compose-base-{recipe}.tar"
    listed = ["docker", "image", "ls", "--quiet", name]
    if subprocess.run(listed, env=environment, capture_output=True, text=True, check=True).stdout.strip():
        return name
    if not archive.exists():
        _pack(suite, archive)
    subprocess.run(["docker", "import", archive, name], env=environment, capture_output=True, check=True)
    return name


def _pack(suite: str, archive: Path) -> None:
    archive.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix="base-") as folder:
        tree, part = Path(folder) / "tree", Path(folder) / "tar"
        included = f"--include={','.join(INCLUDED)}"
        made = subprocess.run(
            # It mounts /proc in there. In mounts of its own, none is left for a later removal to walk into
            # when this is killed.
            ["unshare", "--mount", "debootstrap", "--variant=minbase", included, suite, tree, mirror(suite)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
        for place in EMPTIED:
            shutil.rmtree(tree / place, ignore_errors=True)
            (tree / place).mkdir(parents=True)
        subprocess.run(["tar", "--create", "--file", part, "--directory", tree, "."], check=True)
        part.replace(archive)


if __name__ == "__main__":
    print(make(dict(os.environ)))
