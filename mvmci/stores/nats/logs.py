"""What jobs print, in a stream that forgets by age and size.

New lines are heard as plain messages as well, but only what the stream gives is believed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from mvmci.store import Chunk
from mvmci.stores.nats.layout import Layout
from mvmci.stores.nats.link import Link, Stored

log = logging.getLogger(__name__)
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
        subject = await self._subject(job)
        stored = [message async for message in self._link.read(self._layout.logs, subject)]
        return [chunk for message in stored if (chunk := _chunk(job, message)) is not None]

    async def follow(self, job: str) -> AsyncGenerator[Chunk, None]:
        subject = await self._subject(job)
        following = self._link.follow(self._layout.logs, subject, self._layout.stored("log", job))
        async with aclosing(following) as messages:
            async for message in messages:
                if (chunk := _chunk(job, message)) is not None:
                    yield chunk

    async def _subject(self, job: str) -> str:
        """Where the job's own holders print: who has another queue may write under its id as well."""
        first = await self._link.first(self._layout.jobs, self._layout.journal(job))
        if first is None:
            return self._layout.log_of(job)
        return self._layout.log(job, self._layout.origin_of_message(first.subject).queue)


def _chunk(job: str, message: Stored) -> Chunk | None:
    """A piece of output; one that is none is told of, and nothing else is kept back for it."""
    try:
        return _chunks.decode(message.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        log.warning("a piece of the output of %s cannot be read (sequence %d)", job, message.seq)
        return None
