"""The image that the tests' containers are made on: a small Debian with Python and haproxy, not pulled.

python -m tests.harness.image      makes it, and prints its name
"""

from __future__ import annotations

import os
import subprocess

import filelock

from tests.harness import debian


def make(environment: dict[str, str]) -> str:
    """Make the image, unless it is there; its name."""
    archive = debian.archive()
    name = f"mvmci-tests:{archive.stem.removeprefix('debian-')}"
    listed = ["docker", "image", "ls", "--quiet", name]
    # Of two who make it at once, the second would put another image under that name.
    with filelock.FileLock(f"{archive}.lock"):
        if not subprocess.run(listed, env=environment, capture_output=True, check=True).stdout:
            made = ["docker", "import", archive, name]
            subprocess.run(made, env=environment, capture_output=True, check=True)
    return name


if __name__ == "__main__":
    print(make(dict(os.environ)))
