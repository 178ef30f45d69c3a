"""The journals in JetStream: one stream, whose messages are each job's in the order of their sequences.

A journal is the messages under `<cluster>.job.<id>.>`. The first is written under a compare-and-set on that
whole subtree, each later one on that of its queue; its subject says which unit wrote it. What the control
plane asks of all journals at once stands here as well: tail, ends, purge.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from datetime import datetime
from typing import NamedTuple

from mvmci.cluster.witness import RECOVER, Removal
from mvmci.errors import StoreFull, StoreLost
from mvmci.jobs.job import is_id
from mvmci.jobs.journal import Entry, MessageKind, Origin
from mvmci.store import MESSAGE_BYTES_MAX
from mvmci.stores.nats.append import MAKE_ROOM, Append, GroupCommit
from mvmci.stores.nats.config import Config
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import EVERYTHING, Link, Stored
from mvmci.stores.nats.rows import nanoseconds

PAGES_MAX = 1_000
WINDOW = 1_000  # messages that are read at a time, from the newest back; then twice as many
WINDOW_MAX = 16_000
SPECS_PERCENT = 90  # of the bytes of JOBS: beyond, no new job is taken
ROOM_S = 1.0  # how long an answer about that holds
ROOM_SHARE = 8  # and for which part of the room: others may submit as fast


class Tailed(NamedTuple):
    """A message of a journal, and what its subject says of it: enough to know whether to read it."""

    job: str
    origin: Origin
    entry: Entry


class NatsJournals:
    """The port `mvmci.store.Journals`."""

    def __init__(self, link: Link, layout: Layout, commit: GroupCommit, config: Config, unit: str) -> None:
        self._link = link
        self._layout = layout
        self._config = config
        self._unit = unit
        self._commit = commit
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")
        self._granted = 0  # bytes that may be submitted before the next look
        self._in_flight = 0  # bytes that are being submitted
        self._landed = asyncio.Event()

    async def read(self, job: str, after: int = 0) -> list[Entry]:
        messages = self._link.read(self._layout.jobs, self._layout.journal(job), after)
        return [self._entry(message) async for message in messages]

    async def first(self, job: str, seq: int) -> Entry | None:
        stored = await self._link.at(self._layout.jobs, seq)
        if stored is None or self._layout.job_of_message(stored.subject) != job:
            return None
        begins = self._layout.is_spec(stored.subject) and await self._begins(stored)
        return self._entry(stored) if begins else None

    async def _begins(self, message: Stored) -> bool:
        """Whether a job begins with that message. The broker is asked of those that were not submitted."""
        if self._layout.begins(message.subject, message.headers):
            return True
        subtree = self._layout.journal(self._layout.job_of_message(message.subject))
        first = await self._link.first(self._layout.jobs, subtree)
        return first is not None and first.seq == message.seq

    async def append(
        self,
        job: str,
        kind: MessageKind,
        queue: str,
        data: bytes,
        *,
        expect: int,
        may_delay: bool = False,
    ) -> int:
        assert len(data) <= MESSAGE_BYTES_MAX
        subject = self._layout.message(job, kind, queue, self._unit)
        if kind == "spec" or not expect:
            subtree = self._layout.journal(job)
        else:
            subtree = self._layout.journal_in(job, queue)
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
        """Raises StoreFull where the last part is left, which belongs to jobs that were accepted, and
        StoreLost where records are missing.

        What is on its way already is counted as well; where that decides, it is waited for.
        """
        async with self._looking:
            while self._granted < size or time.monotonic() - self._looked_at > ROOM_S:
                self._landed.clear()
                await self._check_loss()
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

    async def _check_loss(self) -> None:
        """Raises StoreLost: an id that looks free may be that of a job which is gone."""
        loss = await self._config.loss()
        if loss is not None:
            raise StoreLost(f"{self._layout.cluster}: {loss.sentence}", hint=RECOVER)

    async def follow(self, job: str, after: int = 0) -> AsyncGenerator[Entry, None]:
        subject = self._layout.journal(job)
        following = self._link.follow(self._layout.jobs, subject, self._layout.stored("job", job), after)
        async with aclosing(following) as messages:
            async for message in messages:
                yield self._entry(message)

    async def all(self) -> AsyncIterator[tuple[str, Entry]]:
        async for message in self._link.read(self._layout.jobs, EVERYTHING):
            job = self._layout.job_of_message(message.subject)
            if is_id(job):
                yield job, self._entry(message)

    async def tail(self, after: int) -> AsyncGenerator[Tailed, None]:
        """The messages of all jobs with a sequence over `after`, as they stand in the stream.

        Raises StoreUnavailable.
        """
        async for message in self._link.read(self._layout.jobs, EVERYTHING, after):
            entry = self._entry(message)
            assert entry.origin is not None
            yield Tailed(self._layout.job_of_message(message.subject), entry.origin, entry)

    async def ends(self) -> AsyncGenerator[tuple[str, Entry, int], None]:
        """What was written as the end of a job, in order, and when it was stored, in ms since 1970.

        The journal says whether it is the end. Raises StoreUnavailable.
        """
        async for message in self._link.read(self._layout.jobs, self._layout.ends()):
            job, at = self._layout.job_of_message(message.subject), message.headers["Nats-Time-Stamp"]
            if is_id(job):
                yield job, self._entry(message), int(datetime.fromisoformat(at).timestamp() * 1000)

    async def purge(self, removal: Removal) -> None:
        """Remove messages of a job. Again is free. Raises StoreUnavailable."""
        subtree = self._layout.journal(removal.job)
        await self._link.api(f"STREAM.PURGE.{self._layout.jobs}", filter=subtree, seq=removal.before)

    async def gaps(self, last: int) -> list[tuple[int, int]]:
        """The ranges of sequences up to `last` that the stream has not, both ends included.

        Raises StoreUnavailable.
        """
        told = await self._link.api(f"STREAM.INFO.{self._layout.jobs}", deleted_details=True)
        state = told["state"]
        first, end = state["first_seq"], state["last_seq"]
        found = [(1, first - 1)] if first > 1 else []
        for seq in state.get("deleted") or ():
            if seq < 1:  # what an empty stream tells, where no message ever was
                continue
            if found and found[-1][1] == seq - 1:
                found[-1] = (found[-1][0], seq)
            else:
                found.append((seq, seq))
        return found + ([(end + 1, last)] if last > end else [])

    async def newest(self) -> AsyncGenerator[tuple[str, list[Entry]], None]:
        """Backwards, a window of the stream at a time: a job's spec stands before all else of it.

        What has no spec at all comes last; a tombstone does not.
        """
        state = (await self._link.api(f"STREAM.INFO.{self._layout.jobs}"))["state"]
        first, last, size = state["first_seq"], state["last_seq"], WINDOW
        later: dict[str, list[Entry]] = {}  # what stands behind specs that were not seen yet
        while last >= first:
            start = max(first, last - size + 1)
            window, specs = await self._window(start, last)
            for job in reversed(specs):
                if job in window:
                    yield job, window.pop(job) + later.pop(job, [])
            for job, entries in window.items():
                later[job] = entries + later.get(job, [])
            last, size = start - 1, min(size * 2, WINDOW_MAX)
        for job, entries in later.items():
            if entries[0].origin is not None and entries[0].origin.kind != "done":
                yield job, entries

    async def _window(self, start: int, last: int) -> tuple[dict[str, list[Entry]], list[str]]:
        """The messages from `start` to `last` by their jobs, and the jobs that begin there, in order."""
        window: dict[str, list[Entry]] = {}
        specs: list[str] = []
        async for message in self._link.read(self._layout.jobs, EVERYTHING, start - 1):
            if message.seq > last:
                break
            job = self._layout.job_of_message(message.subject)
            if not is_id(job):
                continue
            window.setdefault(job, []).append(self._entry(message))
            if self._layout.is_spec(message.subject) and await self._begins(message):
                specs.append(job)
        return window, specs

    def _entry(self, message: Stored) -> Entry:
        origin = self._layout.origin_of_message(message.subject)
        stored = nanoseconds(message.headers["Nats-Time-Stamp"])
        return Entry(seq=message.seq, data=message.data, origin=origin, stored=stored)

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
                if job not in found and is_id(job):
                    found.add(job)
                    yield job
            offset += len(subjects)
            if not subjects or offset >= answer.get("total", 0):
                return
