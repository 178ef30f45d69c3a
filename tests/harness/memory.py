"""A store in this process alone: what a test needs that needs no disk, and the model of what others do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvmci.errors import Conflict, NotFound
from mvmci.jobs.journal import Entry, Lease, MessageKind
from mvmci.store import (
    HINT_LAPSE_S,
    MESSAGE_BYTES_MAX,
    About,
    Chunk,
    Delivery,
    Member,
    Source,
    Store,
    digest_of,
)


class Memory:
    """What all units share: the place itself. `store()` gives one unit its way in."""

    def __init__(self, *, hint_lapse_s: float = HINT_LAPSE_S, clock: Callable[[], float] = time.time) -> None:
        self.hints = _Hints(hint_lapse_s, clock)
        self.journals = _Journals(self.hints)
        self.logs = _Logs()
        self.blobs = _Blobs()
        self.members: dict[str, Member] = {}

    def store(self, unit: str) -> Store:
        """The store as a new incarnation of `unit` sees it."""
        presence = _Presence(self.members, unit)
        return Store(self.journals, self.hints, self.logs, self.blobs, presence, presence.leave)


def open_memory(unit: str) -> Store:
    """A store that nobody shares."""
    return Memory().store(unit)


class _Journals:
    def __init__(self, hints: _Hints) -> None:
        self._hints = hints
        self._messages: dict[str, list[Entry]] = defaultdict(list)
        self._queues: dict[str, list[str]] = defaultdict(list)
        self._appended = asyncio.Condition()

    async def read(self, job: str, after: int = 0) -> list[Entry]:
        await asyncio.sleep(0)  # others have their turn, as while a store answers
        return self._messages[job][after:] if job in self._messages else []

    async def first(self, job: str, seq: int) -> Entry | None:
        return next(iter(await self.read(job)), None) if seq == 1 else None

    async def append(
        self, job: str, kind: MessageKind, queue: str, data: bytes, *, expect: int, may_delay: bool = False
    ) -> int:
        del may_delay  # nothing here can land together
        assert len(data) <= MESSAGE_BYTES_MAX
        await asyncio.sleep(0)
        there, queues = self._messages.get(job, ()), self._queues[job]
        last = len(there)
        if expect and kind != "spec":
            last = max((seq for seq, of in enumerate(queues, 1) if of == queue), default=0)
        if last != expect:
            raise Conflict(f"the last message is not {expect}")
        entry = Entry(seq=len(there) + 1, data=data)
        self._messages[job].append(entry)
        queues.append(queue)
        if kind == "spec":
            await self._hints.spec(queue, job, entry)
        async with self._appended:
            self._appended.notify_all()
        return entry.seq

    async def follow(self, job: str, after: int = 0) -> AsyncGenerator[Entry, None]:
        while True:
            entries = await self.read(job, after)
            for entry in entries:
                yield entry
            after += len(entries)
            if not entries:
                await _wait_for(self._appended)

    async def jobs(self) -> AsyncIterator[str]:
        for job in list(self._messages):
            yield job

    async def newest(self) -> AsyncGenerator[tuple[str, list[Entry]], None]:
        for job in reversed(list(self._messages)):
            yield job, await self.read(job)

    async def all(self) -> AsyncIterator[tuple[str, Entry]]:
        async for job in self.jobs():
            for entry in await self.read(job):
                yield job, entry


class _Logs:
    def __init__(self) -> None:
        self._chunks: dict[str, list[Chunk]] = defaultdict(list)
        self._appended = asyncio.Condition()

    async def append(self, job: str, queue: str, chunks: Sequence[Chunk]) -> None:
        del queue
        await asyncio.sleep(0)
        self._chunks[job] += chunks
        async with self._appended:
            self._appended.notify_all()

    async def read(self, job: str) -> list[Chunk]:
        await asyncio.sleep(0)
        return list(self._chunks[job])

    async def follow(self, job: str) -> AsyncGenerator[Chunk, None]:
        seen = 0
        while True:
            chunks = (await self.read(job))[seen:]
            for chunk in chunks:
                yield chunk
            seen += len(chunks)
            if not chunks:
                await _wait_for(self._appended)


class _Blobs:
    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    async def put(self, data: bytes) -> str:
        digest = digest_of(data)
        self._kept[digest] = data
        return digest

    async def put_file(self, path: Path) -> str:
        return await self.put(await asyncio.to_thread(path.read_bytes))

    async def put_all(self, sources: Mapping[str, Source]) -> set[str]:
        contents: dict[str, bytes] = {}
        for digest, source in sources.items():
            with source.open() as file:
                contents[digest] = await asyncio.to_thread(file.read)
        changed = {digest for digest, data in contents.items() if digest_of(data) != digest}
        if not changed:
            self._kept |= contents
        return changed

    async def has(self, digest: str) -> bool:
        return digest in self._kept

    async def missing(self, digests: Collection[str]) -> set[str]:
        return set(digests) - self._kept.keys()

    async def get(self, digest: str) -> bytes:
        if digest not in self._kept:
            raise NotFound(f"there is no blob {digest[:80]}")
        return self._kept[digest]

    async def fetch(self, digest: str, to: Path) -> None:
        data = await self.get(digest)
        with open(to, "xb") as file:  # noqa: ASYNC230 (a local file)
            file.write(data)


@dataclass
class _Hint:
    job: str
    first: Entry | None
    due: float  # by the store's clock
    deliveries: int = 0
    lapses: float | None = None  # by the loop's clock, while it is out


class _Delivery:
    def __init__(self, hints: _Hints, queue: str, hint: _Hint) -> None:
        self.job = hint.job
        self.spec_entry = hint.first if hint.deliveries == 1 else None
        self._hints = hints
        self._queue = queue
        self._hint = hint

    async def ack(self) -> None:
        self._hints.remove(self._queue, self._hint)

    async def keep(self) -> None:
        self._hints.keep(self._hint)

    async def redeliver(self, wait_s: float) -> None:
        await self._hints.redeliver(self._hint, wait_s)


class _Hints:
    def __init__(self, lapse_s: float, clock: Callable[[], float]) -> None:
        self._lapse_s = lapse_s
        self._clock = clock
        self._queues: dict[str, dict[tuple[str, str], _Hint]] = {}
        self._sequence = itertools.count(1)
        self._changed = asyncio.Condition()

    async def spec(self, queue: str, job: str, first: Entry) -> None:
        await self._put(queue, "spec", _Hint(job, first, 0.0))

    async def ready(self, queue: str, job: str) -> int:
        await self._put(queue, "ready", _Hint(job, None, 0.0))
        return next(self._sequence)

    async def timer(self, queue: str, job: str, at_ms: int) -> None:
        await self._put(queue, "timer", _Hint(job, None, at_ms / 1000))

    async def _put(self, queue: str, kind: str, hint: _Hint) -> None:
        self._queues.setdefault(queue, {})[kind, hint.job] = hint
        async with self._changed:
            self._changed.notify_all()

    def remove(self, queue: str, hint: _Hint) -> None:
        hints = self._queues.get(queue, {})
        for key in [key for key, held in hints.items() if held is hint]:
            del hints[key]

    def keep(self, hint: _Hint) -> None:
        hint.lapses = asyncio.get_running_loop().time() + self._lapse_s

    async def redeliver(self, hint: _Hint, wait_s: float) -> None:
        hint.lapses = asyncio.get_running_loop().time() + wait_s
        async with self._changed:
            self._changed.notify_all()

    async def pull(self, queue: str, *, wait_s: float) -> Delivery | None:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            pause = until - loop.time()
            for hint in self._queues.get(queue, {}).values():
                wait = max(hint.due - self._clock(), (hint.lapses or 0.0) - loop.time())
                if wait <= 0:
                    hint.deliveries += 1
                    self.keep(hint)
                    return _Delivery(self, queue, hint)
                pause = min(pause, wait)
            if until <= loop.time():
                return None
            await _wait_for(self._changed, max(pause, 0.001))


class _Presence:
    """Who holds a job says so, and everybody sees it."""

    def __init__(self, members: dict[str, Member], unit: str) -> None:
        self.unit = unit
        self.incarnation = secrets.token_hex(8)
        self._members = members
        self._holds: dict[str, int] = {}
        self._keeps: dict[str, None] = {}  # in the order of their coming
        self._waits: dict[str, str] = {}
        self._about = About()
        self._say()

    async def add_job(self, job: str, epoch: int) -> None:
        self._holds[job] = epoch
        self._say()

    async def remove_job(self, job: str) -> None:
        self._holds.pop(job, None)
        self._waits.pop(job, None)
        self._say()

    async def add_hint(self, job: str, waits: str = "") -> None:
        self._keeps[job] = None
        await self.explain(job, waits)

    async def remove_hint(self, job: str) -> None:
        self._keeps.pop(job, None)
        await self.explain(job, "")

    async def explain(self, job: str, waits: str) -> None:
        if waits:
            self._waits[job] = waits
        else:
            self._waits.pop(job, None)
        self._say()

    async def describe(self, about: About) -> None:
        self._about = about
        self._say()

    async def live(self, job: str, lease: Lease) -> bool:
        member = self._members.get(lease.incarnation)
        return member is not None and f"{job}@{lease.epoch}" in member.holds

    async def find(self, unit: str, incarnation: str) -> Member | None:
        return self._members.get(incarnation)

    async def members(self) -> list[Member]:
        return list(self._members.values())

    async def leave(self) -> None:
        self._members.pop(self.incarnation, None)

    def _say(self) -> None:
        self._members[self.incarnation] = Member(
            unit=self.unit,
            incarnation=self.incarnation,
            holds=tuple(f"{job}@{epoch}" for job, epoch in self._holds.items()),
            keeps=tuple(self._keeps),
            waits=dict(self._waits),
            about=self._about,
        )


async def _wait_for(condition: asyncio.Condition, wait_s: float | None = None) -> None:
    """Wait until somebody notifies `condition`, at most `wait_s`."""
    async with condition:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):  # `wait_for` could lose a cancellation
                await condition.wait()
