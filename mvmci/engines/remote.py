"""An engine in another process, an executor: how a worker sends it jobs and learns what became of them.

There are two ways to executors, the broker (`engines/broker`) and HTTP (`engines/http`); what is here
is the same for both. A reply from an executor is a hint like any other: the journal decides. A reply that
is lost, an executor that dies or a connection that breaks come to the same: the worker sends the job
again, and whichever executor takes it reads in the journal whether there is anything left to do.

    worker                          executor
    RunRequest(job) ------------------>  a slot is free: takes it, runs it as its holder
      <------------------ Accepted     unless it comes out at once
                                    (no slot is free: Rejected; the worker keeps the hint and waits)
      <----------------- Outcome     the run has come out so

Requests and replies are written at the cluster's level, and say it (`mvmci.wire`). What is of a newer one, or
of a kind that is not known, comes to `Failed` with "newer": this executor cannot, and another one may.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from mvmci.engine import Outcome
from mvmci.errors import EngineAway, MvmciError, NotFound, StoreUnavailable, VersionsDiffer
from mvmci.jobs.job import Id
from mvmci.jobs.journal import Entry
from mvmci.jobs.times import Micros, Moment, Stopwatch
from mvmci.store import Store
from mvmci.system.tasks import at_most, cancel
from mvmci.system.usage import boot_id
from mvmci.wire import HINT, Level, Leveled, check

_LOOK_EVERY_S = 0.25  # at an executor that says nothing
LOOKS_MAX = 12  # in a row at which it does not know of the job any more
GONE_PAUSE_S = 0.1  # that one executor is gone is seen by all at nearly the same time
AGAIN_S = 1.0  # after so long a job is offered again, whether or not a slot was said to be free
_AWAY_S = 4.0  # for so long a job waits for an engine out of reach; then for another worker
BUSY = "executors busy"
NEWER = "newer"  # than the executor, or the worker: another one may understand it


class RunRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job for an executor. `spec_seq` is the sequence of its spec if this is its first delivery.

    `waited` is how long its worker had it before, in µs, and `sent` when that sent it.
    """

    job: Id
    worker: Id
    spec_seq: int = 0
    wire: int = 0
    waited: Micros = 0
    sent: Moment | None = None


class _Reply(msgspec.Struct, frozen=True, kw_only=True, tag_field="reply", omit_defaults=True):
    """Base of replies but `Outcome`."""

    wire: int = 0


class Accepted(_Reply, frozen=True, kw_only=True, tag="accepted"):
    """That executor, in that incarnation, sees to the job."""

    unit: Id
    incarnation: Id


class Failed(_Reply, frozen=True, kw_only=True, tag="failed"):
    """The executor could not do it, and says why: "not-found", "unavailable", "newer", or anything else."""

    why: str
    message: str


class Rejected(_Reply, frozen=True, kw_only=True, tag="rejected"):
    """It has no free slot after all."""


Reply = Accepted | Outcome | Failed | Rejected

_requests = msgspec.json.Decoder(RunRequest)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
_leveled = msgspec.json.Decoder(Leveled)
_encode = msgspec.json.Encoder().encode


def moment() -> Moment:
    """Now, here."""
    return Moment(boot_id(), time.monotonic_ns())


def read_request(data: bytes) -> RunRequest:
    """The request that `data` is. Raises VersionsDiffer for one of a newer level, DecodeError for none."""
    check(_leveled.decode(data).wire, "the request")
    return _requests.decode(data)


def encode_reply(reply: Reply, level: Level) -> bytes:
    """`reply`, as it is written at the cluster's level."""
    return _encode(msgspec.structs.replace(reply, wire=level.spoken) if level.spoken else reply)


def read_reply(data: bytes) -> Reply:
    """The reply that `data` is, which was written by an executor."""
    try:
        check(_leveled.decode(data).wire, "the executor")
        return _replies.decode(data)
    except VersionsDiffer as newer:
        return Failed(why=NEWER, message=newer.message)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Failed(why=NEWER, message="the executor is of another build: its reply cannot be read")


class NoCapacity(MvmciError):
    """No slot is free for a job now, at one executor or at any; the message says why.

    An executor says so by `Rejected`, or by 503 over HTTP. What a worker is told completes `waiting: …`.
    """


