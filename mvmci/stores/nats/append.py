"""Appends to the journals, by compare-and-set, many at a time.

One append alone is published plainly. Those that are pending at the same time go out as one atomic
batch: one sync for all. What comes while something is in flight waits for that.

    at least BATCH_MIN pending, under BATCHES_MAX in flight     an atomic batch, one message a job
    fewer, no batch in flight                                   plainly, up to PLAIN_MAX at once
    else                                                        they wait for an answer

A batch costs the server as much as ten plain messages, and each message in it next to nothing more. So
the ends of short jobs, which nobody's effect waits for, may be delayed: while they come fast and there are
jobs in hand that will end as well, they wait for each other until they are HOLD_MANY, for HOLD_S at most.
All else, and every end of a worker that is not under load, goes at once.

No `Nats-Incoming-Id` is sent. The id stands in the message, the compare-and-set already refuses whatever
is sent twice, and a table of ids would cost the server memory and add a third kind of answer.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mvmci.cluster.broker import BATCH_MESSAGES_MAX
from mvmci.cluster.metrics import Histogram
from mvmci.errors import Conflict, MvmciError, NoAnswer, StoreFull, StoreUnavailable
from mvmci.stores.nats.layout import EXPECTED, EXPECTED_OF
from mvmci.stores.nats.link import ApiError, Link, accepted
from mvmci.stores.nats.parser import Incoming
from mvmci.system.tasks import TaskSet

BATCH_MIN = 10  # a batch of fewer costs more than as many plain messages
BATCHES_MAX = 2
PLAIN_MAX = 16
HOLD_S = 0.1
HOLD_MANY = 128
HOLD_MIN = 20  # so many ends have to be expected within HOLD_S
OTHERS_MIN = 4  # and so many jobs be in hand that have not ended
_MEAN_OVER = 16  # appends
PAUSE_S_MAX = 1.0  # a longer pause between two ends says no more than this one

WRONG_LAST_SEQUENCE = 10071
WRONG_LAST_SEQUENCE_PENDING = 10164
CONFLICTS = (WRONG_LAST_SEQUENCE, WRONG_LAST_SEQUENCE_PENDING)
FULL = (10077, 10023, 10047, 10122)  # the stream's bytes; the store, disk, memory and account
MAKE_ROOM = "retain less, or give the broker's store more room"


def _future() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False, slots=True)
class Append:
    """One message, and the sequence that it gets."""

    job: str
    subject: str
    subtree: str
    data: bytes
    expect: int
    may_delay: bool = False
    seq: asyncio.Future[int] = field(default_factory=_future)

    @property
    def headers(self) -> dict[str, str]:
        return {
            EXPECTED: str(self.expect),
            EXPECTED_OF: self.subtree,
        }


class GroupCommit:
    """Sends the appends of one connection. `in_hand` tells how many jobs its unit sees to."""

    def __init__(self, link: Link, in_hand: Callable[[], int] = lambda: 0) -> None:
        self._link = link
        self._in_hand = in_hand
        self.took = Histogram()  # of appends, until they were on disk
        self._pending: list[Append] = []
        self._batches = 0
        self._plain = 0
        self._scheduled = False
        self._tasks = TaskSet()
        self._clock = asyncio.get_running_loop().time
        self._ended_at = float("-inf")  # the last short job
        self._pause_s = PAUSE_S_MAX  # between two of them, in the mean
        self._in_flight = 0  # appends
        self._hold: asyncio.TimerHandle | None = None

    async def append(self, append: Append) -> int:
        """Raises Conflict, NoAnswer, StoreFull, StoreUnavailable."""
        self._pending.append(append)
        if append.may_delay:
            now = self._clock()
            pause_s = min(now - self._ended_at, PAUSE_S_MAX)
            self._pause_s += (pause_s - self._pause_s) / _MEAN_OVER
            self._ended_at = now
        self._schedule()
        began = time.monotonic_ns()
        seq = await append.seq
        self.took.observe((time.monotonic_ns() - began) // 1000)
        return seq

    async def close(self) -> None:
        if self._hold is not None:
            self._hold.cancel()
        await self._tasks.close()
        for append in self._pending:
            _fail(append, StoreUnavailable("the store was closed"))

    def _schedule(self) -> None:
        """Send at the loop's next turn, together with what else is appended in this one."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self, held: bool = False) -> None:
        """`held`: for long enough."""
        self._scheduled = False
        if held:
            self._hold = None
        self._pending = [append for append in self._pending if not append.seq.done()]  # some gave up
        if not held and self._holds():
            return
        while self._pending:
            first = self._first_of_each_job()
            if len(first) >= BATCH_MIN and self._batches < BATCHES_MAX:
                self._batches += 1
                self._tasks.start(self._send_batch(first))
            elif len(first) < BATCH_MIN and not self._batches and self._plain < PLAIN_MAX:
                del first[1:]
                self._plain += 1
                self._tasks.start(self._send_plain(first[0]))
            else:
                return
            self._in_flight += len(first)
            sent = set(first)
            self._pending = [append for append in self._pending if append not in sent]

    def _holds(self) -> bool:
        """Whether what is pending is to wait for more."""
        pending = self._pending
        more = self._in_hand() - len(pending) - self._in_flight  # ends that may come
        if (
            pending
            and len(pending) < HOLD_MANY
            and more >= OTHERS_MIN
            and self._pause_s * HOLD_MIN < HOLD_S
            and all(append.may_delay for append in pending)
        ):
            if self._hold is None:
                self._hold = asyncio.get_running_loop().call_later(HOLD_S, self._send, True)
            return True
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        return False

    def _first_of_each_job(self) -> list[Append]:
        """Two messages of one job in a batch would both be stored."""
        first: dict[str, Append] = {}
        for append in self._pending:
            first.setdefault(append.job, append)
            if len(first) == BATCH_MESSAGES_MAX:
                break
        return list(first.values())

    async def _send_plain(self, append: Append) -> None:
        try:
            await self._publish(append)
        finally:
            self._plain -= 1
            self._in_flight -= 1
            self._schedule()

    async def _send_batch(self, batch: list[Append]) -> None:
        try:
            last = await self._commit(batch)
            for seq, append in enumerate(batch, last - len(batch) + 1):
                if not append.seq.done():
                    append.seq.set_result(seq)
        except ApiError:
            # One stale member refuses all, and too many open batches refuse any: each for itself.
            for start in range(0, len(batch), PLAIN_MAX):
                await asyncio.gather(*map(self._publish, batch[start : start + PLAIN_MAX]))
        except StoreUnavailable as unavailable:
            for append in batch:
                _fail(append, NoAnswer(unavailable.message))
        finally:
            for append in batch:
                _fail(append, NoAnswer("the store was closed before it answered"))
            self._batches -= 1
            self._in_flight -= len(batch)
            self._schedule()

    async def _publish(self, append: Append) -> None:
        try:
            answer = await self._link.request(append.subject, append.data, headers=append.headers)
        except ApiError as refused:
            _fail(append, _meaning(refused))
        except StoreUnavailable as unavailable:
            _fail(append, unavailable)
        else:
            if not append.seq.done():
                append.seq.set_result(answer["seq"])
        finally:
            _fail(append, NoAnswer("the store was closed before it answered"))

    async def _commit(self, batch: list[Append]) -> int:
        """Send `batch` whole; the sequence of its last message. Raises ApiError, StoreUnavailable."""
        batch_id = secrets.token_hex(8)
        to, answer = self._link.expect()
        try:
            for number, append in enumerate(batch, 1):
                last = number == len(batch)
                headers = append.headers | {"Nats-Batch-Id": batch_id, "Nats-Batch-Sequence": str(number)}
                if last:
                    headers["Nats-Batch-Commit"] = "1"
                await self._link.publish(
                    append.subject, append.data, headers=headers, reply=to if last else ""
                )
            reply: Incoming = await self._link.answer(answer)
            seq: int = accepted(reply)["seq"]
            return seq
        finally:
            answer.cancel()


def _meaning(refused: ApiError) -> MvmciError:
    if refused.code in CONFLICTS:
        return Conflict(refused.message)
    if refused.code in FULL:
        return StoreFull(refused.message, hint=MAKE_ROOM)
    return refused


def _fail(append: Append, failure: MvmciError) -> None:
    """The one who waits hears of `failure`, unless it has its answer already."""
    if not append.seq.done():
        append.seq.set_exception(failure)
