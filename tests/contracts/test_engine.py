"""What every engine promises to the worker that has it: one in this process, and executors by either way.

Jobs are kept on a broker. A way is an engine of one kind, with the executor that it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mvmci.api.app import Api, serve_api
from mvmci.engine import Engine
from mvmci.engines import open_embedded, open_remote
from mvmci.engines.remote import Accepted, Failed, RunRequest, read_reply, read_request
from mvmci.engines.server import Executor, serve_requests
from mvmci.errors import EngineAway, NotFound, VersionsDiffer
from mvmci.jobs.allow import Allow
from mvmci.jobs.journal import AnyRecord, Intent, Journal, Lease, MessageKind, status
from mvmci.jobs.times import Stopwatch
from mvmci.journals.client import cancel_job, submit
from mvmci.journals.reader import load
from mvmci.store import Journals, Store
from mvmci.stores.nats import Cluster, dial_cluster, remove
from mvmci.wire import WIRE, level_of
from tests.conftest import CLUSTER_BYTES
from tests.harness.broker import ensure
from tests.harness.newer import NEWER, append_newer
from tests.harness.waiting import LONG_S, LOOK_S, until_journal, until_true
from tests.harness.world import Counting, command_spec, script_spec

KINDS = ("embedded", "broker", "http")
HOUR_MS = 3_600_000
ALLOW = Allow(http=("http://127.0.0.1:*/*",))


class Holding:
    """Journals that hold up the ends of jobs until `let_go` is set."""

    def __init__(self, inner: Journals) -> None:
        self._inner = inner
        self.held: set[str] = set()
        self.let_go = asyncio.Event()
        self.let_go.set()

    async def append(self, job: str, kind: MessageKind, queue: str, data: bytes, **options: Any) -> int:
        if kind == "done" and not self.let_go.is_set():
            self.held.add(job)
            await self.let_go.wait()
        return await self._inner.append(job, kind, queue, data, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclasses.dataclass
class Way:
    """An engine of one kind, and the cluster that it is in."""

    engine: Engine
    store: Store  # a client's
    journals: Holding  # of whoever runs jobs
    join: Callable[[str], Awaitable[Cluster]]
    close: Callable[[], Awaitable[None]]  # the engine, and its executor
    executor: Executor | None

    async def submit(self, job: str, *steps: dict[str, Any]) -> None:
        await submit(self.store, await script_spec(self.store, job, steps))

    async def ended(self, job: str) -> Journal:
        """The journal of `job`, whose run has ended it."""
        journal = await load(self.store, job)
        assert journal.state.done is not None
        return journal

    async def status(self, job: str) -> str:
        return status((await load(self.store, job)).state)[0]

    def speak(self, wire: int) -> None:
        """All that take part write at level `wire`."""
        own = self.engine._host.store if self.executor is None else self.engine._store  # type: ignore[attr-defined]
        for level in (self.store.level, own.level, self.executor.level if self.executor else own.level):
            level.spoken = wire


@contextlib.asynccontextmanager
async def way_to_an_engine(kind: str, broker_url: str, root: Path, folder: Path) -> AsyncIterator[Way]:
    name = f"t-{secrets.token_hex(4)}"
    await ensure(broker_url, name, store_bytes=CLUSTER_BYTES)
    async with contextlib.AsyncExitStack() as cluster_stack:
        cluster_stack.push_async_callback(remove, broker_url, name)
        engines = await cluster_stack.enter_async_context(contextlib.AsyncExitStack())

        async def join(unit: str, **options: Any) -> Cluster:
            cluster = await dial_cluster(broker_url, name, unit, **options)
            cluster_stack.push_async_callback(cluster.close)
            return cluster

        runs = await join("runs")
        journals = Holding(runs.store.journals)
        store = dataclasses.replace(runs.store, journals=journals)
        engine: Engine = open_embedded(store, root, allow=lambda: ALLOW, slots=1)
        engines.push_async_callback(engine.close)
        executor = Executor(engine, store, slots=1) if kind != "embedded" else None
        if executor is not None:
            if kind == "broker":
                serving = asyncio.create_task(serve_requests(executor, runs.link, runs.layout))
                engines.push_async_callback(_stop, serving)
                where = "broker"
            else:
                api = Api(store=store, executor=executor, folder=folder, now_ms=runs.clock.now_ms)
                port = await engines.enter_async_context(serve_api(api, "127.0.0.1", 0))
                where = f"http://127.0.0.1:{port}"
            engine = await open_remote(await join("worker"), where)
            engines.push_async_callback(engine.close)
        client = await join("client", announce=False)
        yield Way(engine, client.store, journals, join, engines.aclose, executor)
        journals.let_go.set()


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(params=KINDS)
async def way(
    request: pytest.FixtureRequest, broker_url: str, host_root: Path, tmp_path: Path
) -> AsyncIterator[Way]:
    async with way_to_an_engine(request.param, broker_url, host_root, tmp_path) as way:
        yield way


@pytest.fixture
async def outside() -> AsyncIterator[Counting]:
    async with Counting().serve() as server:
        yield server
        server.answers.set()


def count(journal: Journal, kind: type[AnyRecord]) -> int:
    return sum(isinstance(record, kind) for record in journal.records)


def post(outside: Counting, path: str) -> dict[str, Any]:
    return {"http": {"method": "POST", "url": f"{outside.url}/{path}"}}


def children() -> set[int]:
    """The processes whose parent this one is."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found |= {int(entry.name)} if int(fields[1]) == os.getpid() else set()
    return found


