"""A store in memory, which can keep itself in a folder, for one machine and no broker.

    <folder>/version                 what wrote it
    <folder>/jobs/<id>/journal       one message a line; an append is synced before it is acknowledged
    <folder>/jobs/<id>/log           one chunk a line
    <folder>/jobs/<id>/lock          held by the process that holds the job
    <folder>/blobs/<xx>/<hex>        bytes by their SHA-256

Several processes may share a folder: each append locks its journal, each holder locks its job, and
readers need no lock, because lines are only ever added. A last line without its end is a write that
was never acknowledged, and is cut off by the next one. Hints live in memory alone: with no cluster
there is nobody else to tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import os
import secrets
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from mvmci.errors import Conflict, LockHeld, NotFound, StoreFull, StoreUnavailable, Usage
from mvmci.jobs.job import is_digest
from mvmci.jobs.journal import Entry, Lease, MessageKind
from mvmci.store import HINT_LAPSE_S, MESSAGE_BYTES_MAX, About, Chunk, Delivery, Member, Store, digest_of
from mvmci.system import linux
from mvmci.system.files import private_opener

FOLDER_VERSION = "1"
LOOK_AT_FILE_S = 0.1  # how often a follower looks at a file that another process may be writing
COPY_BYTES = 1 << 20
PROBE_S = 0.3  # somebody who only asks whether a job is held has its lock for a moment

_chunks = msgspec.json.Decoder(Chunk)
_encode = msgspec.json.Encoder().encode


class Memory:
    """What all units share: the place itself. `store()` gives one unit its way in."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        hint_lapse_s: float = HINT_LAPSE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        if folder is not None:
            _prepare(folder)
        self.blobs = _Blobs(folder)
        self.hints = _Hints(hint_lapse_s, clock)
        self.journals = _Journals(folder, self.hints, self.blobs)
        self.logs = _Logs(folder)
        self.claims: dict[str, Member] = {}

    def store(self, unit: str) -> Store:
        """The store as a new incarnation of `unit` sees it."""
        presence = _Presence(self, unit)
        return Store(self.journals, self.hints, self.logs, self.blobs, presence, presence.leave)


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        version = folder / "version"
        if not version.exists():
            version.write_text(FOLDER_VERSION + "\n")
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
    """Lines that are only ever added, in memory or in the file at `path`, which others may add to."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[bytes] = []
        self._bytes = 0  # of the file, up to the end of the last complete line
        self._lock = threading.Lock()

    def read(self, after: int = 0) -> list[bytes]:
        """All lines but the first `after`."""
        with self._lock:
            if self._path is not None:
                with contextlib.suppress(FileNotFoundError), open(self._path, "rb", buffering=0) as file:
                    self._catch_up(file)
            return self._lines[after:]

    def append(self, lines: Sequence[bytes], *, expect: int | None = None, sync: bool = False) -> None:
        """Add `lines`, if there are `expect` so far. Raises Conflict, StoreFull."""
        with self._lock:
            if self._path is None:
                self._check(expect)
                self._lines += lines
                return
            try:
                self._write(self._path, lines, expect, sync)
            except OSError as error:
                raise StoreFull(f"{self._path} cannot be written: {error.strerror}") from error

    def _write(self, path: Path, lines: Sequence[bytes], expect: int | None, sync: bool) -> None:
        assert not any(b"\n" in line for line in lines)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:  # what failed must not be written again at its close
            fcntl.flock(file, fcntl.LOCK_EX)
            self._catch_up(file)
            self._check(expect)
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
            _sync_folder(path.parent)
            _sync_folder(path.parent.parent)

    def _catch_up(self, file: FileIO) -> None:
        file.seek(self._bytes)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        self._lines += data[:whole].split(b"\n")[:-1]
        self._bytes += whole

    def _check(self, expect: int | None) -> None:
        if expect is not None and len(self._lines) != expect:
            raise Conflict(f"the last message is {len(self._lines)}, not {expect}")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Files:
    """The lines of one kind, one file a job."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self._jobs = folder / "jobs" if folder else None
        self._name = name
        self._files: dict[str, _Lines] = {}

    def of(self, job: str) -> _Lines:
        if job not in self._files:
            self._files[job] = _Lines(self._jobs / job / self._name if self._jobs else None)
        return self._files[job]

    def jobs(self) -> list[str]:
        if self._jobs is None:
            return [job for job, lines in self._files.items() if lines.read()]
        return [path.parent.name for path in self._jobs.glob(f"*/{self._name}")]

    def newest(self) -> list[str]:
        """The jobs that have lines, the newest first: a job's folder gets no more files once it has begun."""
        jobs = [job for job in self.jobs() if self.of(job).read()]
        if self._jobs is None:
            return jobs[::-1]
        folder = self._jobs
        return sorted(jobs, key=lambda job: (folder / job).stat().st_mtime_ns, reverse=True)


