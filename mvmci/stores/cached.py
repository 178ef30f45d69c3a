"""Blobs that were fetched once lie on this host's disk, so that the same tree is not fetched for each job.

    <folder>/<xx>/<hex>     a blob by its SHA-256; the time of its file is that of its last use
    <folder>/.<token>       one on its way in, or what a process left that died

A wrapper around the port `mvmci.store.Blobs`: what is there, and what is missing, is for the store
behind it to say; only reading is answered from here. Bytes are checked against their digest whenever
they are read. Files appear whole, by rename, and are never changed, so that several processes may
share a folder without a lock: one that removes a file takes nothing from one that is reading it.

The folder stays about as small as `bytes_max`: each process looks at all of it whenever it has added a
part in `LOOK_SHARE` of that, and removes what was not used for longest. A disk that is full, or a
folder that cannot be written, makes nothing fail: then blobs are fetched as if there were no cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path

from mvmci.jobs.job import is_digest
from mvmci.store import Blobs, digest_of
from mvmci.system.files import private_opener

LOOK_SHARE = 16
KEEP_PERCENT = 90  # of `bytes_max`, after a look that found too much
BLOB_SHARE = 4  # a blob over a part in so many of `bytes_max` would push out too much else
USED_S = 60.0  # a use within so long of the last one is not noted
DRAFT_S = 3600.0  # a file on its way in that is older has nobody any more
BLOCK_BYTES = 4096  # what the smallest file takes
COPY_BYTES = 1 << 20


class CachedBlobs:
    """The port `mvmci.store.Blobs`, in front of `blobs`."""

    def __init__(self, blobs: Blobs, folder: Path, bytes_max: int) -> None:
        self._blobs = blobs
        self._folder = folder
        self._bytes_max = bytes_max
        self._unseen = bytes_max  # bytes added since the last look: the first addition is followed by one
        self._looking = threading.Lock()

    async def put(self, data: bytes) -> str:
        return await self._blobs.put(data)

    async def put_file(self, path: Path) -> str:
        return await self._blobs.put_file(path)

    async def has(self, digest: str) -> bool:
        return await self._blobs.has(digest)

    async def missing(self, digests: Collection[str]) -> set[str]:
        return await self._blobs.missing(digests)

    async def get(self, digest: str) -> bytes:
        kept = await asyncio.to_thread(self._read, digest)
        if kept is not None:
            return kept
        data = await self._blobs.get(digest)
        await asyncio.to_thread(self._keep, digest, len(data), iter([data]))
        return data

    async def fetch(self, digest: str, to: Path) -> None:
        if await asyncio.to_thread(self._copy, digest, to):
            return
        await self._blobs.fetch(digest, to)
        await asyncio.to_thread(self._keep_file, digest, to)

    def _read(self, digest: str) -> bytes | None:
        """The bytes, if they lie here."""
        with self._kept(digest) as file:
            data = file.read() if file is not None else None
        if data is not None and digest_of(data) != digest:
            self._forget(digest)
            return None
        return data

    def _copy(self, digest: str, to: Path) -> bool:
        """Write a new file at `to`, if the bytes lie here."""
        with self._kept(digest) as kept:
            if kept is None:
                return False
            hashed = hashlib.sha256()
            try:
                with open(to, "xb", opener=private_opener) as file:
                    while piece := kept.read(COPY_BYTES):
                        hashed.update(piece)
                        file.write(piece)
            except FileExistsError:
                raise
            except OSError:
                to.unlink(missing_ok=True)
                raise
        if f"sha256:{hashed.hexdigest()}" == digest:
            return True
        to.unlink()
        self._forget(digest)
        return False

    @contextlib.contextmanager
    def _kept(self, digest: str) -> Iterator[BufferedReader | None]:
        """The file of a blob, its use noted; None if there is none."""
        try:
            file = open(self._path(digest), "rb")  # noqa: SIM115 (closed below)
        except OSError:
            yield None
            return
        with file:
            if time.time() - os.fstat(file.fileno()).st_mtime > USED_S:
                with contextlib.suppress(OSError):
                    os.utime(file.fileno())
            yield file

    def _keep_file(self, digest: str, path: Path) -> None:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._keep(digest, size, iter(lambda: file.read(COPY_BYTES), b""))

    def _keep(self, digest: str, size: int, pieces: Iterator[bytes]) -> None:
        """Keep a copy, if it is not too large and there is room on the disk."""
        if size > self._bytes_max // BLOB_SHARE:
            return
        path = self._path(digest)
        draft = self._folder / f".{secrets.token_hex(8)}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with open(draft, "xb", opener=private_opener) as file:
                file.writelines(pieces)
            draft.rename(path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
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
        for path in self._folder.rglob("*"):
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

    def _forget(self, digest: str) -> None:
        """The disk has damaged it: it is fetched again."""
        with contextlib.suppress(OSError):
            self._path(digest).unlink()

    def _path(self, digest: str) -> Path:
        """Where a blob lies; somewhere where nothing is for what cannot be a digest."""
        name = digest.removeprefix("sha256:") if is_digest(digest) else "none"
        return self._folder / name[:2] / name
