"""What others wrote, and nobody should have: it breaks no list, no hint, no output and no retention."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from mvmci.errors import JournalCorrupt
from mvmci.jobs.journal import Cancel, Done, Journal, status
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.roles.reconciler import Reconciler
from mvmci.roles.retention import Retention
from mvmci.store import Chunk
from mvmci.stores.nats import Cluster
from tests.harness.waiting import LONG_S, until_done, until_true
from tests.harness.world import script_spec
from tests.parts.roles.conftest import Place
from tests.parts.roles.test_retention import AGE_MS, Clock, clock, end, retention, spec

__all__ = ("clock", "retention")  # fixtures


async def publish(cluster: Cluster, job: str, kind: str, data: bytes, *, queue: str = "default") -> int:
    """As a client of NATS may: without an expectation."""
    subject = f"{cluster.layout.cluster}.job.{job}.{kind}.{queue}.client"
    return int((await cluster.link.request(subject, data))["seq"])


async def test_one_bad_message_breaks_no_list(client: Cluster) -> None:
    good = await spec(client.store, "good")
    await submit(client.store, good)
    await submit(client.store, await spec(client.store, "spoilt"))
    other = Journal("spoilt").encode([msgspec.structs.replace(good, id="spoilt", name="other")], "m")
    for data in (other, b"", b"{"):
        await publish(client, "spoilt", "spec", data)
    await publish(client, "garbage", "spec", b"no spec")
    await publish(client, "nothing", "cancel", b"no cancel")
    for name in ("*", ">", "A"):  # no ids, and the broker stores them
        await publish(client, name, "spec", other)
    found = {}
    async for job, entries in client.store.journals.newest():
        assert job not in found
        found[job] = Journal(job)
        found[job].absorb(entries)
    assert {job: status(journal.state)[0] for job, journal in found.items()} == {
        "good": "queued",
        "spoilt": "queued",
        "garbage": "errored",
        "nothing": "errored",
    }
    assert found["spoilt"].state.spec == await spec(client.store, "spoilt")
    assert {job async for job in client.store.journals.jobs()} == set(found)
    with pytest.raises(JournalCorrupt, match="garbage errored: journal corrupt: message"):
        await submit(client.store, await spec(client.store, "garbage"))


async def test_a_second_spec_is_never_taken_for_the_first(place: Place, client: Cluster) -> None:
    first = await script_spec(client.store, "j", [])
    await submit(client.store, first)
    forged = Journal("j").encode([msgspec.structs.replace(first, seed=666)], "m")
    seq = await publish(client, "j", "spec", forged)
    assert await client.store.journals.first("j", seq) is None
    await client.store.hints.ready("default", "A")  # no id: there is nothing to look at
    hints = [await client.store.hints.pull("default", wait_s=LONG_S) for _ in range(2)]
    assert [(hint.job, hint.spec_entry is not None) for hint in hints if hint] == [("j", True), ("j", False)]
    for hint in hints:
        assert hint is not None
        await hint.redeliver(0)
    await place.worker("w1")
    journal = await until_done(client.store, "j")
    assert status(journal.state) == ("succeeded", "")
    assert journal.state.spec == first


async def test_what_is_no_end_keeps_nobody_from_looking_after_a_job(place: Place, client: Cluster) -> None:
    reconciler = Reconciler(await place.join("control-plane", maintains=True, listens=True))
    await submit(client.store, await spec(client.store, "j"))
    for job, kind in (("j", "done"), ("x", "done"), ("y", "spec"), ("*", "run")):
        await publish(client, job, kind, b"x", queue="other")
        await publish(client, job, kind, b"x", queue=">")
    running = asyncio.create_task(reconciler.run())
    await until_true(lambda: reconciler.counts.open >= 1)
    journal = await load(client.store, "j")
    assert [one.why for one in journal.ignored] == ["it is of another queue"] * 2
    data = journal.encode([Cancel(at=1, by="me")], "m")
    await client.store.journals.append("j", "cancel", "default", data, expect=journal.expect)
    assert status((await until_done(client.store, "j")).state)[0] == "cancelled"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_retention_goes_by_what_is_an_end_and_when_it_was_stored(
    client: Cluster, retention: Retention, clock: Clock
) -> None:
    await submit(client.store, await spec(client.store, "open"))
    journal = await load(client.store, "open")
    for at in (0, 250_000_000_000_000):
        data = journal.encode([Done(at=at, status="succeeded")], "m")
        await publish(client, "open", "done", data)
    await end(client, "old")
    await publish(client, "old", "cancel", b"after its end")
    clock.ahead_ms = AGE_MS * 3 // 2  # beyond when they were stored
    await retention.forget()
    assert status((await load(client.store, "open")).state)[0] == "queued"
    old = await load(client.store, "old")
    assert (old.state.spec, status(old.state)[0]) == (None, "succeeded")


async def test_garbage_in_the_output_is_told_of_and_keeps_nothing_back(
    client: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    await submit(client.store, await spec(client.store, "j"))
    piece = Chunk(attempt=0, number=0, stream="stdout", data=b"x", at=1)
    layout, link = client.layout, client.link
    await link.request(layout.log("j", "default"), b"garbage")
    await link.request(layout.log("j", "other"), msgspec.json.encode(piece))  # whose queue it is not
    await client.store.logs.append("j", "default", [piece])
    assert await client.store.logs.read("j") == [piece]
    async for found in client.store.logs.follow("j"):
        assert found == piece
        break
    assert "a piece of the output of j cannot be read" in caplog.text


async def test_who_tells_of_anothers_bytes_as_his_own_takes_nothing_along(
    client: Cluster, retention: Retention
) -> None:
    kept = await end(client, "kept")
    layout, link = client.layout, client.link
    stored = await client.blobs._stored(kept.module)
    assert stored is not None
    info = msgspec.json.decode(stored.data)
    for name, nuid in (("sha256:" + "0" * 64, info["nuid"]), ("x", ">"), ("y", "*")):
        subject = (
            layout.blob_info(name) if len(name) == 1 else stored.subject.rpartition(".")[0] + ".bWluZQ=="
        )
        await link.request(subject, msgspec.json.encode(info | {"name": name, "nuid": nuid}))
    await link.request(layout.blob_info("z"), b"\xff")
    await retention.sweep()
    assert await client.store.blobs.get(kept.module)


async def test_settings_that_cannot_be_read_end_no_unit(client: Cluster) -> None:
    from mvmci.errors import StoreUnavailable

    await client.config.put("settings", b"garbage")
    with pytest.raises(StoreUnavailable, match="settings of the cluster cannot be read"):
        await client.config.settings()