async def test_a_command_and_a_workflow_run_to_their_ends(way: Way) -> None:
    await submit(way.store, await command_spec(way.store, "c", "hello"))
    await way.submit("w", {"now": True})
    for job in ("c", "w"):
        assert (await way.engine.run(job)).kind == "ended"
        assert status((await way.ended(job)).state)[0] == "succeeded"


async def test_a_first_delivery_that_ends_quickly_is_written_in_one_message(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvmci.engines.embedded.engine.LEASE_WAIT_S", LONG_S)  # so that it is quick
    await way.submit("j")
    (spec_entry,) = await way.store.journals.read("j")
    assert (await way.engine.run("j", spec_entry=spec_entry)).kind == "ended"
    assert len(await way.store.journals.read("j")) == 2


@pytest.mark.parametrize("wire", range(WIRE + 1))
async def test_where_the_time_of_a_run_went_is_written_down(way: Way, outside: Counting, wire: int) -> None:
    way.speak(wire)
    await way.submit("j", post(outside, "a"))
    outside.answers.clear()
    run = asyncio.create_task(way.engine.run("j", stopwatch=Stopwatch(time.monotonic_ns)))
    await outside.asked.wait()
    asked_ns = time.monotonic_ns()
    await asyncio.sleep(10 * LOOK_S)
    held_us = (time.monotonic_ns() - asked_ns) // 1000
    outside.answers.set()
    await run
    journal = await way.ended("j")
    times = journal.state.times
    assert times.effects >= held_us
    assert all((times.slot, times.compile, times.guest, times.writes))
    # What was before its order, an executor of level 0 is not told.
    assert bool(times.order) == (way.executor is None or wire > 0)
    assert bool(times.way) == (way.executor is not None and wire > 0)
    assert times.total + (journal.queued_us or 0) == (journal.ended - journal.began) // 1000


async def test_a_probe_goes_to_an_executor_and_back_where_there_is_one(way: Way) -> None:
    assert await way.engine.probe() == (way.executor is not None)
    await way.engine.close()
    if way.executor is not None:
        with contextlib.suppress(EngineAway):  # one that was closed may still go there, or say that it cannot
            await way.engine.probe()


async def test_a_job_that_nobody_submitted_is_not_found(way: Way) -> None:
    with pytest.raises(NotFound):
        await way.engine.run("nobody")


async def test_an_ended_job_is_not_run_again(way: Way) -> None:
    await way.submit("j")
    await way.engine.run("j")
    tail = (await way.ended("j")).tail
    assert (await way.engine.run("j")).kind == "ended"
    assert (await way.ended("j")).tail == tail


async def test_two_calls_for_a_job_follow_one_run(way: Way, outside: Counting) -> None:
    await way.submit("j", post(outside, "a"))
    outside.answers.clear()
    first = asyncio.create_task(way.engine.run("j"))
    await outside.asked.wait()
    second = asyncio.create_task(way.engine.run("j"))
    await asyncio.wait((second,), timeout=10 * LOOK_S)  # one that looks for itself finds a live holder
    outside.answers.set()
    assert [outcome.kind for outcome in await asyncio.gather(first, second)] == ["ended", "ended"]
    assert count(await way.ended("j"), Lease) == 1
    assert outside.counts == {"POST /a": 1}


@pytest.mark.parametrize("way", ["broker"], indirect=True)
async def test_an_executor_that_is_sent_a_job_again_follows_its_run(way: Way, outside: Counting) -> None:
    await way.submit("j", post(outside, "a"))
    outside.answers.clear()
    assert way.executor is not None
    request = RunRequest(job="j", worker="worker")
    running = await way.executor.take(request)
    await outside.asked.wait()
    again = asyncio.create_task(way.executor.take(request))
    await asyncio.sleep(0)  # it has looked; one that does not follow waits for the slot
    outside.answers.set()
    assert await again is running
    await running
    assert way.executor.counts["taken"] == 1


async def test_a_long_sleep_is_released_until_the_time_that_its_intent_named(way: Way) -> None:
    await way.submit("j", {"sleep": HOUR_MS // 2})
    outcome = await way.engine.run("j")
    intent = next(one for one in (await load(way.store, "j")).records if isinstance(one, Intent))
    assert (outcome.kind, outcome.until) == ("released", intent.at + HOUR_MS // 2)
    assert await way.status("j") == "suspended"
    assert (await way.engine.run("j")).kind == "released", "too early is too early"
    assert count(await load(way.store, "j"), Lease) == 1
    await way.submit("next")
    assert (await way.engine.run("next")).kind == "ended", "its slot is free"


async def test_a_job_that_a_live_holder_has_is_left_to_it(
    way: Way, outside: Counting, host_root: Path
) -> None:
    await way.submit("j", post(outside, "a"))
    outside.answers.clear()
    rival = open_embedded((await way.join("rival")).store, host_root, allow=lambda: ALLOW, slots=1)
    running = asyncio.create_task(rival.run("j"))
    await outside.asked.wait()
    assert (await way.engine.run("j")).kind == "held"
    outside.answers.set()
    assert (await running).kind == "ended"
    await rival.close()
    assert count(await way.ended("j"), Lease) == 1


async def test_an_engine_that_is_deposed_writes_nothing_more(way: Way, outside: Counting) -> None:
    await way.submit("j", post(outside, "a"), post(outside, "b"))
    outside.answers.clear()
    running = asyncio.create_task(way.engine.run("j"))
    await outside.asked.wait()
    journal = await load(way.store, "j")
    newer = Lease(at=1, epoch=2, unit=way.store.presence.unit, incarnation="i", run="r", why="recovered")
    data = journal.encode([newer], "m")
    seq = await way.store.journals.append("j", "run", "default", data, expect=journal.tail)
    outside.answers.set()
    assert (await running).kind == "fenced"
    assert (await load(way.store, "j")).tail == seq
    assert outside.counts == {"POST /a": 1}


async def test_draining_lets_a_workflow_go_and_nothing_is_done_twice(way: Way, outside: Counting) -> None:
    await way.submit("j", post(outside, "a"), post(outside, "b"))
    outside.answers.clear()
    running = asyncio.create_task(way.engine.run("j"))
    await outside.asked.wait()
    way.engine.drain()
    outside.answers.set()
    outcome = await running
    assert (outcome.kind, outcome.until) == ("released", 0)
    way.engine.drain(False)
    assert (await way.engine.run("j")).kind == "ended"
    assert status((await way.ended("j")).state)[0] == "succeeded"
    assert outside.counts == {"POST /a": 1, "POST /b": 1}


async def test_while_it_drains_an_engine_begins_no_effect(way: Way, outside: Counting) -> None:
    await way.submit("j", post(outside, "a"))
    way.engine.drain()
    assert (await way.engine.run("j")).kind == "released"
    assert not outside.counts


async def test_a_cancel_before_the_first_lease_is_the_end(way: Way) -> None:
    await way.submit("j")
    await cancel_job(way.store, await load(way.store, "j"), "me")
    assert (await way.engine.run("j")).kind == "ended"
    assert await way.status("j") == "cancelled"
    assert count(await load(way.store, "j"), Lease) == 0


@pytest.mark.parametrize("kind", ["command", "workflow"])
async def test_a_cancel_ends_a_running_job(way: Way, kind: str) -> None:
    if kind == "command":
        await submit(way.store, await command_spec(way.store, "j", "loop"))
    else:
        await way.submit("j", {"loop": True})
    running = asyncio.create_task(way.engine.run("j"))
    await until_journal(way.store, "j", lambda journal: journal.state.held)
    await cancel_job(way.store, await load(way.store, "j"), "me")
    assert (await running).kind == "ended"
    assert status((await way.ended("j")).state) == ("cancelled", "cancelled by me")


async def test_a_slot_is_free_while_the_end_of_its_job_is_being_written(way: Way) -> None:
    for job in ("a", "b"):
        await way.submit(job)
    way.journals.let_go.clear()
    running = [asyncio.create_task(way.engine.run(job)) for job in ("a", "b")]
    await until_true(lambda: way.journals.held == {"a", "b"})
    way.journals.let_go.set()
    assert [outcome.kind for outcome in await asyncio.gather(*running)] == ["ended", "ended"]


@pytest.mark.parametrize("kind", KINDS)
async def test_closing_leaves_no_process_and_lets_jobs_go(
    broker_url: str, host_root: Path, tmp_path: Path, outside: Counting, kind: str
) -> None:
    before = children()
    async with way_to_an_engine(kind, broker_url, host_root, tmp_path) as way:
        await way.submit("j", post(outside, "a"))
        outside.answers.clear()
        running = asyncio.create_task(way.engine.run("j"))
        await outside.asked.wait()
        assert children() - before
        await way.close()
        with contextlib.suppress(asyncio.CancelledError):
            assert (await running).kind == "released"
        assert children() - before == set()
        assert await way.status("j") == "queued"


@pytest.mark.parametrize("way", ["broker", "http"], indirect=True)
@pytest.mark.parametrize("wire", NEWER)
async def test_a_request_of_a_newer_level_is_neither_taken_nor_called_busy(way: Way, wire: int) -> None:
    await way.submit("j")
    level = way.engine._store.level  # type: ignore[attr-defined]
    level.spoken = wire
    with pytest.raises(VersionsDiffer, match=f"the request is newer than this mvmci .* level {wire}"):
        await way.engine.run("j")
    level.spoken = 0
    assert (await way.engine.run("j")).kind == "ended"
    assert count(await way.ended("j"), Lease) == 1


@pytest.mark.parametrize("wire", NEWER)
async def test_a_job_that_a_newer_build_wrote_to_is_left_as_it_is(way: Way, wire: int) -> None:
    await way.submit("j")
    await append_newer(way.store, "j", wire)
    if way.executor is not None:
        way.engine._store.level.spoken = 1  # type: ignore[attr-defined]
    with pytest.raises(VersionsDiffer, match="message 2 of j is newer"):
        await way.engine.run("j")
    assert len(await way.store.journals.read("j")) == 2


@pytest.mark.parametrize("wire", range(WIRE + 1))
async def test_all_is_written_at_the_level_of_the_cluster(way: Way, wire: int) -> None:
    way.speak(wire)
    await way.submit("j")
    await way.engine.run("j")
    ids = [msgspec.json.decode(entry.data)["id"] for entry in await way.store.journals.read("j")]
    assert {level_of(one) for one in ids} == {wire}


@pytest.mark.parametrize("reply", [b'{"reply":"postponed"}', b'{"wire":2,"reply":"finished"}', b"[]", b"{"])
def test_a_reply_that_is_not_known_says_that_another_executor_may_do_better(reply: bytes) -> None:
    found = read_reply(reply)
    assert isinstance(found, Failed)
    assert found.why == "newer"


def test_fields_that_are_not_known_are_passed_over() -> None:
    told = b'{"reply":"accepted","unit":"x1","incarnation":"i","colour":"blue"}'
    assert read_reply(told) == Accepted(unit="x1", incarnation="i")
    asked = b'{"job":"j","worker":"w1","colour":"blue"}'
    assert read_request(asked) == RunRequest(job="j", worker="w1")
