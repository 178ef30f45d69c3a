"""Puts a peer into build/peers/<name>: pinned packages, and Debian's programs where they are missing.

Done once; a stamp says what is there.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import PEERS, Install
from benchmarks.processes import ROOT

HOME = ROOT / "build" / "peers"


class CannotInstall(Exception):
    """Why a peer, or a tool, cannot be had here."""


def install(name: str) -> Path:
    """The Python in which the peer runs. Raises CannotInstall."""
    wanted = PEERS[name]
    if wanted.own:
        return Path(sys.executable)
    for program, package in wanted.programs.items():
        have_program(program, package)
    folder = HOME / name
    stamp, text = folder / "installed", repr((wanted.pip, wanted.npm))
    if not stamp.exists() or stamp.read_text() != text:
        print(f"installing {wanted.title} into {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
        _fill(folder, wanted)
        stamp.write_text(text)
    return folder / "bin" / "python"


def _fill(folder: Path, wanted: Install) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _run([sys.executable, "-m", "venv", folder])
    _run([folder / "bin" / "python", "-m", "pip", "install", "--only-binary", ":all:", *wanted.pip])
    if wanted.npm:
        _run(["npm", "install", "--no-audit", "--no-fund", "--prefix", folder, *wanted.npm])


def have_program(program: str, package: str) -> None:
    """See that a program of Debian's is there; as root, install it. Raises CannotInstall."""
    if shutil.which(program) or glob.glob(program):
        return
    if os.getuid() != 0 or not shutil.which("apt-get"):
        raise CannotInstall(f"needs Debian's package {package}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "update"], environment)
    _run(["apt-get", "install", "--yes", "--no-install-recommends", package], environment)


def _run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotInstall(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
        raise CannotInstall(f"{Path(command[0]).name}: {said[-1][:200]}")
