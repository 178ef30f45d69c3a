"""A client that makes load: it submits jobs of its own, hears their ends, and counts both by the journals.

What it hears is the broker's word that an end was stored, with its place in the stream of journals and the
time by the broker's clock. That is quick, and may be lost. So what is counted at the end was read: every job
that was submitted has one end, no more and no less.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple, Protocol, TypeVar

from mvmci.errors import MvmciError, NotYet, StoreFull
from mvmci.jobs.journal import Done, Entry, Spec, records_of
from mvmci.journals.client import submit
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.parser import Incoming
from mvmci.stores.nats.rows import nanoseconds
from mvmci.system.clock import wall_clock_ms
from mvmci.system.tasks import TaskSet, at_most

END_S_MAX = 600.0  # for so long the last jobs are waited for
LOOK_EVERY_S = 2.0  # a word may be lost


class Job:
    """One that was begun. Times are ns by our monotonic clock, the place and the stamp of its end the
    broker's; all that is not known yet is 0."""

    __slots__ = ("_stamp", "ended_ns", "id", "on_end", "planned_ns", "sent_ns", "seq")

    def __init__(self, job: str, on_end: Callable[[Job], None], planned_ns: int) -> None:
        self.id = job
        self.on_end = on_end
        self.sent_ns = time.monotonic_ns()
        self.planned_ns = planned_ns or self.sent_ns
        self.ended_ns = self.seq = 0
        self._stamp = ""

    def end(self, seq: int, stamp: str) -> None:
        """It was stored there, and then, as the broker writes it."""
        self.ended_ns = time.monotonic_ns()
        self.seq, self._stamp = seq, stamp
        self.on_end(self)

    @property
    def stored_ns(self) -> int:
        """When its end was stored, since 1970 by the broker's clock."""
        return nanoseconds(self._stamp) if self._stamp else 0


class Source(Protocol):
    """What jobs are made of: `mvmci.bench.profiles.Work`."""

    def next(self, job: str, at_ms: int) -> Spec:
        """The next job, under that id."""


class Recorded(NamedTuple):
    """An end that was read: its place in the stream, and whether the job succeeded."""

    seq: int
    succeeded: bool


class Count(NamedTuple):
    """All jobs of a client by their journals: `lost` have no end, `twice` more than one, and of those that
    are `open` it is not known."""

    submitted: int
    ended_once: int
    lost: int
    twice: int
    open: int = 0