class Transport(Protocol):
    """A way to executors."""

    def send(self, request: RunRequest) -> AbstractAsyncContextManager[AsyncIterator[Reply]]:
        """Offer a job to whichever executor has a free slot; on entry, one has taken it or none did.

        What is iterated are the replies: `Accepted`, unless it comes out at once, and `Outcome` or
        `Failed`; the end without these means that nothing more will come. Leaving early ends the
        listening, not the job. Raises NoCapacity, EngineAway, StoreUnavailable, and VersionsDiffer where
        those that were asked do not understand the request.
        """

    def capacity(self) -> asyncio.Event:
        """It is set when an executor next says that it has a free slot, and by `disconnect`."""

    async def probe(self) -> bool:
        """See `mvmci.engine.Engine.probe`."""

    def disconnect(self) -> None:
        """Let no more replies come about the jobs that were sent."""

    async def close(self) -> None:
        """Leave; jobs go on."""


class Remote:
    """The port `mvmci.engine.Engine` of a worker whose engine is reached by `transport`."""

    def __init__(self, store: Store, transport: Transport) -> None:
        self._store = store
        self._transport = transport
        self._draining = False
        self.refused = 0

    async def run(
        self,
        job: str,
        *,
        spec_entry: Entry | None = None,
        worker: str = "",
        on_slot_free: Callable[[], None] = lambda: None,
        stopwatch: Stopwatch | None = None,
    ) -> Outcome:
        """See `mvmci.engine.Engine.run`. Only the place of `spec_entry` is sent: an executor reads it.

        Once this drains, jobs are let go at once: their executor goes on with those that it has taken,
        and whoever gets their hints follows it.
        """
        del on_slot_free  # the slot is the executor's
        seq = spec_entry.seq if spec_entry is not None else 0
        unit = worker or self._store.presence.unit
        request = RunRequest(job=job, worker=unit, spec_seq=seq, wire=self._store.level.spoken)
        while not self._draining:
            outcome = await self._offer(request, stopwatch or Stopwatch(time.monotonic_ns))
            if outcome is not None:
                return outcome
            request = msgspec.structs.replace(request, spec_seq=0)
            await asyncio.sleep(GONE_PAUSE_S)
        return Outcome("released")

    async def _offer(self, request: RunRequest, stopwatch: Stopwatch) -> Outcome | None:
        """Wait until an executor takes the job, and follow it. None: nothing more is heard of it."""
        presence = self._store.presence
        loop = asyncio.get_running_loop()
        waits, away_since = "", None
        while not self._draining:
            capacity = self._transport.capacity()
            try:
                offer = request
                if request.wire > 0:  # executors of level 0 take no field that they do not know
                    waited = stopwatch.times().order
                    offer = msgspec.structs.replace(request, waited=waited, sent=moment())
                async with self._transport.send(offer) as replies:
                    if waits:
                        await presence.add_hint(request.job)
                    return await self._follow(request.job, replies)
            except NoCapacity as none:
                self.refused += 1
                away_since, waits = None, none.message
            except EngineAway as away:
                away_since, waits = away_since or loop.time(), away.message
                if loop.time() - away_since > _AWAY_S:
                    raise
            await presence.add_hint(request.job, waits)
            await at_most(AGAIN_S, capacity.wait())
        return None

    async def _follow(self, job: str, replies: AsyncIterator[Reply]) -> Outcome | None:
        """What the executor says at the end; None when it went away, or knows nothing of the job."""
        first = await anext(replies, None)
        if not isinstance(first, Accepted):
            return _outcome(first)
        next_reply = asyncio.ensure_future(anext(replies, None))
        try:
            strange = 0  # looks in a row
            while strange < LOOKS_MAX:
                replied, _ = await asyncio.wait((next_reply,), timeout=_LOOK_EVERY_S)
                executor = None if replied else await self._store.presence.find(first.unit, first.incarnation)
                if executor is None:
                    break
                strange = 0 if job in executor.jobs or not executor.is_readable else strange + 1
            return _outcome(next_reply.result()) if next_reply.done() else None
        finally:
            await cancel(next_reply)

    def drain(self, yes: bool = True) -> None:
        """Let every job go at once, or take jobs again."""
        self._draining = yes
        if yes:
            self._transport.disconnect()

    async def probe(self) -> bool:
        """See `mvmci.engine.Engine.probe`."""
        return await self._transport.probe()

    async def close(self) -> None:
        """See `mvmci.engine.Engine.close`: the executors go on."""
        self.drain()
        await self._transport.close()


def _outcome(reply: Reply | None) -> Outcome | None:
    """Raises what the executor raised."""
    match reply:
        case Outcome():
            return reply
        case Failed(why="not-found"):
            raise NotFound(reply.message)
        case Failed(why="unavailable"):
            raise StoreUnavailable(reply.message)
        case Failed(why=why) if why == NEWER:
            raise VersionsDiffer(reply.message, hint=HINT)
        case Failed():
            raise MvmciError(reply.message)
        case _:
            return None
