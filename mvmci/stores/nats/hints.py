"""Hints in JetStream: two durable pull consumers a queue, on the specs and on the `ready` words.

Pulls that wait ask both consumers for one message each, for `PULL_S` at most: a request that spans a
restart of the broker is lost, and is made again. Requests outlive the pull that made them and serve the next
one; a hint that comes when nobody waits goes back at once, for somebody else. Where many pulls wait, a part
of them may be without a request for a while, so that one message asks for several.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from mvmci.errors import MvmciError
from mvmci.jobs.job import is_id
from mvmci.jobs.journal import Entry
from mvmci.store import Delivery
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import ApiError, Link, Unsubscribe
from mvmci.stores.nats.parser import Incoming
from mvmci.system.tasks import TaskSet

PULL_S = 10.0  # JetStream looks through all requests that wait at each that comes: they are to be few
PULL_GRACE_S = 1.0  # a request without a word for so much longer than it lives is lost
_ASK_EVERY_S = 1.0  # so often pulls that wait see that they have requests
ASK_SHARE = 4  # of the pulls that wait, one in so many may be without a request
NO_CONSUMER_PAUSE_S = 0.5
BEGINS_ELSEWHERE = 10012  # one that a restore has made


class _Delivery:
    def __init__(self, link: Link, job: str, *, spec_entry: Entry | None, reply: str) -> None:
        self.job = job
        self.spec_entry = spec_entry
        self._link = link
        self._reply = reply

    async def ack(self) -> None:
        await self._link.publish(self._reply, b"+ACK")

    async def keep(self) -> None:
        await self._link.publish(self._reply, b"+WPI")

    async def redeliver(self, wait_s: float) -> None:
        delay = msgspec.json.encode({"delay": int(wait_s * 1e9)})
        await self._link.publish(self._reply, b"-NAK " + delay)

    async def refuse(self) -> None:
        await self._link.publish(self._reply, b"-NAK")


@dataclass
class _Consumer:
    """One consumer of a queue, and the requests to it that are open."""

    stream: str
    settings: dict[str, Any]
    inbox: str = ""
    until: deque[float] = field(default_factory=deque)


@dataclass(frozen=True)
class Delivered:
    """The last sequences that the two consumers of a queue have handed out, and how many `ready` wait."""

    spec: int
    ready: int
    waiting: int


class _Queue:
    """One queue as this process pulls from it."""

    def __init__(self, link: Link, layout: Layout, consumers: list[_Consumer], maintains: bool) -> None:
        self._link = link
        self._maintains = maintains
        self._consumers = consumers
        self._layout = layout
        self._waiting: OrderedDict[asyncio.Future[_Delivery | None], None] = OrderedDict()
        self._asking = False
        self._look: asyncio.TimerHandle | None = None
        self._unsubscribe: list[Unsubscribe] = []
        self._tasks = TaskSet()
        self._opened = False
        self._opening = asyncio.Lock()
        self._clock = asyncio.get_running_loop().time

    async def open(self) -> None:
        async with self._opening:
            if self._opened:
                return
            for consumer in self._consumers:
                if self._maintains:
                    await self._make(consumer)
                consumer.inbox = self._link.inbox()
                take = self._taker(consumer)
                self._unsubscribe.append(await self._link.subscribe(consumer.inbox, take))
            self._opened = True

    async def close(self) -> None:
        if self._look is not None:
            self._look.cancel()
        await self._tasks.close()
        for unsubscribe in self._unsubscribe:
            await unsubscribe()

    async def pull(self, wait_s: float) -> Delivery | None:
        if not self._opened:
            await self.open()
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[_Delivery | None] = loop.create_future()
        self._waiting[waiting] = None
        self._ask_soon()
        over = loop.call_later(wait_s, _give_up, waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            came = None if waiting.cancelled() else waiting.result()
            if came is not None:  # as this pull was cancelled
                self._start(came.refuse)
            raise
        finally:
            over.cancel()
            self._waiting.pop(waiting, None)

    def again(self) -> None:
        """The broker came back: whatever was asked is lost."""
        for consumer in self._consumers:
            consumer.until.clear()
        self._ask_soon()

    def _ask_soon(self) -> None:
        """Ask at the loop's next turn, together with the other pulls of this one."""
        if not self._asking:
            self._asking = True
            asyncio.get_running_loop().call_soon(self._ask)

    def _ask(self) -> None:
        """Let each consumer have about as many open requests as there are pulls that wait."""
        self._asking = False
        if not self._waiting:
            return
        now = self._clock()
        for consumer in self._consumers:
            while consumer.until and consumer.until[0] < now:
                consumer.until.popleft()
            more = len(self._waiting) - len(consumer.until)
            if more > 0 and more >= len(self._waiting) // ASK_SHARE:
                consumer.until.extend([now + PULL_S + PULL_GRACE_S] * more)
                self._start(functools.partial(self._request, consumer, more))
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_ASK_EVERY_S, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        self._ask()

    async def _request(self, consumer: _Consumer, count: int) -> None:
        ask = msgspec.json.encode({"batch": count, "expires": int(PULL_S * 1e9)})
        verb = f"$JS.API.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.settings['name']}"
        await self._link.publish(verb, ask, reply=consumer.inbox)

    def _taker(self, consumer: _Consumer) -> Callable[[Incoming], None]:
        def take(reply: Incoming) -> None:
            status = reply.status
            # A request that ends unfulfilled says how many of its messages did not come.
            used = int(reply.headers.get("Nats-Pending-Messages", "1")) if status else 1
            for _ in range(min(used, len(consumer.until))):
                consumer.until.popleft()
            if status == "503":
                consumer.until.clear()
                self._start(lambda: self._make_again(consumer))
            elif status:
                self._ask_soon()
            else:
                self._hand_out(reply)

        return take

    def _hand_out(self, reply: Incoming) -> None:
        job, spec = self._layout.job_of_hint(reply.subject)
        deliveries, seq, stored = _delivered(reply.reply)
        if not is_id(job):  # anybody who may say `ready` may have said it
            self._start(_Delivery(self._link, job, spec_entry=None, reply=reply.reply).ack)
            return
        first = spec and deliveries == 1 and self._layout.begins(reply.subject, reply.headers)
        origin = self._layout.origin_of_message(reply.subject)
        spec_entry = Entry(seq=seq, data=reply.data, origin=origin, stored=stored) if first else None
        delivery = _Delivery(self._link, job, spec_entry=spec_entry, reply=reply.reply)
        while self._waiting:
            waiting, _ = self._waiting.popitem(last=False)
            if not waiting.done():
                waiting.set_result(delivery)
                return
        self._start(delivery.refuse)

    async def _make(self, consumer: _Consumer) -> None:
        await make_consumer(self._link, consumer.stream, consumer.settings)

    async def _make_again(self, consumer: _Consumer) -> None:
        """The consumer is gone, or the broker is still on its way up."""
        await asyncio.sleep(NO_CONSUMER_PAUSE_S)
        if self._maintains:
            await self._make(consumer)
        self._ask_soon()

    def _start(self, step: Callable[[], Awaitable[None]]) -> None:
        self._tasks.start(_best_effort(step))


