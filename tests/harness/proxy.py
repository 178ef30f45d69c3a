"""A proxy between units and their broker: it cuts, swallows, holds up and delays what passes.

    cut        both ends of every connection are reset at once
    hole       nothing passes any more, and nobody is told; when it is closed again, what was held
               back arrives late, as after a packet was sent again
    deafen     the same for answers alone: requests land, and nobody hears of it
    delay_s    each piece takes so much longer, and what is behind it waits
    latency_s  each piece comes so much later, as over a longer line: nothing waits behind it
    rate       bytes a second that pass each way, where it is set

What was held back when a connection is cut is lost. `mischief` does all of it at random.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

PIECE_BYTES = 64 << 10
MISCHIEF = ("cut", "hole", "deafen", "hole and cut", "deafen and cut", "delay")


class _Way:
    """One direction of all connections."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.held = bytearray()  # what came while it was closed
        self.news = asyncio.Event()

    def close(self) -> None:
        self.held.clear()
        self.open.clear()

    def take(self, piece: bytes) -> None:
        if not self.open.is_set():
            self.held += piece
            self.news.set()


class Proxy:
    """Listens on the loopback, and passes everything on to `target`."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self.connections: set[asyncio.Task[None]] = set()
        self._requests = _Way()
        self._answers = _Way()
        self.delay_s = 0.0
        self.latency_s = 0.0
        self.rate = 0.0
        self.counts: Counter[str] = Counter()
        self.url = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._begin, "127.0.0.1", 0)
        self.url = f"{self._target.scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self.connections, return_exceptions=True)
            await server.wait_closed()

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        for connection in self.connections:
            connection.cancel()

    def hole(self) -> None:
        """Let nothing pass, in either direction."""
        self._requests.close()
        self._answers.close()

    def deafen(self) -> None:
        """Let no answer pass."""
        self._answers.close()

    def heal(self) -> None:
        """Let everything pass, also what was held back."""
        self.delay_s = 0.0
        self._requests.open.set()
        self._answers.open.set()

    async def until_held(self, request: str) -> None:
        """Wait until a request that has `request` in it is held back."""
        way = self._requests
        while request.encode() not in way.held:
            way.news.clear()
            await way.news.wait()

    async def mischief(self, dice: random.Random, *, quiet_s: float, longest_s: float) -> None:
        """Now this and now that, with pauses of up to `quiet_s`, until cancelled; then all is well."""
        try:
            while True:
                await asyncio.sleep(dice.uniform(0.1, quiet_s))
                await self._do(dice.choice(MISCHIEF), dice.uniform(0.1, longest_s))
        finally:
            self.heal()

    async def unplug(self, seconds: float) -> None:
        """A hole that lasts."""
        try:
            await self._do("long hole", seconds)
        finally:
            self.heal()

    async def _do(self, what: str, seconds: float) -> None:
        self.counts[what] += 1
        if what == "delay":
            self.delay_s = seconds / 20
        elif "hole" in what:
            self.hole()
        elif "deafen" in what:
            self.deafen()
        if what != "cut":
            await asyncio.sleep(seconds)
        if "cut" in what:
            self.cut()
        self.heal()

    async def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            await self._serve(reader, writer)
        except (asyncio.CancelledError, OSError):
            pass  # it was cut, or the broker is not there
        finally:
            self.connections.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self._target.hostname, self._target.port)
        passing = [
            asyncio.ensure_future(part)
            for way, source, sink in (
                (self._requests, reader, there[1]),
                (self._answers, there[0], writer),
            )
            for part in self._pass(way, source, sink)
        ]
        try:
            await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in passing:
                part.cancel()
            await asyncio.gather(*passing, return_exceptions=True)
            there[1].transport.abort()

    def _pass(
        self, way: _Way, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> tuple[Coroutine[Any, Any, None], ...]:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def read() -> None:
            with suppress(OSError):
                while piece := await source.read(PIECE_BYTES):
                    way.take(piece)
                    pieces.put_nowait((time.monotonic() + self.latency_s, piece))

        async def write() -> None:
            with suppress(OSError):
                while True:
                    due, piece = await pieces.get()
                    await asyncio.sleep(due - time.monotonic())
                    await way.open.wait()
                    if self.delay_s:
                        await asyncio.sleep(self.delay_s)
                    if self.rate:
                        await asyncio.sleep(len(piece) / self.rate)
                    sink.write(piece)
                    await sink.drain()

        return read(), write()
