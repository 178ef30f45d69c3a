"""What JetStream alone can do to a store: restart, lose what is in memory, fill up, fall silent."""

from __future__ import annotations

import asyncio
import functools
import io
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mvmci.cluster.broker import BATCH_MESSAGES_MAX, BATCHES_OPEN_MAX
from mvmci.errors import Conflict, StoreFull, StoreUnavailable
from mvmci.jobs.journal import Journal, Lease, MessageKind
from mvmci.journals.writer import Writer
from mvmci.store import GONE_S, Chunk, Source, Store, digest_of
from mvmci.stores.nats import dial_cluster
from mvmci.stores.nats.layout import STORE_BYTES, Layout
from mvmci.stores.nats.link import Link, Stored
from mvmci.stores.nats.parser import Incoming
from mvmci.stores.nats.presence import NatsPresence
from tests.conftest import open_nats
from tests.harness.broker import Broker, ensure
from tests.harness.proxy import Proxy
from tests.harness.waiting import LONG_S, until_true
from tests.harness.world import command_spec

CLUSTER = "demo"
STORE = 256 << 20
READS = 200
ROUNDS = 50
STEP_S = 0.0001
STEPS = 8
CALLED_OFF_MIN = 5
TRIES = 5
CHANGES, CHANGES_S = 800, 8.0

listening_or_asking = pytest.mark.parametrize("listens", [True, False], ids=["listening", "asking"])


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    """A broker of the test's own, to be killed."""
    broker = Broker(tmp_path / "broker")
    await broker.start()
    await ensure(broker.url, CLUSTER, store_bytes=STORE)
    yield broker
    await broker.stop()


async def restart(broker: Broker) -> None:
    await broker.kill()
    await broker.start()


def chunk(number: int) -> Chunk:
    return Chunk(attempt=0, number=number, stream="stdout", data=b"x", at=1)


def lease_of(store: Store, epoch: int = 1) -> Lease:
    who = store.presence
    return Lease(at=1, epoch=epoch, unit=who.unit, incarnation=who.incarnation, run="r", why="first")


