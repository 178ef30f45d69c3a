"""One run of one job: its lease, its view of the journal, and every write that it makes.

A holder writes by compare-and-set on what it has read. When a write is refused or its answer does not
come, it reads on and lets `journal.verdict` decide (PROTOCOL §2). It never writes after it was fenced,
and what follows a record leaves it only after that record is on disk:

    intent   is on disk before its effect begins
    result   rides with the next intent or the end, or is written after `RESULT_WAIT_S`
    output   is held back until everything recorded before it is on disk
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from itertools import chain, repeat

import msgspec

from mvmci.errors import Conflict, Fenced, NotFound, StoreUnavailable
from mvmci.journal import (
    AnyRecord,
    Done,
    Entry,
    Intent,
    Journal,
    Lease,
    Message,
    Progress,
    Result,
    Verdict,
    kind_of,
    verdict,
)
from mvmci.store import Chunk, Store

RESULT_WAIT_S = 0.005
RETRY_PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)  # the last is repeated
GIVE_UP_S = 60.0
LOOK_EVERY_S = 1.0
STALE_S = 3.0  # after so long without a word from the store, a holder looks before it acts


class Cancelled(Exception):
    """A cancel stands in the journal: the only end is `cancelled`."""


class Reread(Exception):
    """The lease was refused because something was recorded: forget the replay, read the job afresh."""


async def load(store: Store, job: str) -> Journal:
    """The journal of `job`. Raises NotFound."""
    journal = Journal(job)
    journal.absorb(await store.journals.read(job))
    if not journal.tail and journal.state.corrupt is None:
        raise NotFound(f"there is no job {job}", hint="`mvmci list` shows the jobs that there are")
    return journal


class Holder:
    """Writes the journal of one job for one run, and gives its output to the logs.

    Its lease rides with the first write.
    """

    def __init__(self, store: Store, journal: Journal, lease: Lease) -> None:
        assert journal.state.spec is not None
        self.journal = journal
        self.lease = lease
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.spec = journal.state.spec
        self._store = store
        self._unwritten: list[AnyRecord] = [lease]
        self._durable = 0  # records of this run that are on disk
        self._writing = asyncio.Lock()
        self._printing = asyncio.Lock()
        self._held_back: deque[tuple[int, Chunk]] = deque()
        self._chunks = 0
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._looking = asyncio.create_task(self._watch())
        self._answered_at = _now_s()

    @property
    def leased(self) -> bool:
        """Whether the lease is on disk."""
        return self._durable > 0

    def stamp(self, at: int) -> None:
        """The guest is about to run: that, and not when its code began to be fetched, is the lease's time."""
        assert not self.leased
        self.lease = self._unwritten[0] = msgspec.structs.replace(self.lease, at=at)

    def add(self, *records: AnyRecord, within_s: float = RESULT_WAIT_S) -> None:
        """Let `records` ride with the next write; it comes `within_s` at the latest."""
        self._unwritten += records
        loop = asyncio.get_running_loop()
        if self._timer is not None and self._timer.when() <= loop.time() + within_s:
            return
        self._stop_timer()
        self._timer = loop.call_later(within_s, self._flush)

    async def write(self, *records: AnyRecord) -> None:
        """Make everything that waits, and `records` after it, durable as one message.

        Raises Fenced, Cancelled (only `finish` may follow), Reread (only before the lease is on disk),
        and StoreUnavailable after `GIVE_UP_S` without an answer.
        """
        self._unwritten += records
        async with self._writing:
            if self._unwritten:
                await self._commit()
        await self._print_until(self._durable)

    async def finish(self, done: Done) -> None:
        """Write the end.

        An intent that is neither on disk nor answered is forgotten, because its effect never began;
        and so is another end, which a cancel kept from being written.
        """
        async with self._writing:
            waiting = self._unwritten
            answered = {record.index for record in waiting if isinstance(record, Result)}
            began = [
                record
                for record in waiting
                if not isinstance(record, Intent | Done)
                or (isinstance(record, Intent) and record.index in answered)
            ]
            self._unwritten = [*began, msgspec.structs.replace(done, chunks=self._chunks)]
            await self._commit()
        await self._print_until(None)

    async def failed(self) -> None:
        """Ends only by raising what a look or a write in the background met, as `write` would."""
        await asyncio.shield(self._failure)

    async def confirm(self) -> None:
        """Look at the journal if this process may have been suspended since it last heard of it."""
        if _now_s() - self._answered_at > STALE_S:
            await self._look()

    async def print(self, chunk: Chunk) -> None:
        """Publish `chunk` once everything recorded before it is on disk."""
        self._chunks = chunk.number + 1
        self._held_back.append((self._durable + len(self._unwritten), chunk))
        await self._print_until(self._durable)

    async def close(self) -> None:
        """Stop what runs in the background. What was not written is not written."""
        self._stop_timer()
        for task in (self._looking, self._flushing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if not self._failure.cancel() and not self._failure.cancelled():
            self._failure.exception()  # nobody is left who would await it

    async def _commit(self) -> None:
        self._stop_timer()
        waiting = len(self._unwritten)
        batch = _newest_progress(self._unwritten)
        if self.journal.state.cancel is not None and not _cancels(batch):
            raise Cancelled
        await self._append(batch)
        del self._unwritten[:waiting]
        self._durable += waiting
        self._answered_at = _now_s()
        if self.journal.state.cancel is not None and not isinstance(batch[-1], Done):
            raise Cancelled

    async def _append(self, batch: tuple[AnyRecord, ...]) -> None:
        """Write `batch`, or learn that it was written, or raise: the resolve loop."""
        message_id = secrets.token_hex(8)
        give_up = _now_s() + GIVE_UP_S
        for pause_s in chain(RETRY_PAUSES_S, repeat(RETRY_PAUSES_S[-1])):
            data, expect = self.journal.encode(batch, message_id), self.journal.tail
            try:
                seq = await self._store.journals.append(
                    self.journal.job,
                    kind_of(batch),
                    self.spec.queue,
                    data,
                    message_id=message_id,
                    expect=expect,
                )
                self.journal.absorb([Entry(seq=seq, data=data)])
                return
            except (Conflict, StoreUnavailable) as refusal:
                if _now_s() > give_up:
                    raise StoreUnavailable(
                        f"the store took no record of {self.journal.job} for {GIVE_UP_S:.0f} s: {refusal}"
                    ) from refusal
            await asyncio.sleep(pause_s)
            news = await self._read_on(give_up)
            if self._decide(news, message_id) == "written":
                return
            # An earlier message of ours that went unanswered, or was given up, may have landed since.
            landed = [record for message in news for record in message.records]
            batch = tuple(record for record in batch if record not in landed)
            if not batch:
                return
            if self.journal.state.cancel is not None and not _cancels(batch):
                raise Cancelled

    async def _read_on(self, give_up: float) -> list[Message]:
        """Absorb everything after the tail, and return it."""
        while True:
            try:
                entries = await self._store.journals.read(self.journal.job, after=self.journal.tail)
                self._answered_at = _now_s()
                return self.journal.absorb(entries)
            except StoreUnavailable:
                if _now_s() > give_up:
                    raise
            await asyncio.sleep(RETRY_PAUSES_S[-1])

    def _decide(self, news: list[Message], message_id: str) -> Verdict:
        decision = verdict(
            self.journal, news, run=self.lease.run, epoch=self.lease.epoch, message_id=message_id
        )
        if decision == "fenced":
            raise Fenced(f"another run holds {self.journal.job}, or it has ended")
        if decision == "reread":
            raise Reread
        return decision

    async def _look(self) -> None:
        """Absorb what others wrote: a cancel, a newer lease, an end."""
        async with self._writing:
            self._decide(await self._read_on(_now_s() + GIVE_UP_S), "")
        if self.journal.state.cancel is not None:
            raise Cancelled

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self._guard(self._look())

    def _flush(self) -> None:
        self._timer = None
        self._flushing = asyncio.create_task(self._guard(self.write()))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _guard(self, step: Awaitable[None]) -> None:
        try:
            await step
        except Exception as failure:
            if not self._failure.done():
                self._failure.set_exception(failure)

    async def _print_until(self, durable: int | None) -> None:
        """Publish what was held back for the first `durable` records, or all of it after the end."""
        async with self._printing:
            chunks = []
            while self._held_back and (durable is None or self._held_back[0][0] <= durable):
                chunks.append(self._held_back.popleft()[1])
            if chunks:
                await self._store.logs.append(self.journal.job, self.spec.queue, chunks)


def _newest_progress(records: Sequence[AnyRecord]) -> tuple[AnyRecord, ...]:
    """`records` without all progress but the newest."""
    newest = next((record for record in reversed(records) if isinstance(record, Progress)), None)
    return tuple(record for record in records if record is newest or not isinstance(record, Progress))


def _cancels(batch: Sequence[AnyRecord]) -> bool:
    return isinstance(batch[-1], Done) and batch[-1].status == "cancelled"


def _now_s() -> float:
    """A clock that also counts the time for which the machine was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
