"""A cluster that runs, what effects ask beside it, and the client that makes load."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator

import pytest

from mvmci.bench.client import Client, listening
from mvmci.bench.service import serving
from mvmci.stores import open_cluster
from mvmci.trust.client import client_of
from tests.harness.cluster import Cluster
from tests.harness.program import Mvmci


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """Its URL."""
    with serving() as url:
        yield url


@pytest.fixture(scope="module")
def access() -> str:
    """Lines of the topology; a module may say others."""
    return "workers: {count: 2, slots: 2}\n"


@pytest.fixture(scope="module")
def loaded(
    program: Mvmci, tmp_path_factory: pytest.TempPathFactory, service: str, access: str
) -> Iterator[Cluster]:
    """The cluster, for all tests of a module."""
    folder = tmp_path_factory.mktemp("loaded")
    found = Cluster(dataclasses.replace(program, state=folder / "state"), folder / "topology.yaml")
    found.write(f'cluster: demo\n{access}allow: {{http: ["{service}*"]}}\n')
    found.up()
    yield found
    found.down()
    found.assert_nothing_is_left()


@pytest.fixture
async def client(loaded: Cluster) -> AsyncIterator[Client]:
    """Of whose jobs each has one end when the test is over."""
    cluster = await open_cluster(client_of(loaded.folder), announce=False)
    try:
        async with listening(Client(cluster)) as found:
            yield found
            count = await found.count()
            assert (count.ended_once, count.lost, count.twice) == (count.submitted, 0, 0)
    finally:
        await cluster.close()
