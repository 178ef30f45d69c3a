"""Profiles and loads on a cluster that runs: jobs do what they say, and what is told of them is so."""

from __future__ import annotations

import asyncio
import statistics
import time

import msgspec
import pytest

from mvmci.bench import profiles
from mvmci.bench.client import Client, Job
from mvmci.bench.load import closed, flood, open_loop
from mvmci.bench.profiles import PROFILES, Work, prepare
from mvmci.errors import NotYet
from mvmci.jobs.job import Limits, Payload
from mvmci.jobs.journal import Intent, Journal, Lease, Released, Result, Spec
from mvmci.journals.client import cancel_job
from mvmci.journals.reader import load
from tests.harness.waiting import until_done, until_true


async def work(client: Client, name: str, service: str = "") -> Work:
    return await prepare(PROFILES[name], client, service)


async def one(client: Client, name: str, service: str, **changes: object) -> tuple[Journal, Job]:
    """A job of that profile, changed, and its journal once it has ended."""
    spec = (await work(client, name, service)).template(0)
    job = client.begin(Work([msgspec.structs.replace(spec, **changes)]), lambda _: None)
    await client.settle()
    return await until_done(client.store, job.id), job


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "mixed"])
async def test_a_job_of_each_profile_succeeds(client: Client, service: str, name: str) -> None:
    journal, _ = await one(client, name, service)
    assert journal.state.done is not None
    assert (journal.state.done.status, journal.state.done.reason) == ("succeeded", "")


async def test_waiting_is_in_its_slot_and_effects_are_written_before_and_after(
    client: Client, service: str
) -> None:
    journal, job = await one(client, "waiting", service)
    assert not any(isinstance(record, Released) for record in journal.records)
    assert len([record for record in journal.records if isinstance(record, Lease)]) == 1
    assert job.ended_ns - job.sent_ns >= profiles.WAIT_MS * 1_000_000
    journal, job = await one(client, "effects", service)
    kinds = [record.kind for record in journal.records if isinstance(record, Intent)]
    assert kinds == ["http"] * profiles.EFFECTS
    assert len([record for record in journal.records if isinstance(record, Result)]) == profiles.EFFECTS
    assert job.ended_ns - job.sent_ns >= profiles.EFFECTS * 20_000_000


async def test_what_a_job_cannot_have_is_its_failure_and_says_why(client: Client, service: str) -> None:
    journal, _ = await one(client, "memory", service, limits=Limits(memory_bytes=50 << 20))
    assert journal.state.done is not None and journal.state.done.status == "failed"
    assert "memory" in journal.state.done.reason
    elsewhere = Payload(text='["get http://127.0.0.1:1/"]')
    journal, _ = await one(client, "light", service, input=elsewhere)
    assert journal.state.done is not None and journal.state.done.status == "failed"
    assert "http://127.0.0.1:1/" in journal.state.done.reason


async def test_the_files_of_tree_are_there(client: Client, service: str) -> None:
    journal, _ = await one(client, "tree", service, artifacts=("**",))
    assert journal.state.done is not None
    kept = msgspec.json.decode(journal.state.done.artifacts.text or "")
    assert len(kept) == profiles.FILES
    assert {artifact["size"] for artifact in kept} == {profiles.FILE_BYTES}


async def test_a_window_of_a_closed_loop_has_the_ends_that_the_journals_have(
    client: Client, service: str
) -> None:
    async with closed(client, await work(client, "mixed", service), 4) as loop:
        windows = [await loop.window(2.0) for _ in range(2)]
    stored: dict[int, int] = {}
    async for job, entry, _ in client.cluster.journals.ends():
        if job.startswith("b-"):
            stored[entry.seq] = entry.stored
    for window in windows:
        assert window.ended == window.recorded == len(window.samples_us) > 0
        began, over = stored[window.first], stored[window.last]
        assert sum(began < at <= over for at in stored.values()) == window.ended
        assert window.seconds == pytest.approx((over - began) / 1e9)
        assert window.failed == 0 and window.at_once == 4
        assert set(window.ids) <= set(await jobs_between(client, window.first, window.last))
    assert windows[0].first < windows[0].last <= windows[1].first < windows[1].last