class Client:
    """That of one cluster, for one run. It works while it is `listening`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.store = cluster.store
        self._prefix = f"b-{secrets.token_hex(4)}-"  # of our ids
        self._numbers = itertools.count(1)
        self._submitted = self._ended = 0
        self._open: dict[str, Job] = {}  # no end was heard of
        self._unread: set[str] = set()  # no end was read
        self._twice: set[str] = set()
        self._read: list[Recorded] = []
        self._read_to = 0
        self._submits = TaskSet()
        self._failure: MvmciError | None = None
        self._all_ended = asyncio.Event()

    @property
    def open(self) -> int:
        """How many jobs have not ended yet."""
        return len(self._open)

    def expect(self, on_end: Callable[[Job], None], planned_ns: int = 0) -> Job:
        """A job that is submitted now, by whomever, under its id. `on_end` is called when it has ended."""
        job = Job(f"{self._prefix}{next(self._numbers)}", on_end, planned_ns)
        self._submitted += 1
        self._open[job.id] = job
        self._unread.add(job.id)
        self._all_ended.clear()
        return job

    def begin(self, work: Source, on_end: Callable[[Job], None], planned_ns: int = 0) -> Job:
        """Submit the next job of `work`. No submit waits for another; what one raises, `check` does."""
        job = self.expect(on_end, planned_ns)
        self._submits.start(self._submit(work.next(job.id, wall_clock_ms())))
        return job

    async def _submit(self, spec: Spec) -> None:
        try:
            await submit(self.store, spec)
        except MvmciError as failure:
            self._failure = self._failure or failure
            if isinstance(failure, StoreFull):  # nothing was written, so there is nothing that could be lost
                self._forget(spec.id)

    def _forget(self, job: str) -> None:
        self._submitted -= 1
        self._unread.discard(job)
        self._open.pop(job, None)
        if not self._open:
            self._all_ended.set()

    def hear(self, word: Incoming) -> None:
        """Take the broker's word that something was stored."""
        job = self._open.get(word.subject.rpartition(".")[2])
        if job is not None:
            headers = word.headers
            if self.cluster.layout.origin_of_message(headers["Nats-Subject"]).kind == "done":
                self._end(job, int(headers["Nats-Sequence"]), headers.get("Nats-Time-Stamp", ""))

    def _end(self, job: Job, seq: int, stamp: str) -> None:
        del self._open[job.id]
        if not self._open:
            self._all_ended.set()
        job.end(seq, stamp)

    def check(self) -> None:
        """Raises what a submit did, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    async def until(self, event: asyncio.Event, within_s: float) -> bool:
        """Wait for `event`, or no longer; whether it is set. Raises as `check`."""
        end = time.monotonic() + within_s
        while not event.is_set() and (left := end - time.monotonic()) > 0:
            self.check()
            await at_most(min(left, LOOK_EVERY_S), event.wait())
        self.check()
        return event.is_set()

    async def settle(self, within_s: float = END_S_MAX) -> None:
        """Wait until all have ended. Raises NotYet, which says how many have not, and as `read`, `check`."""
        end = time.monotonic() + within_s
        while before := len(self._open):
            if not await self.until(self._all_ended, LOOK_EVERY_S) and len(self._open) == before:
                await self.read()
            if self._open and time.monotonic() > end:
                raise NotYet(
                    f"{len(self._open)} jobs have not ended after {within_s:.0f} s, {min(self._open)} is one",
                    hint="they go on; `mvmci status` says what one of them waits for",
                )

    async def read(self) -> None:
        """Read the ends of our jobs that were recorded since the last call. Raises StoreUnavailable.

        A job of whose end no word was heard ends with it.
        """
        layout = self.cluster.layout
        async for stored in self.cluster.link.read(layout.jobs, layout.ends(), self._read_to):
            self._read_to = stored.seq
            job = layout.job_of_message(stored.subject)
            if job in self._unread:
                self._unread.remove(job)
                self._ended += 1
                last = records_of(Entry(seq=stored.seq, data=stored.data))[-1:]
                good = bool(last) and isinstance(last[0], Done) and last[0].status == "succeeded"
                self._read.append(Recorded(stored.seq, good))
                if job in self._open:
                    self._end(self._open[job], stored.seq, stored.headers["Nats-Time-Stamp"])
            elif job.startswith(self._prefix):
                self._twice.add(job)

    async def recorded(self, after: int, to: int) -> list[Recorded]:
        """The ends of our jobs behind the place `after`, up to `to`. All up to there are forgotten then.

        Raises StoreUnavailable.
        """
        await self.read()
        found = [one for one in self._read if after < one.seq <= to]
        self._read = [one for one in self._read if one.seq > to]
        return found

    async def count(self) -> Count:
        """Read what there is, and say what became of all. Raises StoreUnavailable."""
        await self.read()
        twice = len(self._twice)
        return Count(self._submitted, self._ended - twice, len(self._unread), twice)

    async def count_what_there_is(self, within_s: float) -> Count:
        """The same of a run that is cut. What has not ended soon, or cannot be read, is open."""
        with suppress(MvmciError):
            await self.settle(within_s)
            return await self.count()
        with suppress(MvmciError):  # else it is as far as was read before
            await self.read()
        twice = len(self._twice)
        return Count(self._submitted, self._ended - twice, 0, twice, len(self._unread))

    async def close(self) -> None:
        """Leave. Jobs that were accepted go on."""
        await self._submits.close()


_Client = TypeVar("_Client", bound=Client)


@asynccontextmanager
async def listening(client: _Client) -> AsyncIterator[_Client]:
    """`client`, which hears meanwhile what becomes of its jobs. Raises StoreUnavailable."""
    cluster = client.cluster
    leave = await cluster.link.subscribe(cluster.layout.stored("job", "*"), client.hear)
    try:
        yield client
    finally:
        await client.close()
        await leave()
