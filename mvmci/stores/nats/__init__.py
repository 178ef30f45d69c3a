"""The store of a cluster: JetStream, on a broker that syncs every write.

A journal is the messages under `<cluster>.job.<id>.>`, in the order of their stream sequences, each
written under a compare-and-set on that whole subtree. Logs and blobs are read in the same way, by
paged direct gets; new log lines are heard as plain messages as well, but only what the stream gives is
believed. Presence is heard, or read, as it comes: it promises nothing.

    layout     every name and setting                  hints       pulls, timers
    link       the connection; imports nats            blobs       the object store
    append     compare-and-set, group commit           presence    who is there
    config     what the cluster is and allows      clock       what time it is

Promised: an append that returned is on disk (if the broker syncs: `mvmci.roles.broker` sees to it), a read
sees every append that returned before it (one replica), and nothing waits without an end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from mvmci.cluster.identity import Login
from mvmci.errors import StoreFull, Usage
from mvmci.jobs.journal import Entry, MessageKind
from mvmci.store import GONE_S, HINT_LAPSE_S, MESSAGE_BYTES_MAX, Chunk, Store
from mvmci.stores.nats.append import MAKE_ROOM, Append, GroupCommit
from mvmci.stores.nats.blobs import Blobs
from mvmci.stores.nats.clock import Clock
from mvmci.stores.nats.config import Config
from mvmci.stores.nats.hints import Hints, make_consumer
from mvmci.stores.nats.layout import LOG_AGE_MS, STORE_BYTES, Layout
from mvmci.stores.nats.link import EVERYTHING, Incoming, Link, Refused, Stored
from mvmci.stores.nats.presence import Presence

LOOK_AGAIN_S = (0.002, 0.01, 0.05, 0.2)  # after a word of a message: it may not be stored yet
LOOK_EVERY_S = 2.0  # a word may be lost
NOT_FOUND = 10059
NOT_MADE = 10049
TRIES_TO_MAKE = 4
PAGES_MAX = 1_000
WINDOW = 1_000  # messages that are read at a time, from the newest back; then twice as many
WINDOW_MAX = 16_000
CHUNKS_IN_FLIGHT = 64
SPECS_PERCENT = 90  # of the bytes of JOBS: beyond, no new job is taken
ROOM_S = 1.0  # how long an answer about that holds
ROOM_SHARE = 8  # and for the how manieth part of the room: others may submit as fast

_chunks = msgspec.json.Decoder(Chunk)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Cluster:
    """A cluster on its broker: its store, and what only a cluster has."""

    layout: Layout
    link: Link
    store: Store
    hints: Hints  # those of the store, of which the reconciler asks more
    blobs: Blobs  # the same for retention
    config: Config
    clock: Clock

    async def close(self) -> None:
        """Leave. What was written stays."""
        await self.store.close()


async def ensure(
    login: Login | str,
    cluster: str,
    *,
    store_bytes: int = STORE_BYTES,
    log_age_ms: int = LOG_AGE_MS,
    queues: Sequence[str] = (),
) -> None:
    """Make or bring up to date what `cluster` has on its broker, within `store_bytes`. Again is free.

    Raises StoreUnavailable, Usage when the broker will not have it so.
    """
    link = Link(login, f"{cluster}/ensure")
    await link.open()
    try:
        await maintain(link, Layout(cluster), store_bytes, log_age_ms, queues)
    finally:
        await link.close()


async def maintain(
    link: Link, layout: Layout, store_bytes: int, log_age_ms: int, queues: Iterable[str]
) -> None:
    """Make or bring up to date every stream, and the consumers of `queues`. Raises as `ensure`."""
    for stream in layout.streams(store_bytes, log_age_ms):
        try:
            await _make(link, stream)
        except Refused as refused:
            raise Usage(
                f"the broker at {link.url} refuses stream {stream['name']}: {refused.message}",
                hint="nats-server 2.12 or later with JetStream is needed, with room for the streams",
            ) from refused
    for queue in queues:
        await make_consumers(link, layout, queue)


async def make_consumers(link: Link, layout: Layout, queue: str, lapse_s: float = HINT_LAPSE_S) -> None:
    """Let workers pull from `queue`. Raises StoreUnavailable."""
    for stream, settings in layout.consumers(queue, lapse_s):
        await make_consumer(link, stream, settings)


async def _make(link: Link, stream: dict[str, object]) -> None:
    """Update first: to create one that is there reserves its bytes twice, and may be refused for that."""
    try:
        await link.api(f"STREAM.UPDATE.{stream['name']}", **stream)
    except Refused as refused:
        if refused.code != NOT_FOUND:
            raise
        await _create(link, stream)


async def _create(link: Link, stream: dict[str, object]) -> None:
    """Again, if it fails: who deletes an account's last stream is answered before the server has removed
    the account's folder, and that may take the one of the next stream with it (seen with 2.15.1).
    """
    for left in reversed(range(TRIES_TO_MAKE)):
        try:
            await link.api(f"STREAM.CREATE.{stream['name']}", **stream)
            return
        except Refused as refused:
            if refused.code != NOT_MADE or not left:
                raise


async def remove(login: Login | str, cluster: str) -> None:
    """Delete every stream of `cluster` with all that is in them. Raises StoreUnavailable."""
    link = Link(login, f"{cluster}/remove")
    await link.open()
    try:
        for stream in Layout(cluster).streams(STORE_BYTES):
            try:
                await link.api(f"STREAM.DELETE.{stream['name']}")
            except Refused:
                pass  # it is not there
    finally:
        await link.close()


async def open_cluster(
    login: Login | str,
    cluster: str,
    unit: str,
    *,
    maintains: bool = False,
    announce: bool = True,
    listens: bool = False,
    clock: Callable[[], float] = time.monotonic,
    hint_lapse_s: float = HINT_LAPSE_S,
    gone_s: float = GONE_S,
) -> Cluster:
    """`cluster` as a new incarnation of `unit` sees it. `clock` counts others' silence, in s.

    Who `maintains` may make what is missing there; who does not `announce` is no member, and only looks;
    who `listens` hears every unit, and the others ask when they have to know.
    Raises StoreUnavailable, TicketRefused.
    """
    layout = Layout(cluster)
    link = Link(login, f"{cluster}/{unit}")
    await link.open()
    hints = Hints(link, layout, hint_lapse_s, maintains=maintains)
    presence = Presence(
        link,
        layout,
        unit,
        clock=clock,
        gone_s=gone_s,
        maintains=maintains,
        announce=announce,
        listens=listens,
    )
    commit = GroupCommit(link, presence.in_hand)
    time_of_day = Clock(link, layout)

    async def close() -> None:
        await presence.close()
        await time_of_day.close()
        await hints.close()
        await commit.close()
        await link.close()

    try:
        await presence.open()
        if announce:  # who only looks writes nothing that others would read as a time
            await time_of_day.open()
    except BaseException:
        await close()
        raise
    journals, logs, blobs = Journals(link, layout, commit), Logs(link, layout), Blobs(link, layout)
    store = Store(journals, hints, logs, blobs, presence, close)
    return Cluster(layout, link, store, hints, blobs, Config(link, layout), time_of_day)


class Journals:
    """The port `mvmci.store.Journals`."""

    def __init__(self, link: Link, layout: Layout, commit: GroupCommit) -> None:
        self._link = link
        self._layout = layout
        self._commit = commit
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")
        self._granted = 0  # bytes that may be submitted before the next look
        self._in_flight = 0  # bytes that are being submitted
        self._landed = asyncio.Event()

    async def read(self, job: str, after: int = 0) -> list[Entry]:
        messages = self._link.read(self._layout.jobs, self._layout.journal(job), after)
        return [Entry(seq=message.seq, data=message.data) async for message in messages]

    async def first(self, job: str, seq: int) -> Entry | None:
        stored = await self._link.at(self._layout.jobs, seq)
        if stored is None or not self._layout.is_spec(stored.subject):
            return None
        there = self._layout.job_of_message(stored.subject) == job
        return Entry(seq=stored.seq, data=stored.data) if there else None

    async def append(
        self,
        job: str,
        kind: MessageKind,
        queue: str,
        data: bytes,
        *,
        message_id: str,
        expect: int,
        may_delay: bool = False,
    ) -> int:
        del message_id  # it stands in the message
        assert len(data) <= MESSAGE_BYTES_MAX
        subject, subtree = self._layout.message(job, kind, queue), self._layout.journal(job)
        append = Append(job, subject, subtree, data, expect, may_delay)
        if kind != "spec":
            return await self._commit.append(append)
        await self._take_room(len(data))
        try:
            return await self._commit.append(append)
        finally:
            self._in_flight -= len(data)
            self._landed.set()

    async def _take_room(self, size: int) -> None:
        """Raises StoreFull where the last part is left, which belongs to jobs that were accepted.

        What is on its way already is counted as well; where that decides, it is waited for.
        """
        async with self._looking:
            while self._granted < size or time.monotonic() - self._looked_at > ROOM_S:
                self._landed.clear()
                answer = await self._link.api(f"STREAM.INFO.{self._layout.jobs}")
                used, most = answer["state"]["bytes"] + self._in_flight, answer["config"]["max_bytes"]
                left = most * SPECS_PERCENT // 100 - used
                if left >= size:
                    self._granted = max(left // ROOM_SHARE, size)
                    self._looked_at = time.monotonic()
                    break
                if not self._in_flight:
                    raise StoreFull(f"the journals take {SPECS_PERCENT} % of their room", hint=MAKE_ROOM)
                await self._landed.wait()
            self._granted -= size
            self._in_flight += size

    async def follow(self, job: str, after: int = 0) -> AsyncGenerator[Entry, None]:
        following = _follow(self._link, self._layout.jobs, self._layout.journal(job), after)
        async with aclosing(following) as messages:
            async for message in messages:
                yield Entry(seq=message.seq, data=message.data)

    async def all(self) -> AsyncIterator[tuple[str, Entry]]:
        async for message in self._link.read(self._layout.jobs, EVERYTHING):
            job = self._layout.job_of_message(message.subject)
            yield job, Entry(seq=message.seq, data=message.data)

    async def newest(self) -> AsyncGenerator[tuple[str, list[Entry]], None]:
        """Backwards, a window of the stream at a time: a job's spec stands before all else of it."""
        state = (await self._link.api(f"STREAM.INFO.{self._layout.jobs}"))["state"]
        first, last, size = state["first_seq"], state["last_seq"], WINDOW
        later: dict[str, list[Entry]] = {}  # what stands behind specs that were not seen yet
        while last >= first:
            start = max(first, last - size + 1)
            window, specs = await self._window(start, last)
            for job in reversed(specs):
                yield job, window.pop(job) + later.pop(job, [])
            for job, entries in window.items():
                later[job] = entries + later.get(job, [])
            last, size = start - 1, min(size * 2, WINDOW_MAX)

    async def _window(self, start: int, last: int) -> tuple[dict[str, list[Entry]], list[str]]:
        """The messages from `start` to `last` by their jobs, and the jobs that begin there, in order."""
        window: dict[str, list[Entry]] = {}
        specs: list[str] = []
        async for message in self._link.read(self._layout.jobs, EVERYTHING, start - 1):
            if message.seq > last:
                break
            job = self._layout.job_of_message(message.subject)
            window.setdefault(job, []).append(Entry(seq=message.seq, data=message.data))
            if self._layout.is_spec(message.subject):
                specs.append(job)
        return window, specs

    async def jobs(self) -> AsyncIterator[str]:
        found: set[str] = set()
        offset = 0
        for _ in range(PAGES_MAX):
            answer = await self._link.api(
                f"STREAM.INFO.{self._layout.jobs}", subjects_filter=self._layout.journals(), offset=offset
            )
            subjects = answer["state"].get("subjects") or {}
            for subject in subjects:
                job = self._layout.job_of_message(subject)
                if job not in found:
                    found.add(job)
                    yield job
            offset += len(subjects)
            if not subjects or offset >= answer.get("total", 0):
                return


