"""Clusters to be harmed, of the program or of one without a rule."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from mvmci.cluster.identity import Identity
from mvmci.stores import open_cluster
from mvmci.stores.nats import Cluster as Joined
from tests.faults.chaos import without
from tests.harness.cluster import Cluster
from tests.harness.network import Network, missing, network
from tests.harness.places import need
from tests.harness.program import Mvmci

COMMANDS = ("hello", "sleeper", "burn")

Make = Callable[[str], Cluster]


@pytest.fixture(scope="session")
def program(program: Mvmci, tmp_path_factory: pytest.TempPathFactory) -> Mvmci:
    """The program, or with MVMCI_CHAOS_WITHOUT its source without that rule."""
    rule = os.environ.get("MVMCI_CHAOS_WITHOUT")
    if not rule:
        return program
    package = without.write(rule, tmp_path_factory.mktemp("chaos"))
    return dataclasses.replace(program, zipapp=package, env={"PYTHONPATH": str(package.parent)})


@pytest.fixture
def make(program: Mvmci, tmp_path: Path) -> Iterator[Make]:
    """A cluster of the test's own, by the text of its file; not yet started."""
    made: list[Cluster] = []

    def begin(text: str) -> Cluster:
        state = tmp_path / f"state-{len(made)}"
        found = Cluster(dataclasses.replace(program, state=state), tmp_path / f"cluster-{len(made)}.yaml")
        found.write(text)
        made.append(found)
        return found

    yield begin
    for one in made:
        if one.folder.exists():
            one.mvmci("down", "--cluster", one.name, "--grace", "1s")
        one.mvmci.assert_nothing_runs()


@pytest.fixture
def lan() -> Iterator[Network]:
    """A network of this machine, for hosts with addresses of their own."""
    need(not missing(), missing())
    with network() as found:
        yield found


@pytest.fixture
async def closing() -> AsyncIterator[AsyncExitStack]:
    """What is entered here is left at the end of the test, before its cluster goes down."""
    async with AsyncExitStack() as stack:
        yield stack


async def join(cluster: Cluster, closing: AsyncExitStack, *, admin: bool = False) -> Joined:
    """`cluster` as this machine's client sees it; `admin`: as its verbs do."""
    if admin:
        from mvmci.deploy.state import ClusterState
        from mvmci.trust.authority import Authority

        facts = ClusterState(cluster.mvmci.state, cluster.name).facts()
        assert facts is not None
        identity = Authority.load(cluster.folder).admin(facts.login)
    else:
        cluster.jobs()  # makes it a client
        identity = msgspec.json.decode((cluster.folder / "client.json").read_bytes(), type=Identity)
    joined = await open_cluster(identity, announce=False)
    closing.push_async_callback(joined.close)
    return joined
