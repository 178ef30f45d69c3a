"""The way to executors through the broker: both sides only dial out, no port is open, and NAT is fine.

    <cluster>.engine.<worker>.<order>   orders, to a queue group: in it are only executors with a free slot
    <cluster>.ping.<worker>.<order>  where none is: whether there are executors at all
    <cluster>.reply.<worker>.<order>     words about an order
    <cluster>.room                      an executor has a free slot again

Where no executor listens, the broker says so at once. An executor answers on `told` alone and never to
the address that a message brings, so that nobody can have it write where it may and he may not.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from mvmci.engines.remote import BUSY, Failed, Finished, NoCapacity, Rejected, Reply, RunRequest
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link, NoStream, Unsubscribe
from mvmci.stores.nats.parser import Incoming

_TAKEN_WITHIN_S = 2.0  # an order that was sent to an executor which died may never be answered
_TRIES_MAX = 4  # when one that has just become full answers: the next is another one, or nobody
_NOBODY = "no executor is there"

_words = msgspec.json.Decoder(Reply)
_encode = msgspec.json.Encoder().encode


class BrokerTransport:
    """The port `mvmci.engines.remote.Transport` of one worker."""

    def __init__(self, link: Link, layout: Layout, unit: str) -> None:
        self._link = link
        self._layout = layout
        self._unit = unit
        self._orders: dict[str, asyncio.Queue[Reply | None]] = {}  # None: nothing more will be heard
        self._room = asyncio.Event()
        self._leaving: list[Unsubscribe] = []

    async def open(self) -> None:
        """Raises StoreUnavailable."""
        told = self._layout.reply(self._unit, "*")
        self._leaving.append(await self._link.subscribe(told, self._hear))
        self._leaving.append(await self._link.subscribe(self._layout.room(), lambda _: self._make_room()))

    def room(self) -> asyncio.Event:
        return self._room

    @contextlib.asynccontextmanager
    async def send(self, order: RunRequest) -> AsyncGenerator[AsyncIterator[Reply]]:
        number = secrets.token_hex(8)
        words = self._orders[number] = asyncio.Queue()
        try:
            for _ in range(_TRIES_MAX):
                first = await self._first(order, number, words)
                if not isinstance(first, Rejected):
                    break
            else:
                raise NoCapacity(BUSY)
            yield _iterate(first, words)
        finally:
            del self._orders[number]

    async def _first(
        self, order: RunRequest, number: str, words: asyncio.Queue[Reply | None]
    ) -> Reply | None:
        """What an executor says to the order; None: nothing. Raises NoCapacity, StoreUnavailable."""
        try:
            return await self._ask(self._layout.engine(order.worker, number), _encode(order), words)
        except NoStream:
            pass  # because all are at work, or because there is nobody
        try:
            await self._ask(self._layout.ping(order.worker, number), b"", words)
        except NoStream:
            raise NoCapacity(_NOBODY) from None
        raise NoCapacity(BUSY)

    async def _ask(self, subject: str, data: bytes, words: asyncio.Queue[Reply | None]) -> Reply | None:
        """The first word of whoever listens on `subject`; None: it is lost. Raises NoStream."""
        to, refused = self._link.expect()
        refused.add_done_callback(lambda answer: None if answer.cancelled() else words.put_nowait(None))
        try:
            await self._link.publish(subject, data, reply=to)
            async with asyncio.timeout(_TAKEN_WITHIN_S):
                word = await words.get()
            if word is None and refused.done():
                refused.result()
            return word
        except TimeoutError:
            return None
        finally:
            refused.cancel()

    def disconnect(self) -> None:
        for words in self._orders.values():
            words.put_nowait(None)
        self._make_room()

    async def close(self) -> None:
        for leave in self._leaving:
            await leave()

    def _hear(self, told: Incoming) -> None:
        words = self._orders.get(told.subject.rpartition(".")[2])
        if words is not None:
            with contextlib.suppress(msgspec.DecodeError):  # a newer version's: the journal will tell
                words.put_nowait(_words.decode(told.data))

    def _make_room(self) -> None:
        self._room.set()
        self._room = asyncio.Event()


async def _iterate(first: Reply | None, words: asyncio.Queue[Reply | None]) -> AsyncIterator[Reply]:
    word = first
    while word is not None:
        yield word
        word = await words.get() if not isinstance(word, Finished | Failed) else None
