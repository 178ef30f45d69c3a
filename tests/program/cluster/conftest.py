"""Clusters, started and looked at from outside: the zipapp, a home, and files.

`cluster()` gives one with a state directory of its own; `demo` is one that runs for all tests of a module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster
from tests.harness.program import Mvmci

SMALLEST = "cluster: demo\nworkers: {count: 3, slots: 2}\n"


@pytest.fixture(scope="module")
def demo(program: Mvmci, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three workers that runs; a test that changes it puts it back."""
    folder = tmp_path_factory.mktemp("demo")
    found = Cluster(dataclasses.replace(program, state=folder / "state"), folder / "topology.yaml")
    found.write(SMALLEST)
    found.up()
    yield found
    found.down()
    found.assert_nothing_is_left()


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
