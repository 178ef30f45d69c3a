"""The load of `mvmci bench`: what is planned, what is told, and what is counted, without a cluster."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import wasmtime

from mvmci.bench import load
from mvmci.bench.client import Client, Count, Job
from mvmci.bench.guests import ACTIONS, ACTIONS_WASM
from mvmci.bench.profiles import MIXED, PROFILES, prepare
from mvmci.errors import Usage
from mvmci.jobs.journal import Done, Journal, Spec
from mvmci.jobs.module import inspect_module
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.parser import Incoming
from tests.harness.waiting import until_true

# ---- Figures


@pytest.mark.parametrize(
    ("name", "jobs", "found"),
    [("p50", 20, 10.0), ("p90", 100, 90.0), ("p99", 1000, 990.0), ("p99.9", 10_000, 9990.0)],
)
def test_a_percentile_is_told_from_ten_jobs_beyond_it_and_not_from_fewer(
    name: str, jobs: int, found: float
) -> None:
    samples = [ms * 1000 for ms in range(jobs, 0, -1)]
    assert load.percentiles(samples)[name] == found
    assert name not in load.percentiles(samples[1:])


def test_few_jobs_tell_nothing() -> None:
    assert load.percentiles([]) == load.percentiles([5] * 19) == {}


def test_the_ids_that_are_shown_are_of_the_whole_window() -> None:
    assert load.shown(["a", "b"]) == ["a", "b"]
    for count in (500, 501, 1003, 9999):
        ids = load.shown([str(number) for number in range(count)])
        assert 250 <= len(ids) <= load.SHOWN_MAX
        assert int(ids[-1]) > 0.99 * count


def test_a_plan_is_a_poisson_process_and_the_same_for_its_seed() -> None:
    moments = load.plan(1000, 20, seed=7)
    assert moments == load.plan(1000, 20, seed=7) != load.plan(1000, 20, seed=8)
    assert moments == sorted(moments) and moments[0] > 0 and moments[-1] < 20e9
    assert len(moments) == pytest.approx(20_000, rel=0.03)
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    assert statistics.pstdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)  # exponential


def test_a_window_is_from_an_end_to_an_end() -> None:
    window = load._Window(1.0)
    ends = [Job(str(number), lambda _: None, 0) for number in range(6)]
    for job, at in zip(ends, (5.0, 5.5, 5.9, 6.2, 6.3, 9.0), strict=True):
        job.ended_ns = int(at * 1e9)
        window.take(job)
    assert window.ends == ends[:4]  # that at 6.2 is the first after a second
    assert window.over.is_set()


async def test_an_alarm_rings_at_its_moment_and_not_at_one_that_was_changed() -> None:
    rung = asyncio.Event()
    alarm = load.Alarm(rung.set)
    alarm.at(time.monotonic_ns())
    await rung.wait()
    rung.clear()
    alarm.at(time.monotonic_ns() + 1_000_000)
    alarm.at(due := time.monotonic_ns() + 50_000_000)
    await rung.wait()
    alarm.close()
    assert time.monotonic_ns() >= due


async def test_how_late_we_are_counts_all_the_time_for_which_we_stood_still() -> None:
    late = load.Lateness()
    time.sleep(0.5)  # noqa: ASYNC251 (that is what is tested)
    await until_true(lambda: len(late.ns) > 50)
    late.close()
    assert sum(ns > 250_000_000 for ns in late.ns) >= 25


# ---- Profiles


def test_the_guest_is_its_text_assembled() -> None:
    assert bytes(wasmtime.wat2wasm(ACTIONS)) == ACTIONS_WASM
    found = inspect_module(ACTIONS_WASM, name="actions.wasm")
    assert (found.kind, found.component) == ("workflow", True)


class Blobs:
    """Keeps nothing, and knows what it was given."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []

    async def put(self, data: bytes) -> str:
        self.kept.append(data)
        return f"sha256:{len(self.kept):064}"


def client(blobs: Blobs | None = None) -> Any:
    return SimpleNamespace(store=SimpleNamespace(blobs=blobs or Blobs()))


async def test_every_profile_makes_jobs_whose_modules_were_kept() -> None:
    for name, profile in PROFILES.items():
        blobs = Blobs()
        work = await prepare(profile, client(blobs), "http://127.0.0.1:1/")
        one, two = work.next("b-1", 5), work.next("b-2", 6)
        assert (one.id, one.at, two.id, two.at) == ("b-1", 5, "b-2", 6), name
        assert ACTIONS_WASM in blobs.kept and profile.about
        assert Spec(**msgspec.structs.asdict(one)) == one
        assert (one.tree is not None) == (name == "tree")


async def test_a_profile_that_asks_a_service_is_refused_without_one() -> None:
    for name in ("effects", "mixed"):
        with pytest.raises(Usage, match="there is none"):
            await prepare(PROFILES[name], client())


async def test_mixed_is_the_same_row_of_jobs_in_every_run_and_keeps_its_proportions() -> None:
    first, second = [await prepare(PROFILES["mixed"], client(), "http://x/") for _ in range(2)]
    rows = [[work.next(str(number), 0) for number in range(2000)] for work in (first, second)]
    assert rows[0] == rows[1]
    drawn = Counter((spec.kind, spec.input.text) for spec in rows[0])
    assert len(drawn) == len(MIXED)
    shares = sorted(drawn.values())
    assert shares == pytest.approx(
        [share * 2000 / sum(MIXED.values()) for share in sorted(MIXED.values())], rel=0.3
    )


# ---- What is counted


class Link:
    """A stream of ends."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def add(self, job: str, status: str = "succeeded") -> None:
        seq = 10 * (len(self.ends) + 1)
        data = Journal(job).encode([Done(at=0, status=status)], "1")  # type: ignore[arg-type]
        subject, headers = f"t.job.{job}.done.default.w", {"Nats-Time-Stamp": "2026-01-01T00:00:00Z"}
        self.ends.append(SimpleNamespace(seq=seq, subject=subject, data=data, headers=headers))

    async def read(self, stream: str, subject: str, after: int) -> AsyncIterator[Any]:
        assert (stream, subject) == ("t-JOBS", "t.job.*.done.*.*")
        for one in self.ends:
            if one.seq > after:
                yield one

    def word(self, place: int) -> Incoming:
        one = self.ends[place]
        headers = {"Nats-Subject": one.subject, "Nats-Sequence": str(one.seq), **one.headers}
        return Incoming(f"t.stored.job.{one.subject.split('.')[2]}", b"", headers)


async def test_every_job_is_counted_once_whatever_was_heard_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvmci.bench.client.LOOK_EVERY_S", 0.01)
    link, ended = Link(), list[Job]()
    cluster: Any = SimpleNamespace(store=None, link=link, layout=Layout("t"))
    client = Client(cluster)
    one, two, three, four = (client.expect(ended.append) for _ in range(4))
    link.add("a-stranger")
    for job, status in ((one, "succeeded"), (two, "failed"), (one, "succeeded"), (three, "succeeded")):
        link.add(job.id, status)
    for place in (0, 1, 1, 3):  # a stranger's, one, one once more and its second end; none of two and three
        client.hear(link.word(place))
    assert ended == [one]
    assert await client.count() == Count(submitted=4, ended_once=2, lost=1, twice=1)
    assert ended == [one, two, three] and client.open == 1
    assert [(found.seq, found.succeeded) for found in await client.recorded(20, 50)] == [
        (30, False),
        (50, True),
    ]
    assert await client.recorded(0, 50) == []  # they were taken
    link.add(four.id)
    await client.settle()
    assert await client.count() == Count(submitted=4, ended_once=3, lost=0, twice=1)
