"""Clusters, started and looked at from outside: the zipapp, a home, and files.

`cluster()` gives one with a state directory of its own; `demo` is one that runs for all tests of a module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.cluster import SMALLEST, Cluster
from tests.harness.program import Mvmci


@pytest.fixture
def cluster(program: Mvmci, tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """A cluster with a state directory of its own, not yet started."""
    made: list[Cluster] = []

    def make(text: str = SMALLEST) -> Cluster:
        state = tmp_path / f"state-{len(made)}"
        found = Cluster(dataclasses.replace(program, state=state), tmp_path / f"topology-{len(made)}.yaml")
        found.write(text)
        made.append(found)
        return found

    yield make
    for one in made:
        if one.folder.exists():
            one.mvmci("down", "--cluster", one.name, "--grace", "1s")
        one.mvmci.assert_nothing_runs()