class _Journals:
    def __init__(self, folder: Path | None, hints: _Hints, blobs: _Blobs) -> None:
        self._files = _Files(folder, "journal")
        self._hints = hints
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
        del may_delay  # nothing here can land late, or together
        assert len(data) <= MESSAGE_BYTES_MAX
        await asyncio.to_thread(self._blobs.sync)  # what the message names is on disk before it
        await asyncio.to_thread(self._files.of(job).append, [data], expect=expect, sync=True)
        if kind == "spec":
            await self._hints.spec(queue, job, Entry(seq=expect + 1, data=data))
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


@dataclass
class _Hint:
    job: str
    first: Entry | None
    due: float  # by the store's clock
    deliveries: int = 0
    lapses: float | None = None  # by the loop's clock, while it is out


class _Delivery:
    def __init__(self, hints: _Hints, queue: str, hint: _Hint) -> None:
        self.job = hint.job
        self.spec_entry = hint.first if hint.deliveries == 1 else None
        self._hints = hints
        self._queue = queue
        self._hint = hint

    async def ack(self) -> None:
        self._hints.remove(self._queue, self._hint)

    async def keep(self) -> None:
        self._hints.keep(self._hint)

    async def redeliver(self, wait_s: float) -> None:
        await self._hints.redeliver(self._hint, wait_s)


class _Hints:
    def __init__(self, lapse_s: float, clock: Callable[[], float]) -> None:
        self._lapse_s = lapse_s
        self._clock = clock
        self._queues: dict[str, dict[tuple[str, str], _Hint]] = {}
        self._sequence = itertools.count(1)
        self._changed = asyncio.Condition()

    async def spec(self, queue: str, job: str, first: Entry) -> None:
        await self._put(queue, "spec", _Hint(job, first, 0.0))

    async def ready(self, queue: str, job: str) -> int:
        await self._put(queue, "ready", _Hint(job, None, 0.0))
        return next(self._sequence)

    async def timer(self, queue: str, job: str, at_ms: int) -> None:
        await self._put(queue, "timer", _Hint(job, None, at_ms / 1000))

    async def _put(self, queue: str, kind: str, hint: _Hint) -> None:
        self._queues.setdefault(queue, {})[kind, hint.job] = hint
        async with self._changed:
            self._changed.notify_all()

    def remove(self, queue: str, hint: _Hint) -> None:
        hints = self._queues.get(queue, {})
        for key in [key for key, held in hints.items() if held is hint]:
            del hints[key]

    def keep(self, hint: _Hint) -> None:
        hint.lapses = asyncio.get_running_loop().time() + self._lapse_s

    async def redeliver(self, hint: _Hint, wait_s: float) -> None:
        hint.lapses = asyncio.get_running_loop().time() + wait_s
        async with self._changed:
            self._changed.notify_all()

    async def pull(self, queue: str, *, wait_s: float) -> Delivery | None:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            pause = until - loop.time()
            for hint in self._queues.get(queue, {}).values():
                wait = max(hint.due - self._clock(), (hint.lapses or 0.0) - loop.time())
                if wait <= 0:
                    hint.deliveries += 1
                    self.keep(hint)
                    return _Delivery(self, queue, hint)
                pause = min(pause, wait)
            if until <= loop.time():
                return None
            await _wait_for(self._changed, pause)