class Clock:
    """The reader's own clock, which the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def fall_silent(store: Store) -> None:
    """As if the process had been killed: no word any more, and none of farewell."""
    presence = store.presence
    assert isinstance(presence, NatsPresence)
    assert presence._announcer is not None
    presence._announcer.cancel()
    await asyncio.wait([presence._announcer])
    presence._announcer = None


async def test_streams_are_made_once_and_again_for_free(broker: Broker) -> None:
    store = await open_nats(broker.url, CLUSTER, "u1")
    await store.journals.append("a", "spec", "q", b"x", expect=0)
    await ensure(broker.url, CLUSTER, store_bytes=STORE)
    assert len(await store.journals.read("a")) == 1
    await store.close()


def test_the_sizes_of_all_streams_sum_up_to_less_than_the_store() -> None:
    streams = Layout(CLUSTER).streams(STORE_BYTES)
    assert all(stream["max_bytes"] > 0 for stream in streams)
    assert sum(stream["max_bytes"] for stream in streams) < STORE_BYTES


async def test_no_broker_is_one_sentence() -> None:
    with pytest.raises(StoreUnavailable, match="no broker answers"):
        await open_nats("nats://127.0.0.1:1", CLUSTER, "u1")


async def test_an_acknowledged_append_survives_kill_9(broker: Broker) -> None:
    store = await open_nats(broker.url, CLUSTER, "u1")
    seqs = await asyncio.gather(
        *(store.journals.append(f"j{i}", "spec", "q", b"x", expect=0) for i in range(100))
    )
    await restart(broker)
    for i, seq in enumerate(seqs):
        assert [entry.seq for entry in await store.journals.read(f"j{i}")] == [seq]
    await store.close()


async def test_a_pull_that_spans_a_restart_gets_its_hint(broker: Broker) -> None:
    store = await open_nats(broker.url, CLUSTER, "u1")
    assert await store.hints.pull("q", wait_s=0.1) is None  # from now on it is told of what comes
    waiting = asyncio.create_task(store.hints.pull("q", wait_s=LONG_S))
    await asyncio.sleep(0.1)
    await restart(broker)
    await store.hints.ready("q", "a")
    hint = await waiting
    assert hint is not None
    assert hint.job == "a"
    await store.close()


async def test_a_follower_goes_on_after_a_restart_without_gap_or_repetition(broker: Broker) -> None:
    store = await open_nats(broker.url, CLUSTER, "u1")
    await store.logs.append("a", "q", [chunk(number) for number in range(10)])
    follower = store.logs.follow("a")
    seen = [(await anext(follower)).number for _ in range(5)]
    await restart(broker)
    await store.logs.append("a", "q", [chunk(number) for number in range(10, 20)])
    async with asyncio.timeout(LONG_S):
        seen += [(await anext(follower)).number for _ in range(15)]
    assert seen == list(range(20))
    await follower.aclose()
    await store.close()


async def test_a_follower_of_a_journal_goes_on_after_a_restart(broker: Broker) -> None:
    store = await open_nats(broker.url, CLUSTER, "u1")
    follower = store.journals.follow("a")
    first = await store.journals.append("a", "spec", "q", b"1", expect=0)
    assert (await anext(follower)).data == b"1"
    waiting = asyncio.ensure_future(anext(follower))
    await asyncio.sleep(0.1)
    await restart(broker)
    await store.journals.append("a", "run", "q", b"2", expect=first)
    async with asyncio.timeout(LONG_S):
        assert (await waiting).data == b"2"
    await follower.aclose()
    await store.close()


async def test_a_full_store_says_so_and_takes_more_once_there_is_room(broker: Broker) -> None:
    await ensure(broker.url, "small", store_bytes=4 << 20)
    store = await open_nats(broker.url, "small", "u1")
    data = b"x" * 500_000

    async def fill() -> None:
        for i in range(20):
            await store.journals.append(f"j{i}", "spec", "q", data, expect=0)

    with pytest.raises(StoreFull):
        await fill()
    with pytest.raises(StoreFull):
        await store.blobs.put(bytes(10 << 20))
    link = Link(broker.url, "test")
    await link.open()
    await link.api("STREAM.PURGE.small-JOBS", filter=Layout("small").journal("j0"))
    await link.close()
    await store.journals.append("late", "spec", "q", data, expect=0)
    await store.close()


async def test_an_upload_that_does_not_fit_is_refused_before_it_is_sent(broker: Broker) -> None:
    await ensure(broker.url, "small", store_bytes=16 << 20)
    store = await open_nats(broker.url, "small", "u1")
    cluster = await dial_cluster(broker.url, "small", "u2")

    async def bytes_of_blobs() -> int:
        answer = await cluster.link.api(f"STREAM.INFO.{cluster.layout.blobs}")
        return int(answer["state"]["bytes"])

    def files(count: int) -> dict[str, Source]:
        contents = [os.urandom(300_000) for _ in range(count)]
        return {digest_of(data): Source(len(data), functools.partial(io.BytesIO, data)) for data in contents}

    await store.blobs.put(b"there")
    before = await bytes_of_blobs()
    for too_much in (files(20), files(14)):
        with pytest.raises(StoreFull, match=r"MiB do not fit .*: of 4\.0 MiB"):
            await store.blobs.put_all(too_much)
    assert await bytes_of_blobs() == before
    assert await store.blobs.put_all(files(12)) == set()
    await store.close()
    await cluster.close()


async def test_a_slow_line_makes_transfers_slow_and_leaves_them_whole(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits on time are a part of what they are, and the line is as much faster than a bad one."""
    monkeypatch.setattr("mvmci.stores.nats.link.PING_EVERY_S", 1)
    monkeypatch.setattr("mvmci.stores.nats.link.READ_STALL_S", 0.4)
    files = {digest_of(data): data for data in (os.urandom(128 << 10) for _ in range(32))}
    async with Proxy(broker.url).serve() as proxy:
        proxy.rate = 1e6
        store = await open_nats(proxy.url, CLUSTER, "u1")
        sources = {
            digest: Source(len(data), functools.partial(io.BytesIO, data)) for digest, data in files.items()
        }
        assert await store.blobs.put_all(sources) == set()
        assert await asyncio.gather(*map(store.blobs.get, files)) == list(files.values())
        await store.close()


