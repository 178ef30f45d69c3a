"""What jobs print, in a stream that forgets by age and size.

New lines are heard as plain messages as well, but only what the stream gives is believed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from mvmci.store import Chunk
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link

_CHUNKS_IN_FLIGHT = 64

_chunks = msgspec.json.Decoder(Chunk)
_encode = msgspec.json.Encoder().encode


class NatsLogs:
    """The port `mvmci.store.Logs`."""

    def __init__(self, link: Link, layout: Layout) -> None:
        self._link = link
        self._layout = layout

    async def append(self, job: str, queue: str, chunks: Sequence[Chunk]) -> None:
        subject = self._layout.log(job, queue)
        for start in range(0, len(chunks), _CHUNKS_IN_FLIGHT):
            group = chunks[start : start + _CHUNKS_IN_FLIGHT]
            await self._link.request_all(subject, [_encode(chunk) for chunk in group])

    async def read(self, job: str) -> list[Chunk]:
        stored = self._link.read(self._layout.logs, self._layout.log_of(job))
        return [_chunks.decode(message.data) async for message in stored]

    async def follow(self, job: str) -> AsyncGenerator[Chunk, None]:
        subject = self._layout.log_of(job)
        following = self._link.follow(self._layout.logs, subject, self._layout.stored(subject))
        async with aclosing(following) as messages:
            async for message in messages:
                yield _chunks.decode(message.data)