async def _wait_for(condition: asyncio.Condition, wait_s: float) -> None:
    """Wait until somebody notifies `condition`, at most `wait_s`."""
    async with condition:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(wait_s, 0.001)):  # `wait_for` could lose a cancellation
                await condition.wait()


class _Logs:
    def __init__(self, folder: Path | None) -> None:
        self._files = _Files(folder, "log")
        self._appended = asyncio.Condition()

    async def append(self, job: str, queue: str, chunks: Sequence[Chunk]) -> None:
        del queue
        await asyncio.to_thread(self._files.of(job).append, [_encode(chunk) for chunk in chunks])
        async with self._appended:
            self._appended.notify_all()

    async def read(self, job: str) -> list[Chunk]:
        return [_chunks.decode(line) for line in await self._lines(job, 0)]

    async def follow(self, job: str) -> AsyncGenerator[Chunk, None]:
        seen = 0
        while True:
            lines = await self._lines(job, seen)
            for line in lines:
                yield _chunks.decode(line)
            seen += len(lines)
            if not lines:
                await _wait_for(self._appended, LOOK_AT_FILE_S)

    async def _lines(self, job: str, after: int) -> list[bytes]:
        return await asyncio.to_thread(self._files.of(job).read, after)


class _Blobs:
    def __init__(self, folder: Path | None) -> None:
        self._folder = folder / "blobs" if folder else None
        self._kept: dict[str, bytes] = {}
        self._unsynced = False
        self._syncing = threading.Lock()

    async def put(self, data: bytes) -> str:
        digest = digest_of(data)
        if self._folder is None:
            self._kept[digest] = data
        elif not await asyncio.to_thread(self._kept_whole, digest, len(data)):
            await asyncio.to_thread(self._write, digest, [data])
        self._unsynced = True  # also what a process wrote that died before it was synced
        return digest

    async def put_file(self, path: Path) -> str:
        if self._folder is None:
            return await self.put(await asyncio.to_thread(path.read_bytes))
        return await asyncio.to_thread(self._write_file, path)

    async def has(self, digest: str) -> bool:
        return digest in self._kept if self._folder is None else self._path(digest).exists()

    async def missing(self, digests: Collection[str]) -> set[str]:
        if self._folder is None:
            return {digest for digest in digests if digest not in self._kept}
        return await asyncio.to_thread(
            lambda: {digest for digest in digests if not self._path(digest).exists()}
        )

    async def get(self, digest: str) -> bytes:
        if self._folder is None:
            if digest not in self._kept:
                raise _no_blob(digest)
            return self._kept[digest]
        return await asyncio.to_thread(lambda: b"".join(self._read(digest)))

    async def fetch(self, digest: str, to: Path) -> None:
        data = iter([await self.get(digest)]) if self._folder is None else self._read(digest)
        await asyncio.to_thread(_write_all, to, data)

    def sync(self) -> None:
        """Bring every blob that was put to disk: one call for many files."""
        with self._syncing:  # who comes second waits for the first, whose blobs may be its own
            if self._folder is None or not self._unsynced:
                return
            self._unsynced = False
            fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if linux.libc.syncfs(fd) != 0:
                    self._unsynced = True
                    raise StoreUnavailable(f"{self._folder} cannot be synced")
            finally:
                os.close(fd)

    def _kept_whole(self, digest: str, size: int) -> bool:
        """Whether the file is there in full length: a power cut may have left a name without its bytes."""
        try:
            return self._path(digest).stat().st_size == size
        except FileNotFoundError:
            return False

    def _path(self, digest: str) -> Path:
        assert self._folder is not None
        if not is_digest(digest):
            raise _no_blob(digest)
        return self._folder / digest[7:9] / digest[7:]

    def _write_file(self, path: Path) -> str:
        """Copy and hash in one pass, so that what is kept is what was hashed."""
        assert self._folder is not None
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._folder / f".{secrets.token_hex(8)}"
        hashed = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                _write_all(draft, _hashing(hashed, iter(lambda: file.read(COPY_BYTES), b"")))
            return self._keep(draft, f"sha256:{hashed.hexdigest()}")
        finally:
            draft.unlink(missing_ok=True)

    def _write(self, digest: str, data: Iterable[bytes]) -> None:
        assert self._folder is not None
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._folder / f".{secrets.token_hex(8)}"
        try:
            _write_all(draft, data)
            self._keep(draft, digest)
        finally:
            draft.unlink(missing_ok=True)

    def _keep(self, draft: Path, digest: str) -> str:
        path = self._path(digest)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        draft.rename(path)
        self._unsynced = True
        return digest

    def _read(self, digest: str) -> Iterator[bytes]:
        """The bytes of a blob. One that was damaged is removed, so that it can be put again."""
        path = self._path(digest)
        hashed = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                yield from _hashing(hashed, iter(lambda: file.read(COPY_BYTES), b""))
        except FileNotFoundError:
            raise _no_blob(digest) from None
        if f"sha256:{hashed.hexdigest()}" != digest:
            path.unlink(missing_ok=True)
            raise NotFound(f"blob {digest} was damaged on disk", hint="submit the job again under a new id")


