"""The zipapp's bytes are a function of what it is built from, not of where, when, and by which Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.harness.places import ROOT, ZIPAPP, need
from tests.harness.pythons import find_python

BUILT_FROM = (
    *(".gitignore", "LICENSE", "mvmci", "packaging", "pyproject.toml", "requirements", "shiv.toml"),
    "topologies",
)
LONG_AGO = 1_000_000_000  # s since 1970, of every file


def faketime() -> str:
    found = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    need(found, "libfaketime is not there")
    return str(found)


def copied(folder: Path) -> Path:
    """What it is built from, in another place and with other dates, at the same commit."""
    git = ["git", "clone", "--quiet", "--no-checkout", str(ROOT), str(folder)]
    subprocess.run(git, check=True)
    subprocess.run(["git", "-C", folder, "reset", "--quiet"], check=True)
    for name in BUILT_FROM:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for path in folder.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return folder


def build(place: Path, version: str, umask: int, **environment: str) -> bytes:
    """By that Python, with the tools of this one."""
    (python,) = find_python(version)
    tools = {
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PATH": os.environ["PATH"],
        "HOME": str(Path.home()),
    }
    command = [python, place / "packaging" / "make_zipapp.py"]
    done = subprocess.run(command, env=tools | environment, umask=umask, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return (place / "dist" / "mvmci.pyz").read_bytes()


@pytest.mark.soak
def test_two_folders_umasks_dates_and_pythons_make_the_same_bytes(zipapp: Path, tmp_path: Path) -> None:
    need(zipapp == ROOT / "dist" / "mvmci.pyz" == ZIPAPP, "it was not built here")
    place = copied(tmp_path / "a place with another name")
    ours = zipapp.read_bytes()
    assert build(place, "3.12", 0o077, PYTHONHASHSEED="1", LC_ALL="C", TZ="Asia/Tokyo") == ours
    # What came from the index is kept: servers' certificates are not valid at every time.
    (place / "dist" / "mvmci.pyz").unlink()
    later = {"LD_PRELOAD": faketime(), "FAKETIME": "@2037-02-03 04:05:06", "SOURCE_DATE_EPOCH": "1"}
    assert build(place, "3.11", 0o000, PYTHONHASHSEED="2", **later) == ours
