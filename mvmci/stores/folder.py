"""A store in a folder, for one machine and no broker: that of `mvmci run`.

    <folder>/version                 what wrote it
    <folder>/jobs/<id>/journal       one message a line; an append is synced before it is acknowledged
    <folder>/jobs/<id>/log           one chunk a line
    <folder>/jobs/<id>/lock          held by the process that holds the job
    <folder>/blobs/                  see `blob_folder`

Several processes may share a folder: each append locks its journal, each holder locks its job, and
readers need no lock, because lines are only ever added. A last line without its end is a write that
was never acknowledged, and is cut off by the next one. There are no hints: with no cluster there is
nobody else to tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from io import FileIO
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from mvmci.config.quantity import rough_size
from mvmci.errors import Conflict, LockHeld, StoreFull, StoreUnavailable, Usage
from mvmci.jobs.journal import Entry, Lease, MessageKind
from mvmci.store import MESSAGE_BYTES_MAX, About, Chunk, Delivery, Member, Source, Store, digest_of
from mvmci.stores.blob_folder import BlobFolder, pieces_of, write_new
from mvmci.system import linux
from mvmci.system.files import private_folder, private_opener, sync_folder
from mvmci.system.tasks import at_most, in_thread

FOLDER_VERSION = "1"
LOOK_AT_FILE_S = 0.1  # how often a follower looks at a file that another process may be writing
PROBE_S = 0.3  # somebody who only asks whether a job is held has its lock for a moment

log = logging.getLogger(__name__)
_chunks = msgspec.json.Decoder(Chunk)
_encode = msgspec.json.Encoder().encode


class Folder:
    """What all units of this process share: the place itself. `store()` gives one unit its way in.

    One that is not to be made, and is not there, has no jobs. Raises Usage.
    """

    def __init__(self, folder: Path, *, make: bool = True) -> None:
        self.folder = folder
        if make or folder.exists():
            _prepare(folder)
        self.blobs = _Blobs(folder)
        self.journals = _Journals(folder, self.blobs)
        self.logs = _Logs(folder)
        self.members: dict[str, Member] = {}  # those of this process, by incarnation

    def store(self, unit: str) -> Store:
        """The store as a new incarnation of `unit` sees it."""
        presence = _Presence(self, unit)
        return Store(self.journals, _NoHints(), self.logs, self.blobs, presence, presence.leave)


def _prepare(folder: Path) -> None:
    try:
        private_folder(folder)
        version = folder / "version"
        if not version.exists():
            with open(version, "w", opener=private_opener) as file:
                file.write(FOLDER_VERSION + "\n")
        found = version.read_text().strip()
    except OSError as error:
        raise Usage(
            f"the state directory {folder} cannot be used: {error.strerror}",
            hint="name another one with --state DIR or MVMCI_STATE",
        ) from error
    if found != FOLDER_VERSION:
        raise Usage(
            f"the state directory {folder} is of version {found[:20]!r}, not {FOLDER_VERSION}",
            hint="name another one with --state DIR or MVMCI_STATE",
        )


class _Lines:
    """Lines that are only ever added to the file at `path`, also by others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[bytes] = []
        self._bytes = 0  # of the file, up to the end of the last complete line
        self._lock = threading.Lock()

    def read(self, after: int = 0) -> list[bytes]:
        """All lines but the first `after`."""
        with self._lock:
            with contextlib.suppress(FileNotFoundError), open(self._path, "rb", buffering=0) as file:
                self._catch_up(file)
            return self._lines[after:]

    def append(self, lines: Sequence[bytes], *, expect: int | None = None, sync: bool = False) -> None:
        """Add `lines`, if there are `expect` so far. Raises Conflict, StoreFull."""
        with self._lock:
            try:
                self._write(self._path, lines, expect, sync)
            except OSError as error:
                raise StoreFull(f"{self._path} cannot be written: {error.strerror}") from error

    def _write(self, path: Path, lines: Sequence[bytes], expect: int | None, sync: bool) -> None:
        assert not any(b"\n" in line for line in lines)
        private_folder(path.parent)
        # Without a buffer: what failed must not be written again at its close.
        with open(path, "ab+", buffering=0, opener=private_opener) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._catch_up(file)
            if expect is not None and len(self._lines) != expect:
                raise Conflict(f"the last message is {len(self._lines)}, not {expect}")
            first = not self._lines
            file.truncate(self._bytes)  # what stands behind it was never acknowledged
            try:
                left = memoryview(b"".join(line + b"\n" for line in lines))
                while left:
                    left = left[file.write(left) :]
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), self._bytes)  # or it would be read as if it were kept
                raise
            self._catch_up(file)
        if first and sync:
            sync_folder(path.parent)
            sync_folder(path.parent.parent)

    def _catch_up(self, file: FileIO) -> None:
        file.seek(self._bytes)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        self._lines += data[:whole].split(b"\n")[:-1]
        self._bytes += whole


