"""Blobs that were fetched once lie on this host's disk, so that the same tree is not fetched for each job.

A wrapper around the port `mvmci.store.Blobs`: what is there, and what is missing, is for the store
behind it to say; only reading is answered from here. The files are those of `blob_folder`, and their time
is that of their last use.

The folder stays about as small as `bytes_max`: each process looks at all of it whenever it has added a
part in `LOOK_SHARE` of that, and removes what was not used for longest. A disk that is full, or a
folder that cannot be written, makes nothing fail: then blobs are fetched as if there were no cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from mvmci.errors import NotFound
from mvmci.store import Blobs, Source
from mvmci.stores.blob_folder import BlobFolder, pieces_of, write_new
from mvmci.system.tasks import in_thread

LOOK_SHARE = 16
KEEP_PERCENT = 90  # of `bytes_max`, after a look that found too much
BLOB_SHARE = 4  # a blob over a part in so many of `bytes_max` would push out too much else
USED_S = 60.0  # a use within so long of the last one is not noted
DRAFT_S = 3600.0  # a file on its way in that is older has nobody any more
BLOCK_BYTES = 4096  # what the smallest file takes


class CachedBlobs:
    """The port `mvmci.store.Blobs`, in front of `blobs`."""

    def __init__(self, blobs: Blobs, folder: Path, bytes_max: int) -> None:
        self._blobs = blobs
        self._files = BlobFolder(folder)
        self._bytes_max = bytes_max
        self._unseen = bytes_max  # bytes added since the last look: the first addition is followed by one
        self._looking = threading.Lock()

    async def put(self, data: bytes) -> str:
        return await self._blobs.put(data)

    async def put_file(self, path: Path) -> str:
        return await self._blobs.put_file(path)

    async def put_all(self, sources: Mapping[str, Source]) -> set[str]:
        return await self._blobs.put_all(sources)

    async def has(self, digest: str) -> bool:
        return await self._blobs.has(digest)

    async def missing(self, digests: Collection[str]) -> set[str]:
        return await self._blobs.missing(digests)

    async def get(self, digest: str) -> bytes:
        kept = await asyncio.to_thread(self._read, digest)
        if kept is not None:
            return kept
        data = await self._blobs.get(digest)
        await asyncio.to_thread(self._keep, len(data), iter([data]))
        return data

    async def fetch(self, digest: str, to: Path) -> None:
        if await in_thread(self._copy, digest, to):
            return
        await self._blobs.fetch(digest, to)
        await asyncio.to_thread(self._keep_file, to)

    def _read(self, digest: str) -> bytes | None:
        """The bytes, if they lie here."""
        pieces = self._pieces(digest)
        with contextlib.suppress(NotFound):  # the disk has damaged it: it is fetched again
            return None if pieces is None else b"".join(pieces)
        return None

    def _copy(self, digest: str, to: Path) -> bool:
        """Write a new file at `to`, if the bytes lie here."""
        pieces = self._pieces(digest)
        if pieces is None:
            return False
        with contextlib.suppress(NotFound):
            write_new(to, pieces)
            return True
        return False

    def _pieces(self, digest: str) -> Iterator[bytes] | None:
        """A blob that lies here, its use noted."""
        try:
            path = self._files.path(digest)
        except NotFound:
            return None
        if not os.access(path, os.R_OK):
            return None
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > USED_S:
                os.utime(path)
        return self._files.read(digest)

    def _keep_file(self, path: Path) -> None:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            self._keep(os.fstat(file.fileno()).st_size, pieces_of(file))

    def _keep(self, size: int, pieces: Iterator[bytes]) -> None:
        """Keep a copy, if it is not too large and there is room on the disk."""
        if size > self._bytes_max // BLOB_SHARE:
            return
        try:
            self._files.keep(pieces)
        except OSError:
            return
        self._unseen += max(size, BLOCK_BYTES)
        if self._unseen >= self._bytes_max // LOOK_SHARE and self._looking.acquire(blocking=False):
            try:
                self._unseen = 0
                self._make_room()
            finally:
                self._looking.release()

    def _make_room(self) -> None:
        """Remove what was not used for longest, if there is too much."""
        files: list[tuple[float, int, Path]] = []
        now = time.time()
        for path in self._files.folder.rglob("*"):
            with contextlib.suppress(OSError):  # another process has removed it
                found = path.lstat()
                if stat.S_ISDIR(found.st_mode):
                    continue
                if path.name.startswith(".") and now - found.st_mtime > DRAFT_S:
                    path.unlink()
                    continue
                files.append((found.st_mtime, max(found.st_size, BLOCK_BYTES), path))
        size = sum(bytes_ for _, bytes_, _ in files)
        if size <= self._bytes_max:
            return
        for _, bytes_, path in sorted(files):
            if size <= self._bytes_max * KEEP_PERCENT // 100:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            size -= bytes_
