"""One run of one job: its lease, its view of the journal, and every write that it makes.

A holder writes through `writer.Writer`; whatever that reads, `journal.verdict` says whether this run may
go on (docs/protocol.md §2). It never writes after it was fenced, and what follows a record leaves it only
after that record is on disk:

    intent   is on disk before its effect begins
    result   rides with the next intent or the end, or is written after `RESULT_WAIT_S`
    output   is held back until everything recorded before it is on disk
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec

from mvmci.errors import Fenced, StoreUnavailable
from mvmci.jobs.journal import (
    AnyRecord,
    Done,
    Intent,
    Journal,
    Lease,
    Message,
    Progress,
    Released,
    Result,
    verdict,
)
from mvmci.jobs.times import Stopwatch
from mvmci.journals.writer import Writer
from mvmci.store import Chunk, Store
from mvmci.system.clock import boottime_s
from mvmci.system.tasks import TaskSet, cancel

RESULT_WAIT_S = 0.005
PUBLISH_PAUSES_S = (0.1, 0.5, 1.0, 2.0, 5.0)  # for the rest of the output, after the end
WAITING_MAX = 64  # records
_GIVE_UP_S = 60.0
WATCH_EVERY_S = 1.0
STALE_S = 3.0  # after so long without a word from the store, a holder looks before it acts

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """A cancel stands in the journal: the only end is `cancelled`."""


class Reread(Exception):
    """The lease was refused because something was recorded: forget the replay, read the job afresh."""


class Holder:
    """Writes the journal of one job for one run, and gives its output to the logs.

    Its lease rides with the first write.
    """

    def __init__(self, store: Store, journal: Journal, lease: Lease, stopwatch: Stopwatch) -> None:
        assert journal.state.spec is not None
        self.journal = journal
        self.lease = lease
        self.stopwatch = stopwatch
        self.started_at: int | None = None  # when the guest began to run
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.spec = journal.state.spec
        self._store = store
        self._writer = Writer(store, journal, self.spec.queue, self._absorbed)
        self._fenced: Fenced | Reread | None = None  # why this run may write nothing more
        self._unwritten: list[AnyRecord] = [lease]
        self._durable = 0  # records of this run that are on disk
        self._writing = asyncio.Lock()
        self._printing = asyncio.Lock()
        self._held_back: deque[tuple[int, Chunk]] = deque()
        self._chunks = 0
        self._timer: asyncio.TimerHandle | None = None
        self._flushing = TaskSet()
        self._looking: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._look_timer = loop.call_later(WATCH_EVERY_S, self._begin_to_watch)  # most jobs end before
        self._answered_at = boottime_s()

    @property
    def leased(self) -> bool:
        """Whether the lease is on disk."""
        return self._durable > 0

    def set_start(self, at: int) -> None:
        """The guest is about to run: from then on its time counts, and not from when its code was fetched."""
        self.started_at = at
        if not self.leased:
            self.lease = self._unwritten[0] = msgspec.structs.replace(self.lease, at=at)

    @property
    def deadline_ms(self) -> int:
        """When the job's time is up: counted from its first holder's start, which may be this one's."""
        first = self.journal.state.started_at
        since = first if first not in (None, self.lease.at) else self.started_at or self.lease.at
        return (since or 0) + self.spec.limits.timeout_ms

    async def add(self, record: AnyRecord, *, within_s: float = RESULT_WAIT_S) -> None:
        """Let `record` ride with the next write; it comes `within_s` at the latest.

        Of several Progress in a row only the newest waits. Raises what `write` does, once too many wait.
        """
        if isinstance(record, Progress) and self._unwritten and isinstance(self._unwritten[-1], Progress):
            self._unwritten[-1] = record
        else:
            self._unwritten.append(record)
        self.write_within(within_s)
        if len(self._unwritten) > WAITING_MAX:
            await self.write()

    def write_within(self, seconds: float) -> None:
        """Write what waits, after `seconds` at the latest."""
        loop = asyncio.get_running_loop()
        if self._timer is None or self._timer.when() > loop.time() + seconds:
            self._stop_timer()
            self._timer = loop.call_later(seconds, self._flush)

    async def write(self, *records: AnyRecord) -> None:
        """Make everything that waits, and `records` after it, durable as one message.

        Raises Fenced, Cancelled (only `finish` may follow), Reread (only before the lease is on disk),
        and StoreUnavailable after `_GIVE_UP_S` without an answer.
        """
        with self.stopwatch.part("writes"):
            await self._write(records)

    async def _write(self, records: Sequence[AnyRecord] = ()) -> None:
        self._unwritten += records
        async with self._writing:
            await self._commit()
        await self._publish(self._durable)

    async def finish(self, last: Done | Released) -> None:
        """Write the last record of this run.

        What it overtakes is forgotten: another end, which a cancel kept from being written, and an
        intent that is neither on disk nor answered: its effect never began, and is not to count as
        interrupted. An idempotent one may stay.
        """
        async with self._writing:
            answered = {record.index for record in self._unwritten if isinstance(record, Result)}
            self._unwritten = [one for one in self._unwritten if not _superseded(one, answered)]
            last = msgspec.structs.replace(last, times=self.stopwatch.times())
            if isinstance(last, Done):
                last = msgspec.structs.replace(last, chunks=self._chunks)
            self._unwritten.append(last)
            await self._commit()
        for pause_s in PUBLISH_PAUSES_S:
            if await self._publish(None):
                return
            await asyncio.sleep(pause_s)

    def failed(self) -> asyncio.Future[None]:
        """Ends only by raising what a look or a write in the background met, as `write` would.

        For one who waits, and who cancels it when that is over.
        """
        return self._failure

    async def check_still_holder(self) -> None:
        """Look at the journal if this process may have been suspended since it last heard of it."""
        if boottime_s() - self._answered_at > STALE_S:
            await self._look()

    async def print(self, chunk: Chunk) -> None:
        """Publish `chunk` once everything recorded before it is on disk."""
        self._chunks = chunk.number + 1
        self._held_back.append((self._durable + len(self._unwritten), chunk))
        await self._publish(self._durable)

    async def close(self) -> None:
        """Stop what runs in the background. What was not written is not written."""
        self._stop_timer()
        self._look_timer.cancel()
        await cancel(self._looking, *self._flushing.tasks)
        if not self._failure.cancel() and not self._failure.cancelled():
            self._failure.exception()  # nobody is left who would await it

    async def _commit(self) -> None:
        """Write what waits as one message, or learn that it was written, or raise.

        A record stops waiting when it is seen in the journal, by whichever of our messages it got
        there: one that went unanswered, or whose writer was cancelled, may land at any time.
        """
        self._stop_timer()
        self._check()
        waiting = tuple(self._unwritten)

        def wanted() -> tuple[AnyRecord, ...]:
            batch = tuple(record for record in waiting if record in self._unwritten)
            if batch and self.journal.state.cancel is not None and not _cancels(batch):
                raise Cancelled
            return batch

        await self._writer.write(wanted, give_up_s=_GIVE_UP_S, waits_for_room=True)
        if self.journal.state.cancel is not None and self.journal.state.done is None:
            raise Cancelled

    def _absorbed(self, news: Sequence[Message], message_id: str) -> None:
        """Stop waiting for those of our records that stand in the journal, and see whether we may go on."""
        self._answered_at = boottime_s()
        for message in news:
            self._mark_written(message.records)
        decision = verdict(
            self.journal, news, run=self.lease.run, epoch=self.lease.epoch, message_id=message_id
        )
        if decision == "fenced":
            self._fenced = Fenced(f"another run holds {self.journal.job}, or it has ended")
        elif decision == "reread":
            self._fenced = Reread()
        self._check()

    def _mark_written(self, records: Iterable[AnyRecord]) -> None:
        written = [record for record in records if record in self._unwritten]
        for record in written:
            self._unwritten.remove(record)
        self._durable += len(written)
        if written:
            self._log(written)

    def _log(self, written: Sequence[AnyRecord]) -> None:
        """A line when a job begins, and one when it ends; only the second where both are one message."""
        job, last, attempt = self.journal.job, written[-1], self.journal.state.attempts
        if isinstance(last, Done | Released):
            how = last.status if isinstance(last, Done) else f"released ({last.why})"
            log.info("job %s %s in %.2f s (attempt %d)", job, how, (last.at - self.lease.at) / 1000, attempt)
        elif written[0] == self.lease:
            how = "resumed" if self.lease.why == "resumed" else "began"
            log.info("job %s %s (attempt %d)", job, how, attempt)

    def _check(self) -> None:
        """A write may have waited for the very look that found this run deposed."""
        if self._fenced is not None:
            raise self._fenced

    async def _look(self) -> None:
        """Absorb what others wrote: a cancel, a newer lease, an end."""
        async with self._writing:
            await self._writer.look(give_up_s=_GIVE_UP_S)
        if self.journal.state.cancel is not None:
            raise Cancelled

    def _begin_to_watch(self) -> None:
        self._looking = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await self._guard(self._look)
            await self._guard(lambda: self._publish(self._durable))
            await asyncio.sleep(WATCH_EVERY_S)

    def _flush(self) -> None:
        self._timer = None
        self._flushing.start(self._guard(self._write))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _guard(self, step: Callable[[], Awaitable[object]]) -> None:
        """Begin `step` only here: a task may be cancelled before its first turn."""
        try:
            await step()
        except Exception as failure:
            if not self._failure.done():
                self._failure.set_exception(failure)

    async def _publish(self, durable: int | None) -> bool:
        """Publish what was held back for the first `durable` records, or all of it; whether it went out.

        Output that the store does not take stays and is tried again: it is no reason to end a job.
        """
        async with self._printing:
            due = [chunk for cause, chunk in self._held_back if durable is None or cause <= durable]
            try:
                if due:
                    await self._store.logs.append(self.journal.job, self.spec.queue, due)
            except StoreUnavailable:
                return False
            for _ in due:
                self._held_back.popleft()
            return True


def _superseded(record: AnyRecord, answered: set[int]) -> bool:
    match record:
        case Done():
            return True
        case Intent():
            return record.index not in answered and not record.idempotent
        case _:
            return False


def _cancels(batch: Sequence[AnyRecord]) -> bool:
    return isinstance(batch[-1], Done) and batch[-1].status == "cancelled"