async def test_the_last_part_of_the_journals_is_kept_for_jobs_that_were_accepted(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ensure(broker.url, "small", store_bytes=16 << 20)
    monkeypatch.setattr("mvmci.stores.nats.journals.ROOM_S", 0.0)
    store = await open_nats(broker.url, "small", "u1")
    data = b"x" * 100_000
    jobs: list[tuple[str, int]] = []

    async def fill() -> None:
        for number in range(200):
            job = f"j{number}"
            jobs.append((job, await store.journals.append(job, "spec", "q", data, expect=0)))

    with pytest.raises(StoreFull, match="90 %"):
        await fill()
    room = Layout("small").streams(16 << 20)[0]["max_bytes"]
    assert len(jobs) * len(data) < room
    for job, seq in jobs[:5]:
        await store.journals.append(job, "done", "q", data, expect=seq)
    await store.close()


@listening_or_asking
async def test_a_silent_holder_is_gone_when_the_readers_clock_says_so_and_not_before(
    broker: Broker, listens: bool
) -> None:
    clock = Clock()
    reader = await open_nats(broker.url, CLUSTER, "u1", clock=clock, listens=listens)
    holder = await open_nats(broker.url, CLUSTER, "u2")
    await holder.presence.add_job("a", 1)

    async def heard() -> bool:
        return any(member.holds == ("a@1",) for member in await reader.presence.members())

    await until_true(heard)
    await fall_silent(holder)
    assert await reader.presence.live("a", lease_of(holder))
    for _ in range(3):
        clock.now += 1.3
        await announced(reader)
        expected = clock.now - 1000.0 < 4.0
        assert await reader.presence.live("a", lease_of(holder)) is expected
    clock.now += 1.3
    await announced(reader)
    assert not await reader.presence.live("a", lease_of(holder))
    await reader.close()
    await holder.close()


async def announced(store: Store) -> None:
    """Wait until this unit's own word went through, so that it trusts its ears."""
    presence = store.presence
    assert isinstance(presence, NatsPresence)
    await presence._announce()


@listening_or_asking
async def test_a_reader_that_was_suspended_declares_nobody_dead(broker: Broker, listens: bool) -> None:
    clock = Clock()
    reader = await open_nats(broker.url, CLUSTER, "u1", clock=clock, listens=listens)
    holder = await open_nats(broker.url, CLUSTER, "u2")
    await holder.presence.add_job("a", 1)
    assert await reader.presence.live("a", lease_of(holder))
    await fall_silent(holder)
    clock.now += 1000.0
    assert await reader.presence.live("a", lease_of(holder))
    assert [member.unit for member in await reader.presence.members()]
    await announced(reader)
    assert await reader.presence.live("a", lease_of(holder))  # its wait begins anew
    for _ in range(4):
        clock.now += 1.5
        await announced(reader)
    assert not await reader.presence.live("a", lease_of(holder))
    await reader.close()
    await holder.close()


@listening_or_asking
async def test_after_a_restart_the_lost_bucket_is_made_again_and_nobody_was_dead(
    broker: Broker, listens: bool
) -> None:
    one = await open_nats(broker.url, CLUSTER, "u1", gone_s=3.0, listens=listens)
    two = await open_nats(broker.url, CLUSTER, "u2", gone_s=3.0)
    await two.presence.add_job("a", 1)
    wrong: list[bool] = []

    async def watch() -> None:
        while True:
            if not await one.presence.live("a", lease_of(two)):
                wrong.append(True)
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    await broker.kill()
    await asyncio.sleep(3.5)  # longer than a silence that means death
    await broker.start()
    link = Link(broker.url, "test")
    await link.open()

    async def bucket_is_back() -> bool:
        try:
            answer = await link.api(f"STREAM.INFO.{Layout(CLUSTER).members}")
        except StoreUnavailable:
            return False
        return int(answer["state"]["messages"]) == 2

    await until_true(bucket_is_back)
    await asyncio.sleep(3.5)
    watching.cancel()
    assert not wrong
    assert {member.unit for member in await one.presence.members()} == {"u1", "u2"}
    for closing in (link.close, one.close, two.close):
        await closing()


async def test_nobody_is_dead_in_a_bucket_that_was_made_anew_behind_everybodys_back(broker: Broker) -> None:
    one = await open_nats(broker.url, CLUSTER, "u1")
    two = await open_nats(broker.url, CLUSTER, "u2")
    await two.presence.add_job("a", 1)
    link = Link(broker.url, "test")
    await link.open()
    layout, loop = Layout(CLUSTER), asyncio.get_running_loop()
    for anew in (False, True):
        if anew:
            await link.api(f"STREAM.DELETE.{layout.members}")
            await link.api(f"STREAM.CREATE.{layout.members}", **layout.members_stream())
        until_s = loop.time() + 2 * GONE_S
        while loop.time() < until_s:
            assert await one.presence.live("a", lease_of(two))
            await asyncio.sleep(0.02)
    for closing in (link.close, one.close, two.close):
        await closing()


@pytest.mark.parametrize("restarts", [False, True])
async def test_who_is_silent_for_long_is_gone_at_the_first_question(broker: Broker, restarts: bool) -> None:
    """The reader never heard of it, but knows which of its own words came later."""
    clock = Clock()
    reader = await open_nats(broker.url, CLUSTER, "u1", clock=clock)
    ghost = Lease(at=1, epoch=1, unit="ghost", incarnation="i", run="r", why="first")
    stopped = await open_nats(broker.url, CLUSTER, "u2")
    await fall_silent(stopped)
    again = await open_nats(broker.url, CLUSTER, "u2") if restarts else None
    for _ in range(4):
        await announced(reader)
        clock.now += 1.0
    await announced(reader)
    late = await open_nats(broker.url, CLUSTER, "u3", clock=clock)
    assert await late.presence.live("a", ghost)  # it has only just come itself
    assert await late.presence.live("a", lease_of(stopped))
    assert not await reader.presence.live("a", ghost)
    assert not await reader.presence.live("a", lease_of(stopped))
    assert await reader.presence.find("u2", stopped.presence.incarnation) is None
    if again is not None:
        await announced(again)
        assert await reader.presence.live("b", lease_of(again))
        assert await reader.presence.find("u2", again.presence.incarnation) is not None
        there = [one.incarnation for one in await late.presence.members() if one.unit == "u2"]
        assert there == [again.presence.incarnation]  # also for who has only just come
        await again.close()
    for store in (reader, stopped, late):
        await store.close()


async def test_a_listener_that_could_not_read_at_first_notices_a_death_all_the_same(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> AsyncIterator[Stored]:
        raise StoreUnavailable("no answer")

    clock = Clock()
    with monkeypatch.context() as recovering:
        recovering.setattr(Link, "read", unreadable)
        reader = await open_nats(broker.url, CLUSTER, "u1", clock=clock, listens=True)
    holder = await open_nats(broker.url, CLUSTER, "u2")

    async def heard() -> bool:
        return "u2" in {member.unit for member in await reader.presence.members()}

    await until_true(heard)
    await fall_silent(holder)
    for _ in range(5):
        clock.now += 1.0
        await announced(reader)
    assert not await reader.presence.live("a", lease_of(holder))
    for store in (reader, holder):
        await store.close()


@listening_or_asking
async def test_a_word_that_nobody_can_read_troubles_nobody(broker: Broker, listens: bool) -> None:
    holder = await open_nats(broker.url, CLUSTER, "u2")
    link, layout = Link(broker.url, "test"), Layout(CLUSTER)
    await link.open()
    for number, word in enumerate((b"\xff\xfe", b"{}", b"[" * 100_000, b'{"unit":"\xff"}')):
        await link.request(layout.member("u3", f"i{number}"), word)
    reader = await open_nats(broker.url, CLUSTER, "u1", listens=listens)
    assert {member.unit for member in await reader.presence.members()} == {"u1", "u2"}
    for number in range(4):
        strange = Lease(at=1, epoch=1, unit="u3", incarnation=f"i{number}", run="r", why="first")
        assert await reader.presence.live("a", strange)  # until it has been silent for long
    await link.close()
    for store in (reader, holder):
        await store.close()


async def test_nobody_is_gone_for_a_reader_that_cannot_read(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    cluster = await dial_cluster(broker.url, CLUSTER, "u1", clock=clock)
    reader, holder = cluster.store, await open_nats(broker.url, CLUSTER, "u2")
    assert await reader.presence.live("a", lease_of(holder))

    async def unreadable(*_: object) -> dict[str, Stored]:
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(cluster.link, "lasts", unreadable)
    for _ in range(6):
        clock.now += 1.0
        await announced(reader)
        assert await reader.presence.live("a", lease_of(holder))
        found = await reader.presence.find("u3", "i")
        assert found is not None and found.holds == ()
    for store in (reader, holder):
        await store.close()


async def test_a_link_hears_on_when_whoever_leaves_a_group_is_called_off(broker: Broker) -> None:
    link = Link(broker.url, "test")
    await link.open()
    leave = await link.subscribe("a.b", lambda _: None, group="g")
    leaving = asyncio.create_task(leave())
    while not link._client._pongs:  # noqa: ASYNC110 (nobody tells of it)
        await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await link.api(f"STREAM.INFO.{Layout(CLUSTER).members}")
    await link.close()


async def test_a_unit_says_one_word_a_second_however_fast_its_jobs_change(broker: Broker) -> None:
    store = await open_nats(broker.url, CLUSTER, "u1")
    link = Link(broker.url, "listener")
    await link.open()
    words: list[Incoming] = []
    await link.subscribe(Layout(CLUSTER).member("*", "*"), words.append)
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        for number in range(CHANGES):
            await store.presence.add_job(f"j{number}", 1)
            await asyncio.sleep(CHANGES_S / CHANGES)
            await store.presence.remove_job(f"j{number}")
        assert 1 <= len(words) <= 2 * (loop.time() - began)
    finally:
        await link.close()
        await store.close()


async def test_the_death_of_the_announcer_is_not_kept_secret(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_nats(broker.url, CLUSTER, "u1")
    presence = store.presence
    assert isinstance(presence, NatsPresence)

    async def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(presence, "_announce", broken)
    presence._changed.set()
    assert presence._announcer is not None
    await asyncio.wait([presence._announcer])
    with pytest.raises(Exception, match="can no longer say"):
        await presence.add_job("a", 1)
    await store.close()


@pytest.mark.parametrize("unit", ["evil", "evil.more", "*"])
async def test_what_is_written_as_of_another_queue_keeps_no_message_out(broker: Broker, unit: str) -> None:
    cluster = await dial_cluster(broker.url, CLUSTER, "u1", announce=False)
    journals, link = cluster.store.journals, cluster.link
    spec = await journals.append("a", "spec", "q", b"spec", expect=0)
    for queue in ("other", "*", ">"):
        await link.request(f"{CLUSTER}.job.a.run.{queue}.{unit}", b"x")
    lease = await journals.append("a", "run", "q", b"lease", expect=spec)
    await link.request(f"{CLUSTER}.job.a.run.q.{unit}", b"x")
    with pytest.raises(Conflict):
        await journals.append("a", "run", "q", b"late", expect=lease)
    with pytest.raises(Conflict):
        await journals.append("a", "spec", "other", b"again", expect=0)
    await cluster.close()


async def test_what_open_batches_hold_is_bounded(broker: Broker) -> None:
    """The server keeps it on its disk beside the streams, for as long as something comes now and then."""
    link = Link(broker.url, "test")
    await link.open()

    async def send(batch: str, number: int) -> bytes:
        headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
        to, answer = link.expect()
        await link.publish(f"{CLUSTER}.job.a.spec.q.u1", b"x", headers=headers, reply=to)
        return (await link.answer(answer)).data

    for number in range(1, BATCH_MESSAGES_MAX + 1):
        assert await send("whole", number) == b""
    assert b"too large" in await send("whole", BATCH_MESSAGES_MAX + 1)
    for number in range(BATCHES_OPEN_MAX):
        assert await send(f"open-{number}", 1) == b""
    assert b"too many inflight" in await send("one-more", 1)
    await link.close()


async def test_a_journal_expects_what_the_broker_counts(broker: Broker) -> None:
    """Also behind subjects that no reader makes anything of."""
    cluster = await dial_cluster(broker.url, CLUSTER, "u1", announce=False)
    journals, link = cluster.store.journals, cluster.link
    journal, spec = Journal("a"), await command_spec(cluster.store, "a", "hello")
    writer = Writer(cluster.store, journal, spec.queue)
    await writer.write(lambda: () if journal.tail else (spec,), give_up_s=LONG_S)
    for queue in ("other", spec.queue, "*"):
        for unit in ("", ".u", ".u.v", ".*"):
            stored = await link.request(f"{CLUSTER}.job.a.cancel.{queue}{unit}", b"x")
            await writer.look(give_up_s=LONG_S)
            assert journal.tail == stored["seq"]
            await journals.append("a", "cancel", spec.queue, b"x", expect=journal.expect)
    await writer.look(give_up_s=LONG_S)
    assert journal.state.corrupt is None
    assert len(journal.ignored) == 24
    await cluster.close()


async def test_a_read_is_whole_whatever_else_comes_on_the_connection(broker: Broker) -> None:
    cluster = await dial_cluster(broker.url, CLUSTER, "u1", announce=False)
    journals, link = cluster.store.journals, cluster.link
    written = [0]
    for number in range(300):
        kind: MessageKind = "run" if number else "spec"
        written.append(await journals.append("a", kind, "q", b"x" * 300, expect=written[-1]))

    async def echo(subject: str, data: bytes) -> bytes:
        return data

    async def chatter() -> None:
        while True:
            await link.call("chatter")

    stop = await link.serve("chatter", echo, lambda subject, reply: True)
    chatting = [asyncio.create_task(chatter()) for _ in range(4)]
    for _ in range(READS):
        assert [entry.seq for entry in await journals.read("a")] == written[1:]
    for task in chatting:
        task.cancel()
    await asyncio.gather(*chatting, return_exceptions=True)
    await stop()
    await cluster.close()


async def test_a_connection_whose_closing_is_called_off_leaves_no_socket_and_no_task(broker: Broker) -> None:
    tasks, files = asyncio.all_tasks(), os.listdir("/proc/self/fd")
    for steps in range(1, STEPS):
        link = Link(broker.url, "test")
        await link.open()
        closing = asyncio.create_task(link.close())
        for _ in range(steps):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
    await asyncio.sleep(0)  # in which a transport that is closing lets go of its socket
    assert asyncio.all_tasks() == tasks
    assert os.listdir("/proc/self/fd") == files


async def test_a_connection_that_came_to_nothing_is_let_go_before_the_next_is_made(broker: Broker) -> None:
    """As to a broker that stands still: the kernel connects, and nobody speaks."""
    seen: set[asyncio.Task[None]] = set()
    async with Proxy(broker.url).serve() as proxy, asyncio.timeout(LONG_S):
        link = Link(proxy.url, "test")
        await link.open()
        proxy.hole()
        proxy.cut()
        while len(seen) < TRIES:
            await asyncio.sleep(0.02)
            seen |= proxy.connections
        assert len(proxy.connections) <= 2  # the last, and the one before it may be on its way out
        await link.close()


async def test_a_first_word_that_is_never_answered_is_said_again_and_keeps_nobody_waiting(
    broker: Broker,
) -> None:
    """As happens to who comes while the bucket is being made."""
    layout = Layout("unmade")
    link = Link(broker.url, "listener")
    await link.open()
    words: asyncio.Queue[Incoming] = asyncio.Queue()
    leave = await link.subscribe(layout.member("*", "*"), words.put_nowait)
    async with asyncio.timeout(LONG_S):
        cluster = await dial_cluster(broker.url, "unmade", "u1", gone_s=10 * LONG_S)
        for _ in range(2):
            assert layout.member_of((await words.get()).subject)[0] == "u1"
    await leave()
    await cluster.close()
    await link.close()


async def test_a_follower_of_many_quick_messages_waits_for_none_that_was_only_not_yet_stored(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells when a message is stored: who looked too early looks again, and not by the clock alone."""
    monkeypatch.setattr("mvmci.stores.nats.link.LOOK_EVERY_S", 10 * LONG_S)
    store = await open_nats(broker.url, CLUSTER, "u1")
    seen: asyncio.Queue[int] = asyncio.Queue()

    async def follow() -> None:
        async for found in store.logs.follow("a"):
            seen.put_nowait(found.number)

    following = asyncio.create_task(follow())
    async with asyncio.timeout(LONG_S):
        for number in range(0, 2 * ROUNDS, 2):
            await store.logs.append("a", "q", [chunk(number), chunk(number + 1)])
            assert [await seen.get(), await seen.get()] == [number, number + 1]
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await store.close()


async def test_closing_leaves_no_task_behind(broker: Broker) -> None:
    store = await open_nats(broker.url, CLUSTER, "u1")
    await store.hints.pull("q", wait_s=0.05)
    await store.journals.append("a", "spec", "q", b"x", expect=0)
    await broker.kill()
    async with asyncio.timeout(LONG_S):
        await store.close()
        await store.close()
    await asyncio.sleep(0)
    assert not tasks_of_ours()


async def test_joining_that_is_called_off_anywhere_leaves_nothing_behind(broker: Broker) -> None:
    called_off = 0
    for number in itertools.count():
        joining = asyncio.create_task(open_nats(broker.url, CLUSTER, "u1"))
        joined, _ = await asyncio.wait([joining], timeout=number * STEP_S)
        if joined:
            await joining.result().close()
            break
        called_off += 1
        joining.cancel()
        async with asyncio.timeout(LONG_S):
            await asyncio.gather(joining, return_exceptions=True)
        assert not tasks_of_ours()
    assert called_off > CALLED_OFF_MIN


def tasks_of_ours() -> list[asyncio.Task[object]]:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return [task for task in others if "nats" in repr(task.get_coro()).lower() or "mvmci" in repr(task)]
