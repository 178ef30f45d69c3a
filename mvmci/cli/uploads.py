"""Blobs that say on a terminal how much of an upload has been sent."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import BinaryIO

import click

from mvmci.config.quantity import rough_size
from mvmci.store import Blobs, Source, digest_of
from mvmci.system.tasks import cancel

EVERY_S = 1.0


class Uploads:
    """The port `mvmci.store.Blobs`, in front of `blobs`: what takes more than a moment to put is told.

    That is one line on stderr, which is written again and again.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._sent = 0

    async def put(self, data: bytes) -> str:
        digest = digest_of(data)
        if not await self._blobs.has(digest):
            await self.put_all({digest: Source(len(data), lambda: io.BytesIO(data))})
        return digest

    async def put_file(self, path: Path) -> str:
        return await self._blobs.put_file(path)

    async def put_all(self, sources: Mapping[str, Source]) -> set[str]:
        total = self._sent + sum(source.size for source in sources.values())
        telling = asyncio.create_task(self._tell(total))
        try:
            return await self._blobs.put_all(
                {digest: Source(one.size, self._counted(one.open)) for digest, one in sources.items()}
            )
        finally:
            await cancel(telling)

    async def has(self, digest: str) -> bool:
        return await self._blobs.has(digest)

    async def missing(self, digests: Collection[str]) -> set[str]:
        return await self._blobs.missing(digests)

    async def get(self, digest: str) -> bytes:
        return await self._blobs.get(digest)

    async def fetch(self, digest: str, to: Path) -> None:
        await self._blobs.fetch(digest, to)

    def _counted(self, open_it: Callable[[], BinaryIO]) -> Callable[[], BinaryIO]:
        def count(size: int) -> None:
            self._sent += size

        return lambda: _Counted(open_it(), count)

    async def _tell(self, total: int) -> None:
        shown = False
        try:
            while True:
                await asyncio.sleep(EVERY_S)
                line = f"uploading: {rough_size(self._sent)} of at most {rough_size(total)}"
                click.echo(f"\r{line:<60}", err=True, nl=False)
                shown = True
        finally:
            if shown:
                click.echo(err=True)


class _Counted(io.BufferedReader):
    def __init__(self, file: BinaryIO, count: Callable[[int], None]) -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self._count = count

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._count(len(data))
        return data