def _no_blob(digest: str) -> NotFound:
    return NotFound(f"there is no blob {digest[:80]}")


def _hashing(hashed: hashlib._Hash, pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        hashed.update(piece)
        yield piece


def _write_all(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a new file, whole or not at all."""
    try:
        with open(path, "xb", opener=private_opener) as file:
            for piece in pieces:
                file.write(piece)
    except FileExistsError:
        raise  # what was there already is not ours to remove
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StoreFull(f"{path} cannot be written: {error.strerror}") from error
    except NotFound:
        path.unlink(missing_ok=True)
        raise


class _Presence:
    """In a folder, the lock of a job proves that nobody else holds it; in memory, the claims do."""

    def __init__(self, memory: Memory, unit: str) -> None:
        self.unit = unit
        self.incarnation = secrets.token_hex(8)
        self._memory = memory
        self._locks: dict[str, FileLock] = {}
        self._holds: dict[str, int] = {}
        self._keeps: dict[str, str] = {}
        self._about = About()
        self._say()

    async def add_job(self, job: str, epoch: int) -> None:
        if self._memory.folder is not None and job not in self._locks:
            self._locks[job] = self._lock(job, timeout_s=PROBE_S)
        self._holds[job] = epoch
        self._say()

    async def remove_job(self, job: str) -> None:
        self._holds.pop(job, None)
        self._say()
        if job in self._locks:
            self._locks.pop(job).release()

    async def add_hint(self, job: str, waits: str = "") -> None:
        self._keeps[job] = waits
        self._say()

    async def remove_hint(self, job: str) -> None:
        self._keeps.pop(job, None)
        self._say()

    async def describe(self, about: About) -> None:
        self._about = about
        self._say()

    async def live(self, job: str, lease: Lease) -> bool:
        if self._memory.folder is None or lease.incarnation == self.incarnation:
            member = self._memory.claims.get(lease.incarnation)
            return member is not None and f"{job}@{lease.epoch}" in member.holds
        try:
            self._lock(job, timeout_s=0).release()
        except LockHeld:
            return True
        return False

    async def find(self, unit: str, incarnation: str) -> Member | None:
        return self._memory.claims.get(incarnation)

    async def members(self) -> list[Member]:
        return list(self._memory.claims.values())

    async def leave(self) -> None:
        for job in list(self._holds):
            await self.remove_job(job)
        self._memory.claims.pop(self.incarnation, None)

    def _lock(self, job: str, *, timeout_s: float) -> FileLock:
        assert self._memory.folder is not None
        path = self._memory.folder / "jobs" / job / "lock"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        self._memory.claims[self.incarnation] = Member(
            unit=self.unit,
            incarnation=self.incarnation,
            holds=holds,
            keeps=tuple(self._keeps),
            waits={job: why for job, why in self._keeps.items() if why},
            about=self._about,
        )