async def jobs_between(client: Client, after: int, to: int) -> list[str]:
    return [job async for job, entry, _ in client.cluster.journals.ends() if after < entry.seq <= to]


async def test_a_closed_loop_keeps_as_many_jobs_open_as_it_is_told_and_leaves_none(client: Client) -> None:
    async with closed(client, await work(client, "light"), 3) as loop:
        assert client.open == 3
        ended = 0
        while ended <= 3:
            ended += (await loop.window(0.5)).ended
        assert client.open == 3
        loop.at_once = 40
        assert client.open == 40
        loop.at_once = 2
        await until_true(lambda: client.open == 2)
    assert client.open == 0


async def test_failures_are_counted_in_their_window(client: Client) -> None:
    spec = (await work(client, "light")).template(0)
    fails = msgspec.structs.replace(spec, input=Payload(text='["get http://127.0.0.1:1/"]'))
    async with closed(client, Work([spec, fails]), 4) as loop:
        window = await loop.window(1.0)
    assert 0 < window.failed < window.ended


async def test_an_open_loop_submits_all_of_its_plan_and_counts_from_it(client: Client) -> None:
    loaded = await open_loop(client, await work(client, "light"), 50, 2.0, seed=3)
    again = await open_loop(client, await work(client, "light"), 50, 2.0, seed=3)
    assert loaded.ended == loaded.recorded == again.ended > 50
    assert loaded.planned == 50 and loaded.seconds == 2.0 and not loaded.gave_up and not loaded.failed
    for planned, sent in zip(loaded.samples_us, loaded.sent_us, strict=True):
        assert planned >= sent > 0


async def test_what_makes_the_load_too_late_is_counted_and_nothing_is_left_out(client: Client) -> None:
    """Half of the plan is due while our loop stands still."""
    light = await work(client, "light")
    asyncio.get_running_loop().call_later(0.5, time.sleep, 1.0)
    loaded = await open_loop(client, light, 100, 2.0, seed=3)
    undisturbed = await open_loop(client, light, 100, 2.0, seed=3)
    assert loaded.ended == undisturbed.ended
    late = [planned - sent for planned, sent in zip(loaded.samples_us, loaded.sent_us, strict=True)]
    assert sum(us > 100_000 for us in late) > 0.3 * loaded.ended
    assert loaded.late_ms == pytest.approx(statistics.median(late) / 1000, abs=0.01)


async def test_an_open_loop_says_that_the_cluster_does_not_keep_up(client: Client) -> None:
    loaded = await open_loop(client, await work(client, "waiting"), 400, 60.0, open_max=50)
    assert loaded.gave_up == "more than 50 jobs are open: the cluster does not keep up"
    assert 50 <= loaded.ended == loaded.recorded < 400 * 60
    assert loaded.seconds < 60


async def test_a_flood_is_counted_by_its_journals(client: Client) -> None:
    spec = (await work(client, "light")).template(0)
    fails = msgspec.structs.replace(spec, input=Payload(text='["get http://127.0.0.1:1/"]'))
    found = await flood(client, Work([spec, fails], [9, 1]), 100)
    assert found.jobs == 100 == found.succeeded + found.failed and found.failed > 0
    assert (found.lost, found.twice) == (0, 0) and found.seconds > 0


async def test_a_flood_lasts_for_as_long_as_jobs_end(client: Client) -> None:
    found = await flood(client, await work(client, "waiting"), 60, within_s=0.5)
    assert (found.succeeded, found.lost) == (60, 0) and found.seconds > 0.5


async def test_who_leaves_a_loop_is_told_how_many_jobs_are_still_open(client: Client) -> None:
    spec: Spec = (await work(client, "light")).template(0)
    long = Work([msgspec.structs.replace(spec, input=Payload(text='["sleep 3600000"]'))])
    with pytest.raises(NotYet, match=r"^3 jobs have not ended after"):
        async with closed(client, long, 3, within_s=0.1):
            ids = [*client._open]
    for job in ids:
        journal = await load(client.store, job)
        await cancel_job(client.store, journal, "test")
    await client.settle()
