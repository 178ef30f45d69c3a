"""Hints in JetStream: two durable pull consumers a queue, on the specs and on the `ready` words.

Pulls that wait ask both consumers for one message each, for `PULL_S` at most: a request that spans a
restart of the broker is lost, and is made again. Requests outlive the pull that made them and serve the next
one; a hint that comes when nobody waits goes back at once, for somebody else.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from mvmci.errors import StoreUnavailable
from mvmci.journal import Entry
from mvmci.store import Delivery
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link, NoStream, Refused, Reply, Unsubscribe

PULL_S = 5.0
PULL_GRACE_S = 1.0  # a request without a word for so much longer than it lives is lost
NO_CONSUMER_PAUSE_S = 0.5


class _Delivery:
    def __init__(self, link: Link, job: str, *, first: Entry | None, reply: str) -> None:
        self.job = job
        self.first = first
        self._link = link
        self._reply = reply

    async def ack(self) -> None:
        await self._link.publish(self._reply, b"+ACK")

    async def keep(self) -> None:
        await self._link.publish(self._reply, b"+WPI")

    async def later(self, wait_s: float) -> None:
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
        self._waiting: deque[asyncio.Future[_Delivery]] = deque()
        self._unsubscribe: list[Unsubscribe] = []
        self._tasks: set[asyncio.Task[None]] = set()
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
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for unsubscribe in self._unsubscribe:
            await unsubscribe()

    async def pull(self, wait_s: float) -> Delivery | None:
        await self.open()
        until = self._clock() + wait_s
        waiting: asyncio.Future[_Delivery] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        taken = False
        try:
            while (left := until - self._clock()) > 0:
                await self._ask(min(left, PULL_S))
                await asyncio.wait([waiting], timeout=min(left, PULL_S))
                if waiting.done():
                    taken = True
                    return waiting.result()
            return None
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not taken:  # it came as this pull was cancelled
                self._start(waiting.result().refuse)

    def again(self) -> None:
        """The broker came back: whatever was asked is lost."""
        for consumer in self._consumers:
            consumer.until.clear()
        if self._waiting:
            self._start(lambda: self._ask(PULL_S))

    async def _ask(self, live_s: float) -> None:
        """Let each consumer have as many open requests as there are pulls that wait."""
        now = self._clock()
        for consumer in self._consumers:
            while consumer.until and consumer.until[0] < now:
                consumer.until.popleft()
            more = len(self._waiting) - len(consumer.until)
            if more > 0:
                consumer.until.extend([now + live_s + PULL_GRACE_S] * more)
                ask = msgspec.json.encode({"batch": more, "expires": int(live_s * 1e9)})
                verb = f"$JS.API.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.settings['name']}"
                await self._link.publish(verb, ask, reply=consumer.inbox)

    def _taker(self, consumer: _Consumer) -> Callable[[Reply], None]:
        def take(reply: Reply) -> None:
            # A request that ends unfulfilled says how many of its messages did not come.
            for _ in range(min(int(reply.headers.get("Nats-Pending-Messages", "1")), len(consumer.until))):
                consumer.until.popleft()
            if reply.status == "503":
                consumer.until.clear()
                self._start(lambda: self._make_again(consumer))
            elif not reply.status:
                self._hand_out(reply)

        return take

    def _hand_out(self, reply: Reply) -> None:
        job, spec = self._layout.job_of_hint(reply.subject)
        deliveries, seq = _delivered(reply.reply)
        first = Entry(seq=seq, data=reply.data) if spec and deliveries == 1 else None
        delivery = _Delivery(self._link, job, first=first, reply=reply.reply)
        while self._waiting:
            waiting = self._waiting.popleft()
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
        if self._waiting:
            await self._ask(PULL_S)

    def _start(self, step: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(_best_effort(step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def make_consumer(link: Link, stream: str, settings: dict[str, Any]) -> None:
    """Make a consumer, or bring it up to date. Raises StoreUnavailable."""
    verb = f"CONSUMER.DURABLE.CREATE.{stream}.{settings['name']}"
    await link.api(verb, stream_name=stream, config=settings)


class Hints:
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
        except Refused:
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
    except (StoreUnavailable, NoStream):
        pass


def _delivered(reply: str) -> tuple[int, int]:
    """How often a message was delivered, and its sequence.

    By `$JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<deliveries>.<sequence>.…` (NATS ADR-15).
    """
    tokens = reply.split(".")
    at = 4 if len(tokens) == 9 else 6
    return int(tokens[at]), int(tokens[at + 1])
