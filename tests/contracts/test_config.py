"""What the bucket CONFIG of a cluster promises: `mvmci.stores.nats.config`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import msgspec
import pytest

from mvmci.errors import Conflict, StoreUnavailable, VersionsDiffer
from mvmci.store import ClusterSettings
from mvmci.stores.nats import Cluster, dial_cluster, remove
from mvmci.wire import WIRE
from tests.conftest import CLUSTER_BYTES
from tests.harness.broker import ensure
from tests.harness.waiting import LONG_S


@pytest.fixture
async def cluster(broker_url: str) -> AsyncIterator[Cluster]:
    name = f"t-{secrets.token_hex(4)}"
    await ensure(broker_url, name, store_bytes=CLUSTER_BYTES)
    found = await dial_cluster(broker_url, name, "u1")
    yield found
    await found.close()
    await remove(broker_url, name)


async def test_what_was_put_is_got_with_its_revision(cluster: Cluster) -> None:
    assert await cluster.config.get("ticket.a") is None
    revision = await cluster.config.put("ticket.a", b"1", expect=0)
    found = await cluster.config.get("ticket.a")
    assert found is not None
    assert (found.value, found.revision) == (b"1", revision)


async def test_only_one_of_two_writers_who_read_the_same_wins(cluster: Cluster) -> None:
    revision = await cluster.config.put("ticket.a", b"1")
    writes = (cluster.config.put("ticket.a", value, expect=revision) for value in (b"2", b"3"))
    answers = await asyncio.gather(*writes, return_exceptions=True)
    assert sorted(isinstance(answer, Conflict) for answer in answers) == [False, True]


async def test_a_family_of_keys_is_listed_without_those_that_were_deleted(cluster: Cluster) -> None:
    for key in ("ticket.a", "ticket.b", "unit.a"):
        await cluster.config.put(key, key.encode())
    await cluster.config.delete("ticket.b")
    assert await cluster.config.all("ticket") == {"ticket.a": b"ticket.a"}
    assert await cluster.config.get("ticket.b") is None


async def test_who_watches_hears_of_a_change(cluster: Cluster) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    await cluster.config.watch("drain.*", heard.put_nowait)
    await cluster.config.put("unit.a", b"1")
    await cluster.config.put("drain.a", b"1")
    async with asyncio.timeout(LONG_S):
        assert await heard.get() == "drain.a"


async def test_several_who_have_all_units_look_do_not_hinder_each_other(cluster: Cluster) -> None:
    await cluster.config.put_settings(ClusterSettings(logs_ms=7))
    await asyncio.gather(*(cluster.config.tell() for _ in range(8)))
    assert await cluster.config.settings() == ClusterSettings(logs_ms=7)


async def test_a_call_is_answered_by_who_serves_it_and_else_refused_at_once(cluster: Cluster) -> None:
    async def answer(subject: str, data: bytes) -> bytes:
        return subject.encode() + b" " + data

    stop = await cluster.link.serve("x.*", answer, lambda subject, reply: True, group="g")
    assert await cluster.link.call("x.a", b"b") == b"x.a b"
    await stop()
    with pytest.raises(StoreUnavailable, match="no stream"):
        await cluster.link.call("x.a", b"b")


async def test_the_level_that_settings_name_is_spoken_from_then_on(cluster: Cluster) -> None:
    await cluster.config.put_settings(ClusterSettings(wire=WIRE))
    await cluster.config.settings()
    assert cluster.store.level.spoken == WIRE


async def test_settings_that_are_written_anew_keep_the_level(cluster: Cluster) -> None:
    await cluster.config.put_settings(ClusterSettings())
    assert await cluster.config.raise_level(WIRE)
    assert not await cluster.config.raise_level(WIRE)
    await cluster.config.put_settings(ClusterSettings(allow_http=("http://a/",)))
    found = await cluster.config.settings()
    assert found == ClusterSettings(allow_http=("http://a/",), wire=WIRE)


@pytest.mark.parametrize("wire", [WIRE + 1, WIRE + 98])
async def test_settings_of_a_newer_level_are_not_taken_for_damaged_and_not_overwritten(
    cluster: Cluster, wire: int
) -> None:
    """Whatever else of them a newer build may have changed."""
    newer = msgspec.json.encode({"wire": wire, "isolation": {"of": "another kind"}, "new": [1]})
    await cluster.config.put("settings", newer)
    for question in (
        cluster.config.settings(),
        cluster.config.put_settings(ClusterSettings()),
        cluster.config.raise_level(WIRE),
    ):
        with pytest.raises(VersionsDiffer, match="the cluster is newer"):
            await question
    found = await cluster.config.get("settings")
    assert found is not None
    assert found.value == newer


async def test_fields_and_values_of_settings_that_are_not_known_are_passed_over(cluster: Cluster) -> None:
    await cluster.config.put("settings", b'{"isolation":"per-guest","queues":["a"],"colour":"blue"}')
    found = await cluster.config.settings()
    assert found is not None
    assert (found.queues, found.isolation) == (("a",), "per-guest")
