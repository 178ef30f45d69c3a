"""Programs of others, fetched; and the two ways to run them."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.foreign.sides import Sides
from tests.harness.places import ROOT, need
from tests.harness.program import Mvmci

FETCH_S_MAX = 600

Fetched = Callable[[str], Path]


@functools.cache
def fetch(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "packaging" / "fetch_foreign.py", name],
        capture_output=True,
        text=True,
        timeout=FETCH_S_MAX,
        check=False,
    )


@pytest.fixture(scope="session")
def fetched() -> Fetched:
    """The folder with the programs of that name."""

    def folder(name: str) -> Path:
        done = fetch(name)
        if done.returncode:
            need(False, done.stderr.strip())
        return ROOT / done.stdout.strip()

    return folder


@pytest.fixture(scope="session")
def sides(program: Mvmci, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(tmp_path_factory.mktemp("sides"), program)
