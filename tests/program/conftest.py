"""A cluster that runs, for all tests of a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from tests.harness.cluster import SMALLEST, Cluster
from tests.harness.program import Mvmci


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
