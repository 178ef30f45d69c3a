"""Units tell their metrics over the broker when they are asked, and watch nothing while nobody asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from mvmci.cluster.metrics import UnitMetrics
from mvmci.deploy.measure import Asker, asking
from mvmci.errors import EngineAway
from mvmci.journals.client import submit
from mvmci.roles import meter as module
from mvmci.roles.meter import Meter
from mvmci.stores.nats import Cluster
from mvmci.system.tasks import cancel
from tests.harness.waiting import LONG_S, until_done, until_true
from tests.harness.world import script_spec
from tests.parts.roles.conftest import Place

TICKS_S = 0.05  # many of these meters' ticks
SHORT_S = 0.05
Open = Callable[..., Awaitable[Meter]]


@pytest.fixture
async def open_meter(place: Place, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    """Meters of units, which look a thousand times a second while they watch."""
    monkeypatch.setattr(module, "TICK_S", 0.001)
    monkeypatch.setattr(module, "PROBE_EVERY_S", 0.001)
    running: list[asyncio.Task[Any]] = []
    async with AsyncExitStack() as leaving:

        async def open_one(cluster: Cluster | str, **options: Any) -> Meter:
            there = await place.join(cluster) if isinstance(cluster, str) else cluster
            listening = asyncio.Event()
            subscribe = there.link.subscribe

            async def subscribed(*args: Any, **more: Any) -> Any:
                found = await subscribe(*args, **more)
                await there.link.round_trip()  # the broker knows of it
                listening.set()
                return found

            monkeypatch.setattr(there.link, "subscribe", subscribed)
            meter = Meter(there, "worker", **options)
            running.append(asyncio.create_task(meter.run()))
            leaving.push_async_callback(cancel, running[-1])
            await listening.wait()
            return meter

        yield open_one
        assert not any(task.done() for task in running)


@pytest.fixture
async def asker(client: Cluster) -> AsyncIterator[Asker]:
    async with asking(client) as found:
        yield found


async def ask(asker: Asker, *units: str, watch_s: float = 0.0) -> UnitMetrics:
    found = await asker.ask(units, watch_s=watch_s, within_s=LONG_S)
    return found[units[0]]


async def test_a_unit_tells_what_its_role_counts_and_what_its_process_uses(
    place: Place, client: Cluster, open_meter: Open, asker: Asker
) -> None:
    worker = await place.worker("w1", slots=2)
    await open_meter("meter", counts=worker.metrics)
    before = await ask(asker, "meter")
    await submit(client.store, await script_spec(client.store, "j", [{"sleep": 50}]))
    await until_done(client.store, "j")
    await until_true(lambda: worker.counts["ended"] == 1)
    now = await ask(asker, "meter")
    assert (now.unit, now.role, now.slots, now.jobs, now.refused) == ("meter", "worker", 2, {"ended": 1}, 0)
    assert now.slot_us - before.slot_us >= 50_000
    assert now.at_us > before.at_us
    assert now.process.loop_ran_us > before.process.loop_ran_us
    assert now.process.memory_bytes > 1 << 20
    assert now.machine.processors >= 1


async def test_writes_are_counted_without_being_asked_for(
    place: Place, open_meter: Open, asker: Asker
) -> None:
    there = await place.join("w1")
    await open_meter(there)
    await submit(there.store, await script_spec(there.store, "j", []))
    writes = (await ask(asker, "w1")).writes
    assert writes.count == 1
    assert writes.total_us == writes.longest_us > 0


async def test_nothing_is_watched_while_nobody_asks(open_meter: Open, asker: Asker) -> None:
    trips = 0

    async def probe() -> bool:
        nonlocal trips
        trips += 1
        return True

    meter = await open_meter("w1", probe=probe)
    await asyncio.sleep(TICKS_S)
    told = await ask(asker, "w1")
    await asyncio.sleep(TICKS_S)
    assert (trips, told.late.count, told.round_trips.count, told.orders.count) == (0, 0, 0, 0)

    await ask(asker, "w1", watch_s=SHORT_S)
    await until_true(lambda: trips and meter._round_trips.count and meter._late.count)
    await until_true(lambda: not meter._watching.is_set())
    await meter._cluster.link.round_trip()  # what had begun has ended: answers come in order
    await asyncio.sleep(TICKS_S)
    seen, last = trips, await ask(asker, "w1")
    await asyncio.sleep(TICKS_S)
    now = await ask(asker, "w1")
    assert (trips, now.late, now.round_trips) == (seen, last.late, last.round_trips)


async def test_a_question_makes_no_watch_shorter_that_another_asked_for(
    open_meter: Open, asker: Asker
) -> None:
    meter = await open_meter("w1")
    await ask(asker, "w1", watch_s=LONG_S)
    await ask(asker, "w1", watch_s=0.001)
    await ask(asker, "w1")
    await asyncio.sleep(TICKS_S)
    assert meter._watching.is_set()


@pytest.mark.parametrize(
    "word",
    [b"", b"{", b"\xff", b'{"watch_s": -1}', b'{"watch_s": "long"}', b'{"new": 1}', b"[]", b"[" * 9000],
)
async def test_whatever_a_question_says_it_is_answered_and_nothing_is_watched(
    client: Cluster, open_meter: Open, asker: Asker, word: bytes
) -> None:
    meter = await open_meter("w1")
    await client.link.publish(client.layout.measure(), word)
    await until_true(lambda: asker._found)
    assert not meter._watching.is_set()


async def test_a_way_that_is_broken_is_tried_again_and_ends_nothing(open_meter: Open, asker: Asker) -> None:
    tries = 0

    async def probe() -> bool:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise EngineAway("the executor cannot be reached")
        return tries > 5

    await open_meter("w1", probe=probe)
    await ask(asker, "w1", watch_s=LONG_S)
    await until_true(lambda: tries > 6)
    assert 0 < (await ask(asker, "w1")).orders.count < tries - 4


async def test_a_unit_goes_on_where_the_broker_is_away_meanwhile(open_meter: Open, asker: Asker) -> None:
    meter = await open_meter("w1")
    await ask(asker, "w1", watch_s=LONG_S)
    before = meter._round_trips.count
    await meter._cluster.link._client.force_reconnect()
    await until_true(lambda: asker.ask(["w1"], within_s=1.0))  # a question that comes meanwhile is lost
    await until_true(lambda: meter._round_trips.count > before)


async def test_who_does_not_tell_in_time_is_left_out_and_all_others_are_there(
    open_meter: Open, asker: Asker
) -> None:
    await open_meter("w1")
    await open_meter("w2")
    await ask(asker, "w1", "w2")
    assert set(await asker.ask(["w1", "w2", "silent"], within_s=1.0)) <= {"w1", "w2"}
    assert list(await asker.ask(["w2"], within_s=LONG_S)) == ["w2"]


async def test_a_unit_can_tell_of_itself_alone(client: Cluster, open_meter: Open, asker: Asker) -> None:
    """Its subject says who it is, which the broker vouches for, and what it writes does not."""
    await open_meter("w1")
    told = await ask(asker, "w1")
    lie = msgspec.json.encode(msgspec.structs.replace(told, unit="w2"))
    await client.link.publish(client.layout.measured("w3", "i"), lie)
    await client.link.publish(client.layout.measured("w4", "i"), b"garbage")
    await until_true(lambda: "w3" in asker._found)
    assert asker._found["w3"].unit == "w3"
    assert "w2" not in asker._found