class Logs:
    """The port `mvmci.store.Logs`."""

    def __init__(self, link: Link, layout: Layout) -> None:
        self._link = link
        self._layout = layout

    async def append(self, job: str, queue: str, chunks: Sequence[Chunk]) -> None:
        subject = self._layout.log(job, queue)
        for start in range(0, len(chunks), CHUNKS_IN_FLIGHT):
            group = chunks[start : start + CHUNKS_IN_FLIGHT]
            await self._link.request_all(subject, [_encode(chunk) for chunk in group])

    async def read(self, job: str) -> list[Chunk]:
        stored = self._link.read(self._layout.logs, self._layout.log_of(job))
        return [_chunks.decode(message.data) async for message in stored]

    async def follow(self, job: str) -> AsyncGenerator[Chunk, None]:
        following = _follow(self._link, self._layout.logs, self._layout.log_of(job), 0)
        async with aclosing(following) as messages:
            async for message in messages:
                yield _chunks.decode(message.data)


async def _follow(link: Link, stream: str, subject: str, last: int) -> AsyncGenerator[Stored, None]:
    """What `stream` has on `subject` after `last`, and what comes.

    A word that a message was sent only says when to look. It may not be stored yet, or never be, so there
    are more looks while more messages were heard of than found.
    """
    word = asyncio.Event()
    heard, found = 1, 0  # as if somebody had said so: what was sent before we listened may come late, too
    first = True

    def hear(_: Incoming) -> None:
        nonlocal heard
        heard += 1
        word.set()

    unsubscribe = await link.subscribe(subject, hear)
    try:
        pauses = iter(LOOK_AGAIN_S)
        while True:
            word.clear()
            async for message in link.read(stream, subject, last):
                last = message.seq
                found = min(found + 1, heard)
                yield message
            if first:
                found, first = 0, False  # that was there already
            if found == heard:
                word.clear()
            pause_s = next(pauses, None) if found < heard else None
            try:
                async with asyncio.timeout(LOOK_EVERY_S if pause_s is None else pause_s):
                    await word.wait()
                pauses = iter(LOOK_AGAIN_S)
            except TimeoutError:
                found = heard if pause_s is None else found
    finally:
        await unsubscribe()
