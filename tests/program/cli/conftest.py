"""One home and one state directory for the whole run.

Tests take ids of their own. A test that looks at what a state directory holds takes `alone`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness.program import Mvmci
from tests.harness.server import Server, serving


@pytest.fixture(scope="session")
def mvmci(program: Mvmci, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mvmci]:
    """The program with the state directory that tests share."""
    mvmci = replace(program, state=tmp_path_factory.mktemp("local") / "state")
    yield mvmci
    mvmci.assert_nothing_runs()


@pytest.fixture
def alone(mvmci: Mvmci, tmp_path: Path) -> Mvmci:
    """The program with an empty state directory."""
    return replace(mvmci, state=tmp_path / "state")


@pytest.fixture
def outside() -> Iterator[Path]:
    """A directory where every user may write: what programs do there can be counted."""
    directory = Path(tempfile.mkdtemp(prefix="mvmci-test-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found
