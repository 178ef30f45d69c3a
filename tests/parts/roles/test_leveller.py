"""What a control plane promises of the level: it is raised once all understand the next one."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import msgspec
import pytest

from mvmci.errors import VersionsDiffer
from mvmci.roles import leveller
from mvmci.roles.control_plane import ControlPlane
from mvmci.roles.leveller import SETTLED_S, Leveller
from mvmci.store import About, ClusterSettings
from mvmci.stores.nats import Cluster, remove
from mvmci.trust.registry import UnitRecord, read_units
from mvmci.wire import WIRE
from tests.conftest import CLUSTER_BYTES
from tests.harness.broker import ensure
from tests.harness.waiting import until_true
from tests.parts.roles.conftest import Place

SETTINGS = ClusterSettings(store_bytes=CLUSTER_BYTES)


@pytest.fixture
async def place(broker_url: str, tmp_path: object) -> AsyncIterator[Place]:
    name = f"t-{secrets.token_hex(4)}"
    await ensure(broker_url, name, store_bytes=CLUSTER_BYTES)
    place = Place(broker_url, name, tmp_path)  # type: ignore[arg-type]
    yield place
    for close in reversed(place.closing):
        await close()
    await remove(broker_url, name)


class Levels:
    """A leveller whose clock a test moves."""

    def __init__(self, cluster: Cluster) -> None:
        self.now = 0.0
        self.cluster = cluster
        self.leveller = Leveller(cluster, clock=lambda: self.now)

    async def look(self, *wires: int, after_s: float = SETTLED_S) -> int:
        """The level after two looks, so far apart, at units that understand `wires`."""
        from mvmci.store import Member

        members = [
            Member(unit=f"w{n}", incarnation="i", about=About(role="worker", wire=wire))
            for n, wire in enumerate(wires)
        ]
        await self.leveller.look(members)
        self.now += after_s
        await self.leveller.look(members)
        found = await self.cluster.config.settings()
        assert found is not None
        return found.wire


@pytest.fixture
async def levels(place: Place) -> Levels:
    cluster = await place.join("plane", maintains=True, listens=True)
    await cluster.config.put_settings(SETTINGS)
    return Levels(cluster)


async def enter(cluster: Cluster, unit: str, **what: object) -> None:
    record = UnitRecord(**{"key": "k", "role": "worker", "ticket": "t"} | what)  # type: ignore[arg-type]
    await cluster.config.put(f"unit.{unit}", msgspec.json.encode(record))


async def test_the_level_is_raised_once_all_who_are_there_understand_the_next(levels: Levels) -> None:
    assert await levels.look(1, 0) == 0
    assert await levels.look(1, 1, after_s=SETTLED_S / 2) == 0
    assert await levels.look(1, 1) == 1
    assert levels.cluster.store.level.spoken == 1


async def test_one_who_comes_in_between_is_waited_for(levels: Levels) -> None:
    assert await levels.look(1, after_s=SETTLED_S / 2) == 0
    assert await levels.look(1, 0) == 0
    assert await levels.look(1, after_s=SETTLED_S / 2) == 0


async def test_a_unit_that_is_away_counts_as_it_was_last_seen(levels: Levels) -> None:
    await enter(levels.cluster, "w1")
    assert await levels.look(1) == 0
    assert await levels.look(1, 1) == 1
    assert (await read_units(levels.cluster.config))["w1"].wire == 1


async def test_a_unit_that_went_back_to_the_build_before_is_noted(levels: Levels) -> None:
    await enter(levels.cluster, "w1", wire=1)
    assert await levels.look(1, 0) == 0
    assert await levels.look(1) == 0


@pytest.mark.parametrize("first", [0, 1])
async def test_of_two_copies_of_one_identity_the_older_build_counts(levels: Levels, first: int) -> None:
    from mvmci.store import Member

    members = [
        Member(unit="w1", incarnation=f"i{wire}", about=About(role="worker", wire=wire))
        for wire in (first, 1 - first)
    ]
    await levels.leveller.look(members)
    levels.now += SETTLED_S
    await levels.leveller.look(members)
    assert levels.cluster.store.level.spoken == 0


async def test_who_is_in_the_way_is_named_once(levels: Levels, caplog: pytest.LogCaptureFixture) -> None:
    await enter(levels.cluster, "attic")
    with caplog.at_level("INFO", leveller.__name__):
        await levels.look(1)
        await levels.look(1)
    assert [line for line in caplog.messages if "attic" in line] == [
        "level 1 waits for attic, of an older build"
    ]


@pytest.mark.parametrize("wire", [WIRE + 1, WIRE + 98])
async def test_an_older_control_plane_maintains_nothing(place: Place, wire: int) -> None:
    """The streams are as a newer one wants them, and must not be updated back."""
    cluster = await place.join("plane", maintains=True, listens=True)
    await cluster.config.put("settings", msgspec.json.encode({"wire": wire}))
    said: list[str] = []
    api = cluster.link.api

    async def listen(subject: str, *args: object, **more: object) -> object:
        said.append(subject)
        return await api(subject, *args, **more)  # type: ignore[arg-type]

    cluster.link.api = listen  # type: ignore[assignment, method-assign]
    with pytest.raises(VersionsDiffer):
        await ControlPlane(cluster).run()
    assert [one for one in said if ".UPDATE." in one or ".CREATE." in one or ".PURGE." in one] == []


async def test_a_level_that_is_raised_in_a_running_cluster_ends_an_older_control_plane(place: Place) -> None:
    cluster = await place.join("plane", maintains=True, listens=True)
    await cluster.config.put_settings(SETTINGS)

    running = asyncio.create_task(ControlPlane(cluster).run())

    async def maintained() -> bool:
        return not await cluster.lacks(())

    await until_true(maintained)
    await cluster.config.put("settings", msgspec.json.encode({"wire": WIRE + 1}))
    with pytest.raises(BaseExceptionGroup) as group:
        await running
    assert group.group_contains(VersionsDiffer)
