"""What the bucket CONFIG of a cluster promises: `mvmci.stores.nats.config`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import pytest

from mvmci.errors import Conflict, StoreUnavailable
from mvmci.store import ClusterSettings
from mvmci.stores.nats import Cluster, dial_cluster, remove
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