class _Files:
    """The lines of one kind, one file a job."""

    def __init__(self, folder: Path, name: str) -> None:
        self._jobs = folder / "jobs"
        self._name = name
        self._files: dict[str, _Lines] = {}

    def of(self, job: str) -> _Lines:
        if job not in self._files:
            self._files[job] = _Lines(self._jobs / job / self._name)
        return self._files[job]

    def jobs(self) -> list[str]:
        return [path.parent.name for path in self._jobs.glob(f"*/{self._name}")]

    def newest(self) -> list[str]:
        """The jobs that have lines, the newest first: a job's folder gets no more files once it has begun.

        File systems tell times by the tick of a clock; within one, minted ids tell the order.
        """
        jobs = [job for job in self.jobs() if self.of(job).read()]
        return sorted(jobs, key=lambda job: ((self._jobs / job).stat().st_mtime_ns, job), reverse=True)


class _Journals:
    def __init__(self, folder: Path, blobs: _Blobs) -> None:
        self._files = _Files(folder, "journal")
        self._blobs = blobs
        self._appended = asyncio.Condition()

    async def read(self, job: str, after: int = 0) -> list[Entry]:
        lines = await asyncio.to_thread(self._files.of(job).read, after)
        return [Entry(seq=seq, data=line) for seq, line in enumerate(lines, after + 1)]

    async def first(self, job: str, seq: int) -> Entry | None:
        return next(iter(await self.read(job)), None) if seq == 1 else None

    async def append(
        self,
        job: str,
        kind: MessageKind,
        queue: str,
        data: bytes,
        *,
        expect: int,
        may_delay: bool = False,
    ) -> int:
        del kind, queue, may_delay  # there is nobody to tell, and nothing that could become durable together
        assert len(data) <= MESSAGE_BYTES_MAX
        await asyncio.to_thread(self._blobs.sync)  # what the message names is on disk before it
        await asyncio.to_thread(self._files.of(job).append, [data], expect=expect, sync=True)
        async with self._appended:
            self._appended.notify_all()
        return expect + 1

    async def follow(self, job: str, after: int = 0) -> AsyncGenerator[Entry, None]:
        while True:
            entries = await self.read(job, after)
            for entry in entries:
                yield entry
            after += len(entries)
            if not entries:
                await _wait_for(self._appended, LOOK_AT_FILE_S)

    async def jobs(self) -> AsyncIterator[str]:
        for name in await asyncio.to_thread(self._files.jobs):
            yield name

    async def newest(self) -> AsyncGenerator[tuple[str, list[Entry]], None]:
        for job in await asyncio.to_thread(self._files.newest):
            yield job, await self.read(job)

    async def all(self) -> AsyncIterator[tuple[str, Entry]]:
        async for job in self.jobs():
            for entry in await self.read(job):
                yield job, entry


