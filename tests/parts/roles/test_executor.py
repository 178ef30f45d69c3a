"""What an executor and its workers promise: who is full is passed over, and no job runs twice."""

from __future__ import annotations

import asyncio
import sys

import pytest

from mvmci.engines import open_embedded, open_remote
from mvmci.engines.remote import NoCapacity, RunRequest
from mvmci.jobs.journal import Journal, Lease, status
from mvmci.journals.client import submit
from mvmci.journals.reader import load
from mvmci.journals.status import summary_of
from mvmci.store import Store
from mvmci.stores.nats import Cluster
from tests.harness.waiting import LONG_S, LOOK_S, until_done, until_journal
from tests.harness.world import Counting, script_spec
from tests.parts.roles.conftest import ALLOW, Place


async def reasoned(store: Store, job: str, reason: str) -> None:
    """Waits until the status of `job` gives that reason."""
    async with asyncio.timeout(LONG_S):
        while (await summary_of(store, await load(store, job))).reason != reason:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)


def leases(journal: Journal) -> list[Lease]:
    return [record for record in journal.records if isinstance(record, Lease)]


async def test_a_job_runs_on_an_executor_and_says_who_sent_it(place: Place, client: Cluster) -> None:
    await place.executor("x1")
    await place.remote_worker("w1")
    await submit(client.store, await script_spec(client.store, "j", [{"now": True}]))
    summary = await summary_of(client.store, await until_done(client.store, "j"))
    assert (summary.status, summary.worker, summary.executor) == ("succeeded", "w1", "x1")


async def test_without_an_executor_a_job_waits_says_so_and_begins_when_one_comes(
    place: Place, client: Cluster
) -> None:
    await place.remote_worker("w1")
    await submit(client.store, await script_spec(client.store, "j", []))
    await reasoned(client.store, "j", "waiting: no executor is there")
    await place.executor("x1")
    assert status((await until_done(client.store, "j")).state)[0] == "succeeded"


async def test_full_executors_are_passed_over_and_a_job_waits_while_all_are(
    place: Place, client: Cluster
) -> None:
    executors = [await place.executor(unit, slots=1) for unit in ("x1", "x2")]
    worker = await place.remote_worker("w1", slots=4)
    async with Counting().serve() as server:
        server.answers.clear()
        post = {"http": {"url": f"{server.url}/x", "method": "POST"}}
        for job in ("a", "b"):
            await submit(client.store, await script_spec(client.store, job, [post]))
        for job in ("a", "b"):
            await until_journal(client.store, job, lambda journal: journal.state.lease is not None)
        assert [executor.free for executor in executors] == [0, 0], "each has one"
        refused = executors[0].metrics()["refused"]  # the broker may have given it the other job, too
        with pytest.raises(NoCapacity):
            await executors[0].take(RunRequest(job="c", worker="w1"))
        assert executors[0].metrics()["refused"] == refused + 1
        before = worker.metrics()["refused"]
        await submit(client.store, await script_spec(client.store, "c", [post]))
        await reasoned(client.store, "c", "waiting: executors busy")
        assert worker.metrics()["refused"] > before
        server.answers.set()
        for job in ("a", "b", "c"):
            assert status((await until_done(client.store, job)).state)[0] == "succeeded"
        assert server.counts == {"POST /x": 3}


