"""What a worker promises: each hint it takes comes to what the journal says, and draining loses nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mvmci.errors import HostUnfit, MvmciError
from mvmci.jobs.job import Limits
from mvmci.jobs.journal import Cancel, Intent, Lease, Released, status
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.stores.nats import Cluster
from tests.harness.newer import NEWER, append_newer
from tests.harness.waiting import LONG_S, until_done, until_journal
from tests.harness.world import Counting, script_spec
from tests.parts.roles.conftest import Place
from tests.parts.roles.test_reconciler import append


async def test_a_job_that_is_submitted_is_run_to_its_end_and_its_hint_is_used_up(
    place: Place, client: Cluster
) -> None:
    await place.worker("w1")
    await submit(client.store, await script_spec(client.store, "j", [{"now": True}]))
    journal = await until_done(client.store, "j")
    assert status(journal.state)[0] == "succeeded"
    assert journal.state.lease is not None
    assert journal.state.lease.unit == "w1"
    consumer = f"CONSUMER.INFO.{client.layout.jobs}.spec-default"
    async with asyncio.timeout(LONG_S):
        while (await client.link.api(consumer))["num_ack_pending"]:  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.02)


async def test_several_workers_share_the_jobs_and_none_runs_twice(place: Place, client: Cluster) -> None:
    for unit in ("w1", "w2", "w3"):
        await place.worker(unit)
    async with Counting().serve() as server:
        jobs = [f"j{number}" for number in range(12)]
        for job in jobs:
            steps = [{"http": {"url": f"{server.url}/{job}", "method": "POST"}}, {"sleep": 200}]
            await submit(client.store, await script_spec(client.store, job, steps))
        journals = [await until_done(client.store, job) for job in jobs]
        assert {status(journal.state)[0] for journal in journals} == {"succeeded"}
        assert len({journal.state.lease.unit for journal in journals if journal.state.lease}) > 1
        assert set(server.counts.values()) == {1}


async def test_a_worker_takes_no_more_hints_than_it_has_slots(place: Place, client: Cluster) -> None:
    await place.worker("w1", slots=1)
    for job in ("a", "b"):
        await submit(
            client.store,
            await script_spec(client.store, job, [{"sleep": 60_000_000}] * 0 or [{"sleep": 3000}]),
        )
    await until_journal(client.store, "a", lambda journal: journal.state.lease is not None)
    members = await client.store.presence.members()
    assert max(len(member.keeps) for member in members) <= 1
    assert (await load(client.store, "b")).state.lease is None
    await until_done(client.store, "b")


async def test_a_job_that_was_cancelled_before_its_hint_came_does_nothing(
    place: Place, client: Cluster
) -> None:
    """The hint is the spec as it was submitted, and knows nothing of the cancel."""
    async with Counting().serve() as server:
        await submit(client.store, await script_spec(client.store, "j", [{"http": {"url": server.url}}]))
        await append(client, "j", Cancel(at=1, by="me"))
        await place.worker("w1")
        consumer = f"CONSUMER.INFO.{client.layout.jobs}.spec-default"
        async with asyncio.timeout(LONG_S):
            while True:
                told = await client.link.api(consumer)
                if not told["num_ack_pending"] and not told["num_pending"]:
                    break
                await asyncio.sleep(0.02)
        assert status((await load(client.store, "j")).state)[0] == "cancelled"
        assert not server.counts


async def test_a_hint_that_was_fetched_ahead_is_not_kept_behind_a_long_job(
    place: Place, client: Cluster
) -> None:
    first = await place.worker("w1", slots=1)
    for number in range(3):
        await submit(client.store, await script_spec(client.store, f"short-{number}", []))
        await until_done(client.store, f"short-{number}")
    first._prefetch.jobs_are_short.set()  # as after many jobs that were shorter still
    await submit(client.store, await script_spec(client.store, "long", [{"sleep": 8000}]))
    await until_journal(client.store, "long", lambda journal: journal.state.lease is not None)
    await submit(client.store, await script_spec(client.store, "j", []))
    await place.worker("w2")
    journal = await until_done(client.store, "j")
    assert journal.state.lease is not None
    assert journal.state.lease.unit == "w2"
    assert (await load(client.store, "long")).state.done is None


async def test_draining_hands_a_workflow_to_another_worker_at_its_next_effect(
    place: Place, client: Cluster
) -> None:
    worker = await place.worker("w1")
    async with Counting().serve() as server:
        post = {"http": {"url": f"{server.url}/x", "method": "POST"}}
        await submit(client.store, await script_spec(client.store, "j", [post, {"sleep": 9000}, post]))
        await until_journal(client.store, "j", lambda journal: journal.state.results > 0)
        await asyncio.wait_for(worker.drain(), LONG_S)
        state = (await load(client.store, "j")).state
        assert state.released is not None
        assert state.released.why == "drain"
        await place.worker("w2")
        journal = await until_done(client.store, "j")
        assert status(journal.state)[0] == "succeeded"
        assert [one.why for one in journal.records if isinstance(one, Lease)] == ["first", "resumed"]
        assert journal.state.attempts == 1
        assert server.counts == {"POST /x": 2}


async def test_a_worker_that_drained_takes_nothing_until_it_resumes(place: Place, client: Cluster) -> None:
    worker = await place.worker("w1")
    await worker.drain()
    await submit(client.store, await script_spec(client.store, "j", []))
    await asyncio.sleep(1)
    assert (await load(client.store, "j")).state.lease is None
    worker.resume()
    assert status((await until_done(client.store, "j")).state)[0] == "succeeded"


async def test_a_long_sleep_frees_the_slot_and_its_timer_wakes_the_job(place: Place, client: Cluster) -> None:
    await place.worker("w1", slots=1)
    await submit(client.store, await script_spec(client.store, "sleeper", [{"sleep": 11_000}]))
    await until_journal(client.store, "sleeper", lambda journal: journal.state.released is not None)
    await submit(client.store, await script_spec(client.store, "other", []))
    await until_done(client.store, "other")
    journal = await until_done(client.store, "sleeper")
    (released,) = [one for one in journal.records if isinstance(one, Released)]
    (intent,) = [one for one in journal.records if isinstance(one, Intent)]
    assert released.until == intent.at + 11_000
    assert journal.state.done is not None
    assert journal.state.done.at >= released.until


async def test_a_failure_of_the_host_puts_the_job_off_and_ends_nothing(
    place: Place, client: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await place.worker("w1")
    failures = []
    run = worker.engine.run

    async def fail_once(job: str, **options: Any) -> object:
        if not failures:
            failures.append(job)
            raise MvmciError("the disk is on fire")
        return await run(job, **options)

    monkeypatch.setattr(worker.engine, "run", fail_once)
    await submit(client.store, await script_spec(client.store, "j", [], limits=Limits(timeout_ms=60_000)))
    assert status((await until_done(client.store, "j")).state)[0] == "succeeded"
    assert failures == ["j"]


async def test_a_host_that_can_run_nothing_leaves_jobs_to_others_and_takes_none_while_it_rests(
    place: Place, client: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfit = await place.worker("w1", slots=1)
    asked = asyncio.Event()

    async def refuse(*_: Any, **__: Any) -> None:
        unfit.rest(True)  # as the role does when its engine says so
        asked.set()
        raise HostUnfit("this host cannot run guests")

    monkeypatch.setattr(unfit.engine, "run", refuse)
    await submit(client.store, await script_spec(client.store, "j", []))
    await asyncio.wait_for(asked.wait(), LONG_S)
    monkeypatch.undo()
    await place.worker("w2")
    for job in ("j", "k"):
        if job == "k":
            await submit(client.store, await script_spec(client.store, job, []))
        journal = await until_done(client.store, job)
        assert status(journal.state)[0] == "succeeded"
        assert journal.state.lease is not None
        assert (journal.state.lease.unit, journal.state.lease.epoch) == ("w2", 1)


@pytest.mark.parametrize("wire", NEWER)
async def test_the_hint_of_a_job_that_a_newer_build_wrote_to_is_handed_back_and_the_reason_is_told(
    place: Place, client: Cluster, wire: int
) -> None:
    await submit(client.store, await script_spec(client.store, "j", []))
    await append_newer(client.store, "j", wire)
    await place.worker("w1")
    reason = ""
    async with asyncio.timeout(LONG_S):
        while "newer" not in reason:
            told = [one.waits.get("j", "") for one in await client.store.presence.members()]
            reason = "".join(told)
            await asyncio.sleep(0.05)
    consumer = f"CONSUMER.INFO.{client.layout.jobs}.spec-default"
    assert (await client.link.api(consumer))["num_ack_pending"] == 1  # it comes again
    assert len(await client.store.journals.read("j")) == 2
    await submit(client.store, await script_spec(client.store, "next", []))
    assert status((await until_done(client.store, "next")).state)[0] == "succeeded"