class _NoHints:
    """Whoever runs a job here knows of it, and waits for its time itself."""

    async def ready(self, queue: str, job: str) -> int:
        return 0

    async def timer(self, queue: str, job: str, at_ms: int) -> None:
        pass

    async def pull(self, queue: str, *, wait_s: float) -> Delivery | None:
        await asyncio.sleep(wait_s)
        return None


async def _wait_for(condition: asyncio.Condition, wait_s: float) -> None:
    """Wait until somebody notifies `condition`, at most `wait_s`."""
    async with condition:
        await at_most(max(wait_s, 0.001), condition.wait())


class _Logs:
    def __init__(self, folder: Path) -> None:
        self._files = _Files(folder, "log")
        self._appended = asyncio.Condition()

    async def append(self, job: str, queue: str, chunks: Sequence[Chunk]) -> None:
        del queue
        await asyncio.to_thread(self._files.of(job).append, [_encode(chunk) for chunk in chunks])
        async with self._appended:
            self._appended.notify_all()

    async def read(self, job: str) -> list[Chunk]:
        lines = await self._lines(job, 0)
        return [chunk for line in lines if (chunk := _chunk(job, line)) is not None]

    async def follow(self, job: str) -> AsyncGenerator[Chunk, None]:
        seen = 0
        while True:
            lines = await self._lines(job, seen)
            for line in lines:
                if (chunk := _chunk(job, line)) is not None:
                    yield chunk
            seen += len(lines)
            if not lines:
                await _wait_for(self._appended, LOOK_AT_FILE_S)

    async def _lines(self, job: str, after: int) -> list[bytes]:
        return await asyncio.to_thread(self._files.of(job).read, after)


def _chunk(job: str, line: bytes) -> Chunk | None:
    """A piece of output; one that is none is told of, and nothing else is kept back for it."""
    try:
        return _chunks.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        log.warning("a piece of the output of %s cannot be read", job)
        return None


