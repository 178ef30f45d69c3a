"""The reconciler: finds jobs that nobody is looking at, and says `ready` for them.

Every hint and every timer may be lost, and every unit may die. So the control plane reads what is
appended to the journals, keeps those that have not ended, and asks of each, twice a second: is there
somebody at work, or a hint on its way? Several may do so at once: a `ready` too many costs a look, and
every end is written under compare-and-set.

    cancelled, and nobody at work              the `done` is written here
    over its time, and nobody at work          the same: there may be no worker left
    held, and its holder gone                  ready
    asleep, and it is time                     ready
    queued, no hint waiting, nobody keeps one  ready
    in what a newer build wrote                nothing, and it stays in mind

What it may conclude from silence is presence's to say; what a job needs is `needs`, a pure function.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from mvmci.config.quantity import format_duration
from mvmci.errors import StoreUnavailable
from mvmci.jobs.job import End, is_id
from mvmci.jobs.journal import Done, Entry, Journal, State
from mvmci.journals.writer import Writer
from mvmci.stores.nats import Cluster
from mvmci.stores.nats.hints import Delivered
from mvmci.stores.nats.journals import Tailed
from mvmci.system.clock import wall_clock_ms

_LOOK_EVERY_S = 0.5
PAUSES_S = (0.5, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # between two words for one job; the last is repeated
NOTICE_S = 2.5  # a hint that was delivered is kept by somebody, who has said so by then
TIMER_GRACE_MS = 1_500  # a timer fires to the second
OVERDUE_GRACE_MS = 5_000  # a live holder ends its job itself

log = logging.getLogger(__name__)

Need = Literal["nothing", "ready", "cancelled", "timed_out"]


def needs(state: State, *, now_ms: int, live: bool, hinted: bool) -> Need:
    """What a job needs from outside. `live`: its holder may be at work; `hinted`: somebody looks, or will."""
    if state.spec is None or state.done is not None or state.corrupt is not None or state.newer is not None:
        return "nothing"
    if state.held and live:
        return "nothing"
    if state.cancel is not None:
        return "cancelled"
    if state.deadline_ms is not None and state.deadline_ms + OVERDUE_GRACE_MS < now_ms:
        return "timed_out"
    if state.held:
        return "ready"
    if state.released is not None and state.released.until + TIMER_GRACE_MS > now_ms:
        return "nothing"
    return "nothing" if hinted else "ready"


@dataclass
class _Open:
    """A job that has not ended, and what was said for it. Its journal is read only if it is looked at."""

    journal: Journal
    queue: str
    spec_seq: int
    news: list[Entry] = field(default_factory=list)  # what the journal has not taken in yet
    said_seq: int = 0  # of the last `ready` that this reconciler wrote
    said: int = 0  # how often, since its journal last changed
    next_at: float = 0.0
    alone_since: float | None = None  # since when nobody seems to be looking

    def read(self) -> None:
        """Let the journal take in what is new."""
        self.journal.absorb(entry for entry in self.news if entry.seq > self.journal.tail)
        self.news.clear()


@dataclass
class Counts:
    """What a reconciler has done, for its log and for tests."""

    said: int = 0
    ended: int = 0
    open: int = 0


@dataclass
class Reconciler:
    """Follows the journals of one cluster. `clock` is monotonic, in s; `now_ms` is since 1970."""

    cluster: Cluster
    clock: Callable[[], float] = time.monotonic
    now_ms: Callable[[], int] = wall_clock_ms
    paused: Callable[[], bool] = lambda: False  # while records are missing nothing is begun or ended
    counts: Counts = field(default_factory=Counts)
    _seq: int = 0
    _lost: bool = False
    _open: dict[str, _Open] = field(default_factory=dict)  # to be looked at
    _waiting: dict[str, dict[str, _Open]] = field(default_factory=lambda: defaultdict(dict))

    async def run(self) -> None:
        """Until cancelled. A broker that is away is waited for."""
        while True:
            try:
                await self.look()
            except StoreUnavailable as away:
                log.info("cannot reconcile: %s; will retry", away.message)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def look(self) -> None:
        """Read what is new, and see to every job that needs something. Raises StoreUnavailable."""
        if self.paused():
            self._lost = True
            return
        if self._lost:  # sequences that are gone are used again: nothing that was read counts any more
            self._lost, self._seq = False, 0
            self._open.clear()
            self._waiting.clear()
        async for told in self.cluster.journals.tail(self._seq):
            self._take(told)
            self._seq = told.entry.seq
        delivered = await self._deliver()
        members = await self.cluster.store.presence.members()
        looked_at = {job for one in members for job in one.jobs | set(one.keeps)}
        self.counts.open = len(self._open) + sum(map(len, self._waiting.values()))
        for job, one in list(self._open.items()):
            if one.next_at > self.clock():
                continue
            try:
                await self._process(job, one, delivered, looked_at)
            except StoreUnavailable:
                raise
            except Exception:  # a bug of ours; the other jobs are looked after all the same
                log.exception("job %s cannot be looked after", job)
                one.next_at = self.clock() + PAUSES_S[-1]

    def _take(self, told: Tailed) -> None:
        """Take in a message by its subject alone: most jobs end before anybody has to look after them.

        A new job waits in its queue; one that somebody wrote to is looked at; one that ended is let go.
        """
        job, (kind, queue, _), entry = told
        if not (is_id(job) and is_id(queue)):
            return
        known = self._open.pop(job, None)
        for jobs in self._waiting.values():
            known = known or jobs.pop(job, None)
        one = known or _Open(Journal(job), queue, entry.seq)
        one.news.append(entry)
        if kind == "done":
            one.read()
            if one.journal.state.done is not None:
                return
        one.said, one.next_at, one.alone_since = 0, 0.0, None
        if kind == "spec" and known is None:
            self._waiting[queue][job] = one
        else:
            self._open[job] = one

    def open_jobs(self) -> Iterator[tuple[str, int]]:
        """The jobs that have not ended, each with the sequence of its spec."""
        for jobs in (self._open, *self._waiting.values()):
            yield from ((job, one.spec_seq) for job, one in jobs.items())

    async def _deliver(self) -> dict[str, Delivered]:
        """How far each queue's consumers are; jobs whose spec was delivered are looked at from now on."""
        queues = {queue for queue, jobs in self._waiting.items() if jobs}
        queues.update(one.queue for one in self._open.values())
        delivered = {}
        for queue in queues:
            found = await self.cluster.hints.delivered(queue)
            if found is None:
                continue  # nobody pulls from it, or its consumers are about to be made
            delivered[queue] = found
            waiting = self._waiting[queue]
            while waiting and (first := next(iter(waiting))) and waiting[first].spec_seq <= found.spec:
                self._open[first] = waiting.pop(first)
        return delivered

    async def _process(
        self, job: str, one: _Open, delivered: dict[str, Delivered], looked_at: set[str]
    ) -> None:
        one.read()
        state = one.journal.state
        if state.newer is not None:  # it is for a newer control plane to say what it needs
            one.next_at = self.clock() + PAUSES_S[-1]
            return
        if state.spec is None or state.corrupt is not None:
            del self._open[job]  # its status says so; nothing that is done here would mend it
            return
        live = state.held and state.lease is not None
        if live:
            assert state.lease is not None
            live = await self.cluster.store.presence.live(job, state.lease)
        far = delivered.get(one.queue)
        waits = far is not None and far.waiting > 0 and one.said_seq > far.ready
        hinted = job in looked_at or waits
        need = needs(state, now_ms=self.now_ms(), live=live, hinted=hinted)
        if need == "nothing":
            one.alone_since = None
        elif need == "ready":
            await self._send_hint(job, one, at_once=state.held)
        else:
            await self._end(job, one, need)

    async def _send_hint(self, job: str, one: _Open, *, at_once: bool) -> None:
        now = self.clock()
        if one.alone_since is None:
            one.alone_since = now
        if not at_once and now - one.alone_since < NOTICE_S:
            return
        one.said_seq = await self.cluster.store.hints.ready(one.queue, job)
        one.next_at = now + PAUSES_S[min(one.said, len(PAUSES_S) - 1)]
        one.said += 1
        self.counts.said += 1
        log.info("job %s: nobody is working on it; sent a new hint", job)

    async def _end(self, job: str, one: _Open, end: End) -> None:
        """Write the end, unless somebody else has written anything meanwhile."""
        journal, state = one.journal, one.journal.state
        assert state.spec is not None
        if end == "cancelled":
            assert state.cancel is not None
            reason = f"cancelled by {state.cancel.by}"
        else:
            reason = f"timeout: more than {format_duration(state.spec.limits.timeout_ms)}"
        done = Done(at=self.now_ms(), status=end, reason=reason)
        tail = journal.tail
        writer = Writer(self.cluster.store, journal, one.queue)
        if await writer.write(lambda: (done,) if journal.tail == tail else (), give_up_s=0.0):
            self.counts.ended += 1
            log.info("job %s %s: nobody was working on it", job, end)
