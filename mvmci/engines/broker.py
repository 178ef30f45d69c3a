"""The way to executors through the broker: both sides only dial out, no port is open, and NAT is fine.

    <cluster>.engine.<worker>.<request>   requests, to a queue group of the executors that have a free slot
    <cluster>.ping.<worker>.<request>     where none is: whether there are executors at all
    <cluster>.reply.<worker>.<request>    replies to a request
    <cluster>.capacity                    an executor has a free slot again

Where no executor listens, the broker says so at once. An executor answers on `reply` alone and never to
the address that a message brings, so that nobody can have it write where it may and he may not.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from mvmci.engine import Outcome
from mvmci.engines.remote import BUSY, NEWER, Failed, NoCapacity, Rejected, Reply, RunRequest, read_reply
from mvmci.errors import MvmciError, VersionsDiffer
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link, NoStream, Unsubscribe
from mvmci.stores.nats.parser import Incoming
from mvmci.wire import HINT

_REPLY_WITHIN_S = 2.0  # a request that was sent to an executor which died may never be answered
_TRIES_MAX = 4  # when one that has just become full answers, or is older: the next is another one, or nobody
_NO_EXECUTOR = "no executor is there"

_encode = msgspec.json.Encoder().encode


class BrokerTransport:
    """The port `mvmci.engines.remote.Transport` of one worker."""

    def __init__(self, link: Link, layout: Layout, unit: str) -> None:
        self._link = link
        self._layout = layout
        self._unit = unit
        self._requests: dict[str, asyncio.Queue[Reply | None]] = {}  # None: nothing more will come
        self._capacity = asyncio.Event()
        self._leaving: list[Unsubscribe] = []

    async def open(self) -> None:
        """Raises StoreUnavailable."""
        replies, capacity = self._layout.reply(self._unit, "*"), self._layout.capacity()
        self._leaving.append(await self._link.subscribe(replies, self._on_reply))
        self._leaving.append(await self._link.subscribe(capacity, lambda _: self._on_capacity()))

    def capacity(self) -> asyncio.Event:
        return self._capacity

    @contextlib.asynccontextmanager
    async def send(self, request: RunRequest) -> AsyncGenerator[AsyncIterator[Reply]]:
        number = secrets.token_hex(8)
        replies = self._requests[number] = asyncio.Queue()
        try:
            refusal: MvmciError = NoCapacity(BUSY)
            for _ in range(_TRIES_MAX):
                first = await self._first(request, number, replies)
                if isinstance(first, Failed) and first.why == NEWER:
                    refusal = VersionsDiffer(first.message, hint=HINT)
                elif not isinstance(first, Rejected):
                    break
            else:
                raise refusal
            yield _iterate(first, replies)
        finally:
            del self._requests[number]

    async def _first(
        self, request: RunRequest, number: str, replies: asyncio.Queue[Reply | None]
    ) -> Reply | None:
        """What an executor replies to the request; None: nothing. Raises NoCapacity, StoreUnavailable."""
        try:
            return await self._ask(self._layout.engine(request.worker, number), _encode(request), replies)
        except NoStream:
            pass  # because all are at work, or because there is nobody
        await self._ping(number, replies)
        raise NoCapacity(BUSY)

    async def _ping(self, number: str, replies: asyncio.Queue[Reply | None]) -> bool:
        """Whether an executor replied. Raises NoCapacity where there is none."""
        try:
            return await self._ask(self._layout.ping(self._unit, number), b"", replies) is not None
        except NoStream:
            raise NoCapacity(_NO_EXECUTOR) from None

    async def probe(self) -> bool:
        number = secrets.token_hex(8)
        self._requests[number] = asyncio.Queue()
        try:
            return await self._ping(number, self._requests[number])
        finally:
            del self._requests[number]

    async def _ask(self, subject: str, data: bytes, replies: asyncio.Queue[Reply | None]) -> Reply | None:
        """The first reply of whoever listens on `subject`; None: none came. Raises NoStream."""
        to, refused = self._link.expect()
        refused.add_done_callback(lambda answer: None if answer.cancelled() else replies.put_nowait(None))
        try:
            await self._link.publish(subject, data, reply=to)
            async with asyncio.timeout(_REPLY_WITHIN_S):
                reply = await replies.get()
            if reply is None and refused.done():
                refused.result()
            return reply
        except TimeoutError:
            return None
        finally:
            refused.cancel()

    def disconnect(self) -> None:
        for replies in self._requests.values():
            replies.put_nowait(None)
        self._on_capacity()

    async def close(self) -> None:
        for leave in self._leaving:
            await leave()

    def _on_reply(self, message: Incoming) -> None:
        replies = self._requests.get(message.subject.rpartition(".")[2])
        if replies is not None:
            replies.put_nowait(read_reply(message.data))

    def _on_capacity(self) -> None:
        self._capacity.set()
        self._capacity = asyncio.Event()


async def _iterate(first: Reply | None, replies: asyncio.Queue[Reply | None]) -> AsyncIterator[Reply]:
    reply = first
    while reply is not None:
        yield reply
        reply = await replies.get() if not isinstance(reply, Outcome | Failed) else None