class _Blobs:
    def __init__(self, folder: Path) -> None:
        self._files = BlobFolder(folder / "blobs")
        self._unsynced = False
        self._syncing = threading.Lock()

    async def put(self, data: bytes) -> str:
        digest = digest_of(data)
        if not await asyncio.to_thread(self._is_whole, digest, len(data)):
            await asyncio.to_thread(self._keep, [data])
        self._unsynced = True  # also what a process wrote that died before it was synced
        return digest

    async def put_file(self, path: Path) -> str:
        """Copied and hashed in one pass, so that what is kept is what was hashed."""

        def copy() -> str:
            with open(path, "rb") as file:
                return self._keep(pieces_of(file))

        return await asyncio.to_thread(copy)

    async def put_all(self, sources: Mapping[str, Source]) -> set[str]:
        missing = await self.missing(sources)
        return await asyncio.to_thread(self._keep_all, {digest: sources[digest] for digest in missing})

    async def has(self, digest: str) -> bool:
        return not await self.missing([digest])

    async def missing(self, digests: Collection[str]) -> set[str]:
        return await asyncio.to_thread(
            lambda: {digest for digest in digests if not self._files.path(digest).exists()}
        )

    async def get(self, digest: str) -> bytes:
        return await asyncio.to_thread(lambda: b"".join(self._files.read(digest)))

    async def fetch(self, digest: str, to: Path) -> None:
        await in_thread(write_new, to, self._files.read(digest))

    def sync(self) -> None:
        """Bring every blob that was put to disk: one call for many files."""
        with self._syncing:  # who comes second waits for the first, whose blobs may be its own
            if not self._unsynced:
                return
            self._unsynced = False
            fd = os.open(self._files.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if linux.libc.syncfs(fd) != 0:
                    self._unsynced = True
                    raise StoreUnavailable(f"{self._files.folder} cannot be synced")
            finally:
                os.close(fd)

    def _is_whole(self, digest: str, size: int) -> bool:
        """Whether the file is there in full length: a power cut may have left a name without its bytes."""
        try:
            return self._files.path(digest).stat().st_size == size
        except FileNotFoundError:
            return False

    def _keep_all(self, sources: Mapping[str, Source]) -> set[str]:
        size = sum(source.size for source in sources.values())
        folder = next(path for path in (self._files.folder, *self._files.folder.parents) if path.exists())
        disk = os.statvfs(folder)
        if size > disk.f_bavail * disk.f_frsize:
            free = rough_size(disk.f_bavail * disk.f_frsize)
            raise StoreFull(f"{rough_size(size)} do not fit into {self._files.folder}: {free} are free")
        changed = set()
        for digest, source in sources.items():
            with source.open() as file:
                if self._keep(pieces_of(file)) != digest:
                    changed.add(digest)
        return changed

    def _keep(self, pieces: Iterable[bytes]) -> str:
        try:
            digest = self._files.keep(pieces)
        except OSError as error:
            raise StoreFull(f"{self._files.folder} cannot be written: {error.strerror}") from error
        self._unsynced = True
        return digest


class _Presence:
    """The lock of a job proves that nobody else holds it."""

    def __init__(self, place: Folder, unit: str) -> None:
        self.unit = unit
        self.incarnation = secrets.token_hex(8)
        self._place = place
        self._locks: dict[str, FileLock] = {}
        self._holds: dict[str, int] = {}
        self._keeps: dict[str, None] = {}  # in the order of their coming
        self._waits: dict[str, str] = {}
        self._about = About()
        self._say()

    async def add_job(self, job: str, epoch: int) -> None:
        if job not in self._locks:
            self._locks[job] = self._lock(job, timeout_s=PROBE_S)
        self._holds[job] = epoch
        self._say()

    async def remove_job(self, job: str) -> None:
        self._holds.pop(job, None)
        self._waits.pop(job, None)
        self._say()
        if job in self._locks:
            self._locks.pop(job).release()

    async def add_hint(self, job: str, waits: str = "") -> None:
        self._keeps[job] = None
        await self.explain(job, waits)

    async def remove_hint(self, job: str) -> None:
        self._keeps.pop(job, None)
        await self.explain(job, "")

    async def explain(self, job: str, waits: str) -> None:
        if waits:
            self._waits[job] = waits
        else:
            self._waits.pop(job, None)
        self._say()

    async def describe(self, about: About) -> None:
        self._about = about
        self._say()

    async def live(self, job: str, lease: Lease) -> bool:
        if lease.incarnation == self.incarnation:
            member = self._place.members.get(lease.incarnation)
            return member is not None and f"{job}@{lease.epoch}" in member.holds
        try:
            self._lock(job, timeout_s=0).release()
        except LockHeld:
            return True
        return False

    async def find(self, unit: str, incarnation: str) -> Member | None:
        return self._place.members.get(incarnation)

    async def members(self) -> list[Member]:
        return list(self._place.members.values())

    async def leave(self) -> None:
        for job in list(self._holds):
            await self.remove_job(job)
        self._place.members.pop(self.incarnation, None)

    def _lock(self, job: str, *, timeout_s: float) -> FileLock:
        path = self._place.folder / "jobs" / job / "lock"
        private_folder(path.parent)
        lock = FileLock(path, timeout=timeout_s, mode=0o600)
        try:
            lock.acquire()
        except Timeout:
            raise LockHeld(
                f"another process is running {job}", hint=f"`mvmci logs {job} --local -f` follows it"
            ) from None
        return lock

    def _say(self) -> None:
        holds = tuple(f"{job}@{epoch}" for job, epoch in self._holds.items())
        self._place.members[self.incarnation] = Member(
            unit=self.unit,
            incarnation=self.incarnation,
            holds=holds,
            keeps=tuple(self._keeps),
            waits=dict(self._waits),
            about=self._about,
        )