async def test_many_short_jobs_go_through_few_slots(
    place: Place, client: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of a free slot wake those who wait: without one, nobody asks again here."""
    monkeypatch.setattr("mvmci.engines.remote.AGAIN_S", 10 * LONG_S)
    await place.executor("x1", slots=1)
    await place.remote_worker("w1", slots=8)
    jobs = [f"j{number}" for number in range(40)]
    await submit(client.store, await script_spec(client.store, "warm", []))
    await until_done(client.store, "warm")
    async with asyncio.timeout(LONG_S):
        for job in jobs:
            await submit(client.store, await script_spec(client.store, job, []))
        for job in jobs:
            journal = await until_done(client.store, job)
            assert status(journal.state)[0] == "succeeded"
            assert len(leases(journal)) == 1


async def test_a_job_whose_executor_is_killed_goes_on_on_another(place: Place, client: Cluster) -> None:
    dying = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.parts.roles.executor", place.url, place.name, "x1", str(place.root),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert dying.stdout is not None
    await dying.stdout.readline()
    await place.remote_worker("w1")
    async with Counting().serve() as server:
        posts = [{"http": {"url": f"{server.url}/{name}", "method": "POST"}} for name in "ab"]
        steps = [posts[0], {"sleep": 3_000}, posts[1]]
        await submit(client.store, await script_spec(client.store, "j", steps))
        await until_journal(client.store, "j", lambda journal: journal.state.results > 0)
        dying.kill()
        await dying.wait()
        await place.executor("x2")
        journal = await until_done(client.store, "j")
        assert status(journal.state)[0] == "succeeded"
        assert [(lease.unit, lease.why) for lease in leases(journal)] == [
            ("x1", "first"),
            ("x2", "recovered"),
        ]
        assert server.counts == {"POST /a": 1, "POST /b": 1}


async def test_an_executor_goes_on_when_its_worker_leaves_and_the_next_one_follows_it(
    place: Place, client: Cluster
) -> None:
    await place.executor("x1")
    cluster = await place.join("w1")
    remote = await open_remote(cluster, "broker")
    await submit(client.store, await script_spec(client.store, "j", [{"sleep": 3_000}]))
    sent = asyncio.create_task(remote.run("j"))
    await until_journal(client.store, "j", lambda journal: journal.state.lease is not None)
    remote.drain()
    assert (await sent).kind == "released", "its hint is for another worker"
    await remote.close()
    other = await open_remote(await place.join("w2"), "broker")
    assert (await other.run("j")).kind == "ended"
    await other.close()
    journal = await load(client.store, "j")
    assert [lease.worker for lease in leases(journal)] == ["w1"]
    assert status(journal.state)[0] == "succeeded"


async def test_an_executor_that_drains_lets_workflows_go_to_another(place: Place, client: Cluster) -> None:
    draining = await place.executor("x1")
    await place.remote_worker("w1")
    await submit(client.store, await script_spec(client.store, "j", [{"sleep": 9_000}, {"now": True}]))
    await until_journal(client.store, "j", lambda journal: journal.state.lease is not None)
    await place.executor("x2")
    async with asyncio.timeout(LONG_S):
        await draining.drain()
    journal = await until_done(client.store, "j")
    assert [lease.unit for lease in leases(journal)] == ["x1", "x2"]
    assert journal.state.attempts == 1


async def test_a_word_that_is_lost_is_made_up_for_by_asking_again(
    place: Place, client: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.executor("x1")
    worker = await place.remote_worker("w1")
    transport = worker.engine._transport  # type: ignore[attr-defined]
    hear, heard = transport._on_reply, []

    def lose_the_second(message: object) -> None:
        heard.append(message)
        if len(heard) != 2:
            hear(message)

    monkeypatch.setattr(transport, "_on_reply", hear)
    await transport.close()
    transport._on_reply = lose_the_second
    transport._leaving.clear()
    await transport.open()
    await submit(client.store, await script_spec(client.store, "j", []))
    await until_done(client.store, "j")
    async with asyncio.timeout(LONG_S):
        while worker._at_work:  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(LOOK_S)
    assert len(heard) > 2
    assert len(leases(await load(client.store, "j"))) == 1


async def test_a_worker_that_reaches_no_executor_leaves_its_jobs_to_one_that_does(
    place: Place, client: Cluster
) -> None:
    await place.executor("x1")
    await place.remote_worker("w1", where="http://127.0.0.1:9", slots=4)
    await submit(client.store, await script_spec(client.store, "j", []))
    why = "waiting: the executor at http://127.0.0.1:9 cannot be reached: "
    async with asyncio.timeout(LONG_S):
        while True:
            summary = await summary_of(client.store, await load(client.store, "j"))
            if summary.reason.startswith(why):
                break
            await asyncio.sleep(LOOK_S)
    await place.remote_worker("w2", slots=1)
    journal = await until_done(client.store, "j")
    assert [(lease.unit, lease.worker) for lease in leases(journal)] == [("x1", "w2")]


async def test_a_worker_switches_to_another_engine_and_loses_nothing(place: Place, client: Cluster) -> None:
    cluster = await place.join("w1")
    worker = place._at_work(
        cluster, open_embedded(cluster.store, place.root, allow=lambda: ALLOW, slots=2), 2
    )
    await place.executor("x1")
    async with Counting().serve() as server:
        post = {"http": {"url": f"{server.url}/x", "method": "POST"}}
        jobs = [f"j{number}" for number in range(6)]
        for job in jobs:
            steps = [post, {"sleep": 1_000}, post]
            await submit(client.store, await script_spec(client.store, job, steps))
        await until_journal(client.store, "j0", lambda journal: journal.state.results > 0)
        await worker.switch(await open_remote(cluster, "broker"), within_s=LONG_S)
        journals = [await until_done(client.store, job) for job in jobs]
        assert {status(journal.state)[0] for journal in journals} == {"succeeded"}
        units = [lease.unit for journal in journals for lease in leases(journal)]
        assert set(units) == {"w1", "x1"}
        await worker.switch(
            open_embedded(cluster.store, place.root, allow=lambda: ALLOW, slots=2), within_s=LONG_S
        )
        await submit(client.store, await script_spec(client.store, "back", []))
        journal = await until_done(client.store, "back")
        assert [lease.unit for lease in leases(journal)] == ["w1"]
        assert server.counts == {"POST /x": 12}


async def test_what_does_not_end_in_time_is_let_go_at_a_switch_and_goes_on(
    place: Place, client: Cluster
) -> None:
    cluster = await place.join("w1")
    worker = place._at_work(
        cluster, open_embedded(cluster.store, place.root, allow=lambda: ALLOW, slots=2), 2
    )
    await place.executor("x1")
    spec = await script_spec(client.store, "j", [{"sleep": 5_000}])
    await submit(client.store, spec)
    await until_journal(client.store, "j", lambda journal: journal.state.lease is not None)
    await worker.switch(await open_remote(cluster, "broker"), within_s=0)
    journal = await until_done(client.store, "j")
    assert status(journal.state)[0] == "succeeded"
    assert [lease.unit for lease in leases(journal)] == ["w1", "x1"]
