"""What the reconciler promises: whatever is lost, hint, timer or holder, a job does not stay behind."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from mvmci.jobs.job import Limits
from mvmci.jobs.journal import (
    AnyRecord,
    Cancel,
    Done,
    Lease,
    Released,
    Spec,
    State,
    fold,
    kind_of,
    status,
)
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.roles.reconciler import Reconciler, needs
from mvmci.store import ClusterSettings
from mvmci.stores.nats import Cluster
from tests.conftest import CLUSTER_BYTES
from tests.harness.newer import NEWER, append_newer
from tests.harness.waiting import LONG_S, until_done, until_journal, until_true
from tests.harness.world import script_spec
from tests.parts.roles.conftest import Place

HOUR_MS = 3_600_000
NOW_MS = 10 * HOUR_MS


def spec() -> Spec:
    return Spec(
        at=0, id="j", queue="default", kind="workflow", module="m", name="m", component=True, seed=1, by="t"
    )


def lease(at: int = NOW_MS) -> Lease:
    return Lease(at=at, epoch=1, unit="client", incarnation="i", run="r", why="first")


CANCEL = Cancel(at=NOW_MS, by="me")
ASLEEP = Released(at=NOW_MS, why="sleep", until=NOW_MS + 60_000)
AWAKE = Released(at=NOW_MS, why="sleep", until=NOW_MS - 60_000)
DONE = Done(at=NOW_MS, status="succeeded")


@pytest.mark.parametrize(
    ("records", "live", "hinted", "wanted"),
    [
        ([], False, True, "nothing"),
        ([], False, False, "ready"),
        ([lease()], True, False, "nothing"),
        ([lease()], False, False, "ready"),
        ([lease()], False, True, "ready"),
        ([lease(), ASLEEP], False, False, "nothing"),
        ([lease(), AWAKE], False, False, "ready"),
        ([lease(), AWAKE], False, True, "nothing"),
        ([lease(), Released(at=NOW_MS, why="drain")], False, False, "ready"),
        ([CANCEL], False, True, "cancelled"),
        ([lease(), CANCEL], True, False, "nothing"),
        ([lease(), CANCEL], False, False, "cancelled"),
        ([lease(), ASLEEP, CANCEL], False, False, "cancelled"),
        ([lease(at=NOW_MS - 2 * HOUR_MS)], True, False, "nothing"),
        ([lease(at=NOW_MS - 2 * HOUR_MS)], False, False, "timed_out"),
        ([lease(at=NOW_MS - 2 * HOUR_MS), CANCEL], False, False, "cancelled"),
        ([lease(), DONE], False, False, "nothing"),
    ],
)
def test_what_a_job_needs_follows_from_its_journal(
    records: list[AnyRecord], live: bool, hinted: bool, wanted: str
) -> None:
    state = State()
    for record in (spec(), *records):
        fold(state, record)
    assert needs(state, now_ms=NOW_MS, live=live, hinted=hinted) == wanted


@pytest.fixture
async def reconciler(place: Place) -> AsyncIterator[Reconciler]:
    found = Reconciler(await place.join("control-plane", maintains=True, listens=True))
    running = asyncio.create_task(found.run())
    yield found
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def append(cluster: Cluster, job: str, *records: AnyRecord) -> None:
    journal = await load(cluster.store, job)
    message_id = secrets.token_hex(4)
    data = journal.encode(records, message_id)
    kind = kind_of(records)
    await cluster.store.journals.append(job, kind, "default", data, expect=journal.tail)


async def test_a_job_whose_hint_was_taken_by_somebody_who_died_is_run(
    place: Place, client: Cluster, reconciler: Reconciler
) -> None:
    await submit(client.store, await script_spec(client.store, "j", []))
    assert await client.store.hints.pull("default", wait_s=LONG_S) is not None  # and it dies
    await place.worker("w1")
    assert status((await until_done(client.store, "j")).state)[0] == "succeeded"
    await until_true(lambda: reconciler.counts.said >= 1)


async def test_a_job_whose_hint_still_waits_is_left_alone(client: Cluster, reconciler: Reconciler) -> None:
    await submit(client.store, await script_spec(client.store, "j", []))
    await until_true(lambda: reconciler.counts.open == 1)
    await asyncio.sleep(4)
    assert (reconciler.counts.open, reconciler.counts.said) == (1, 0)


async def test_a_job_whose_holder_died_is_run_by_another_within_seconds(
    place: Place, client: Cluster, reconciler: Reconciler
) -> None:
    dead = await place.join("dead")
    await submit(client.store, await script_spec(client.store, "j", []))
    assert await dead.store.hints.pull("default", wait_s=LONG_S) is not None
    await dead.store.presence.add_job("j", 1)
    await append(dead, "j", _lease_of(dead))
    await place.worker("w1")
    await asyncio.sleep(3)
    assert (await load(client.store, "j")).state.epoch == 1  # it lives, as far as anybody can tell
    await _die(dead)
    killed = time.monotonic()
    journal = await until_journal(client.store, "j", lambda journal: journal.state.done is not None)
    assert time.monotonic() - killed < 5 * 5
    assert status(journal.state)[0] == "succeeded"
    assert journal.state.epoch == 2


async def test_a_sleeper_whose_timer_was_lost_wakes_all_the_same(
    place: Place, client: Cluster, reconciler: Reconciler
) -> None:
    await place.worker("w1")
    await submit(client.store, await script_spec(client.store, "j", [{"sleep": 12_000}]))
    await until_journal(client.store, "j", lambda journal: journal.state.released is not None)
    plane = reconciler.cluster
    await plane.link.api(f"STREAM.DELETE.{plane.layout.hints}")
    await plane.maintain(ClusterSettings(store_bytes=CLUSTER_BYTES), ("default", "other"))
    assert status((await until_done(client.store, "j")).state)[0] == "succeeded"


async def test_every_job_ends_although_all_hints_are_deleted(
    place: Place, client: Cluster, reconciler: Reconciler
) -> None:
    jobs = [f"j{number}" for number in range(5)]
    for job in jobs:
        await submit(client.store, await script_spec(client.store, job, []))
        assert await client.store.hints.pull("default", wait_s=LONG_S) is not None
    async with asyncio.timeout(LONG_S):
        while reconciler.counts.said < len(jobs):  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.05)
    plane = reconciler.cluster
    await plane.link.api(f"STREAM.DELETE.{plane.layout.hints}")  # the words that were just said too
    await plane.maintain(ClusterSettings(store_bytes=CLUSTER_BYTES), ("default", "other"))
    await place.worker("w1")
    for job in jobs:
        assert status((await until_done(client.store, job)).state)[0] == "succeeded"


async def test_a_cancelled_job_that_nobody_holds_gets_its_end(
    client: Cluster, reconciler: Reconciler
) -> None:
    await submit(client.store, await script_spec(client.store, "j", []))
    await append(client, "j", CANCEL)
    done = (await until_done(client.store, "j")).state.done
    assert done is not None
    assert (done.status, done.reason) == ("cancelled", "cancelled by me")


async def test_a_job_that_is_over_its_time_ends_although_there_is_no_worker(
    client: Cluster, reconciler: Reconciler
) -> None:
    await submit(client.store, await script_spec(client.store, "j", [], limits=Limits(timeout_ms=1000)))
    await append(client, "j", lease(at=1))
    done = (await until_done(client.store, "j")).state.done
    assert done is not None
    assert done.status == "timed_out"


async def test_two_reconcilers_write_one_end(place: Place, client: Cluster, reconciler: Reconciler) -> None:
    other = Reconciler(await place.join("other-plane", maintains=True))
    running = asyncio.create_task(other.run())
    for number in range(10):
        await submit(client.store, await script_spec(client.store, f"j{number}", []))
        await append(client, f"j{number}", CANCEL)
    for number in range(10):
        journal = await until_done(client.store, f"j{number}")
        assert journal.state.corrupt is None
    await until_true(lambda: reconciler.counts.ended + other.counts.ended >= 10)
    await asyncio.sleep(1)
    assert reconciler.counts.ended + other.counts.ended == 10
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def _lease_of(cluster: Cluster) -> Lease:
    who = cluster.store.presence
    held = lease(at=time.time_ns() // 1_000_000)
    return msgspec.structs.replace(held, unit=who.unit, incarnation=who.incarnation)


async def _die(cluster: Cluster) -> None:
    """Fall silent, as a process does that was killed: without a farewell."""
    cluster.store.presence._announcer.cancel()  # type: ignore[attr-defined]
    await cluster.link.close()


@pytest.mark.parametrize("wire", NEWER)
async def test_a_job_that_a_newer_build_wrote_to_is_neither_ended_nor_forgotten(
    client: Cluster, reconciler: Reconciler, wire: int
) -> None:
    """Over its time, cancelled and nobody at work: it is for a newer control plane to say so."""
    await submit(client.store, await script_spec(client.store, "j", [], limits=Limits(timeout_ms=1)))
    await append(client, "j", lease(at=1))
    await append_newer(client.store, "j", wire)
    await submit(client.store, await script_spec(client.store, "other", []))
    await append(client, "other", CANCEL)
    await until_done(client.store, "other")
    await until_true(lambda: {job for job, _ in reconciler.open_jobs()} == {"j"})
    assert len(await client.store.journals.read("j")) == 3