def _give_up(waiting: asyncio.Future[_Delivery | None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


async def make_consumer(link: Link, stream: str, settings: dict[str, Any]) -> None:
    """Make a consumer, or bring it up to date. Where one begins stays. Raises StoreUnavailable."""
    verb = f"CONSUMER.DURABLE.CREATE.{stream}.{settings['name']}"
    try:
        await link.api(verb, stream_name=stream, config=settings)
    except ApiError as refused:
        if refused.code != BEGINS_ELSEWHERE:
            raise
        there = (await link.api(f"CONSUMER.INFO.{stream}.{settings['name']}"))["config"]
        begin = {key: there[key] for key in ("deliver_policy", "opt_start_seq") if key in there}
        await link.api(verb, stream_name=stream, config=settings | begin)


class NatsHints:
    """The port `mvmci.store.Hints`. One that `maintains` makes the consumers of the queues it pulls from."""

    def __init__(self, link: Link, layout: Layout, lapse_s: float, *, maintains: bool) -> None:
        self._link = link
        self._maintains = maintains
        self._layout = layout
        self._lapse_s = lapse_s
        self._queues: dict[str, _Queue] = {}
        link.on_reconnect.append(self._again)

    async def ready(self, queue: str, job: str) -> int:
        answer = await self._link.request(self._layout.ready(queue, job))
        return int(answer["seq"])

    async def delivered(self, queue: str) -> Delivered | None:
        """How far the consumers of `queue` are; None when they are not there. Raises StoreUnavailable."""
        try:
            spec, ready = [
                await self._link.api(f"CONSUMER.INFO.{stream}.{settings['name']}")
                for stream, settings in self._layout.consumers(queue, self._lapse_s)
            ]
        except ApiError:
            return None
        return Delivered(
            spec=spec["delivered"]["stream_seq"],
            ready=ready["delivered"]["stream_seq"],
            waiting=ready["num_pending"],
        )

    async def timer(self, queue: str, job: str, at_ms: int) -> None:
        at = datetime.fromtimestamp(math.ceil(at_ms / 1000), UTC)
        headers = {
            "Nats-Schedule": f"@at {at:%Y-%m-%dT%H:%M:%SZ}",
            "Nats-Schedule-Target": self._layout.ready(queue, job),
        }
        await self._link.request(self._layout.timer(queue, job), headers=headers)

    async def pull(self, queue: str, *, wait_s: float) -> Delivery | None:
        if queue not in self._queues:
            consumers = [
                _Consumer(stream, settings)
                for stream, settings in self._layout.consumers(queue, self._lapse_s)
            ]
            self._queues[queue] = _Queue(self._link, self._layout, consumers, self._maintains)
        return await self._queues[queue].pull(wait_s)

    async def close(self) -> None:
        for queue in self._queues.values():
            await queue.close()

    def _again(self) -> None:
        for queue in self._queues.values():
            queue.again()


async def _best_effort(step: Callable[[], Awaitable[None]]) -> None:
    """A hint may be lost, and whoever waits for one asks again."""
    try:
        await step()
    except MvmciError:  # also where the link is over: whoever watches it ends this unit
        pass


def _delivered(reply: str) -> tuple[int, int, int]:
    """How often a message was delivered, its sequence, and when it was stored, in ns since 1970.

    By `$JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<deliveries>.<sequence>.<of the consumer>.<stored>.…`
    (NATS ADR-15).
    """
    tokens = reply.split(".")
    at = 4 if len(tokens) == 9 else 6
    return int(tokens[at]), int(tokens[at + 1]), int(tokens[at + 3])
