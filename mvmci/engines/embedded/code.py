"""Compiled code: made once per host in a confined process, authenticated before it is ever mapped.

Owns the directory `code` under its root: files `<key>.cwasm` (0444, in a directory 0711 so that
slots of any user can map them by name), `<key>.mac` beside each, and the host's key file, which no
slot can read. The engine runs a damaged file without complaint, so nothing is handed out whose MAC,
over the key and the whole content, does not fit; such a file is compiled anew. A file is checked once
per process, and again when its inode, size or times have changed. Files are replaced by renaming,
so one that is mapped keeps its content.

The key of a file names the module, the engine's version, every setting that shapes code, and the
machine with its CPU's features. A module that cannot be compiled is not remembered.

Not promised: that a file stays. The oldest go when the directory grows beyond its bound, though never
one that was asked for in the last minutes or that this process uses; a slot that finds its code
missing dies, and the caller asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

from mvmci.config.quantity import format_size
from mvmci.errors import BadModule, JobUnfit, MvmciError
from mvmci.sandbox import confinement, frames, settings
from mvmci.sandbox.confinement import Profile
from mvmci.sandbox.forkserver import ForkServer, SlotDied, SlotLost
from mvmci.system.capacity import memory_bytes, processors
from mvmci.system.files import passable_folder, private_folder, private_opener
from mvmci.system.tasks import in_thread

CODE_BYTES_MAX = 4 << 30  # of all files together
CODE_FILE_BYTES_MAX = 1 << 30
COMPILE_DATA_BYTES_MAX = 6 << 30
COMPILE_DATA_BYTES_MIN = 64 << 20
COMPILE_S_MAX = 300.0
COMPILES_MAX = 2  # at once on this host, by all who share the root
LOCK_PAUSE_S = 0.05
LEASE_S = 5.0  # a compile whose process shows no life for so long is no longer waited for
UNFIT_S = 60.0  # so long it is remembered that a module cannot be compiled here
LEASES = 16  # files that say who compiles; a key takes one of them
EVICT_AGE_S_MIN = 300.0
TOUCH_S = 60.0  # a use is noted this often at most
KEPT_MAX = 256  # of those this process used last, none is evicted
HOST_KEY_BYTES = 32

Key = str
Stat = tuple[int, int, int, int]


class Bounds(NamedTuple):
    """What compiling may take on this host."""

    at_once: int
    data_bytes: int  # of each

    @property
    def limited(self) -> bool:
        """Whether another host may compile what this one cannot."""
        return self.data_bytes < COMPILE_DATA_BYTES_MAX

    def __str__(self) -> str:
        return (
            f"{self.at_once} at a time, at most {format_size(self.data_bytes)} and {COMPILE_S_MAX:.0f} s each"
        )


def compile_bounds() -> Bounds:
    """By the memory and the processors that this process may use: together they leave a quarter of it."""
    memory = memory_bytes()
    at_once = max(1, min(COMPILES_MAX, processors(), memory // COMPILE_DATA_BYTES_MAX))
    most = memory * 3 // 4 // at_once
    return Bounds(at_once, min(COMPILE_DATA_BYTES_MAX, max(COMPILE_DATA_BYTES_MIN, most)))


class CompileFailed(MvmciError):
    """A module could not be compiled within its bounds, through no error in its format."""


class CodeCache:
    """The host's compiled code under `root`, which lies in the fork server's root."""

    def __init__(self, root: Path, forkserver: ForkServer) -> None:
        self._forkserver = forkserver
        self._directory = root / "code"
        self._folder = str(self._directory)
        self._relative = str(self._directory.relative_to(forkserver.root))
        passable_folder(self._directory)
        self._host_key = _host_key(root / "code.key")
        self._verified: dict[Key, Stat] = {}  # ordered by use, the last at the end
        self._touched: dict[Key, float] = {}  # when, by this process's clock
        self._running: dict[Key, asyncio.Task[None]] = {}
        self._key = functools.lru_cache(KEPT_MAX)(_key)
        self._unfit: dict[Key, tuple[float, JobUnfit]] = {}  # what cannot be compiled here, and since when
        self._bounds = compile_bounds()
        self._evict_lock = asyncio.Lock()
        self._sweep()

    async def get(
        self, digest: str, component: bool, workflow: bool, fetch: Callable[[Path], Awaitable[None]]
    ) -> str:
        """The path, relative to the fork server's root, of the code of module `digest`.

        `fetch` writes the module's file, and is called only if it must be compiled. Raises BadModule
        if it cannot run here, CompileFailed if compiling took too long or too much, JobUnfit if another
        host may do better.
        """
        key = self._key(digest, component, workflow)
        since, unfit = self._unfit.get(key, (0.0, None))
        if unfit is not None and time.monotonic() - since < UNFIT_S:
            raise unfit
        if not self._is_fresh(key):
            task = self._running.get(key)
            if task is None:  # once for all who wait; it goes on when one of them gives up
                task = asyncio.create_task(self._provide(key, component, workflow, fetch))
                self._running[key] = task
                task.add_done_callback(lambda _: self._running.pop(key))
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(task)
        self._verified[key] = self._verified.pop(key)
        self._touch(key)
        return f"{self._relative}/{key}.cwasm"

    def drop(self, digest: str, component: bool, workflow: bool) -> None:
        """Remove code that a slot could not map although it is what was verified here."""
        key = self._key(digest, component, workflow)
        if self._is_fresh(key):
            self._path(key, "cwasm").unlink(missing_ok=True)

    async def _provide(
        self, key: Key, component: bool, workflow: bool, fetch: Callable[[Path], Awaitable[None]]
    ) -> None:
        if await asyncio.to_thread(self._verify, key):
            return
        stripe = int(key[:8], 16) % LEASES
        async with self._leased(f"{stripe}"):
            if await asyncio.to_thread(self._verify, key):
                return  # another process made it in the meantime
            async with self._leased(f"turn-{stripe % self._bounds.at_once}"):
                # Who was stopped for long may find its stage removed, and mostly the code made by another.
                with self._stage(stripe) as stage, contextlib.suppress(FileNotFoundError):
                    await fetch(stage / "module")
                    await self._compile(key, component, workflow, stage)
            if not await asyncio.to_thread(self._verify, key):
                raise CompileFailed("compiled code was changed while it was being stored")
        async with self._evict_lock:
            await asyncio.to_thread(self._evict)

    def _lease(self, name: str) -> filelock.SoftFileLease:
        path = self._directory / f"lease-{name}"
        return filelock.SoftFileLease(path, lease_duration=LEASE_S, mode=0o600, thread_local=False)

    @contextlib.asynccontextmanager
    async def _leased(self, name: str) -> AsyncIterator[None]:
        """Hold a lease, waited for as long as others compile. A thread that waits could not be called off.

        Whoever is stopped loses it. Two may then compile the same: each in a stage of its own, and one after
        the other renames a whole file into place.
        """
        lease = self._lease(name)
        while True:
            try:
                lease.acquire(timeout=0)
                break
            except filelock.Timeout:
                await asyncio.sleep(LOCK_PAUSE_S)
        try:
            yield
        finally:
            lease.release()

    @contextlib.contextmanager
    def _stage(self, stripe: int) -> Iterator[Path]:
        """A directory to make code in, for whoever holds the lease of `stripe`: what is there was left."""
        self._remove_stages(stripe)
        stage = self._directory / f"new-{stripe}-{secrets.token_hex(4)}"
        private_folder(stage)
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _remove_stages(self, stripe: int) -> None:
        for left in self._directory.glob(f"new-{stripe}-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what processes that were killed while compiling have left."""
        for stripe in {int(left.name.split("-")[1]) for left in self._directory.glob("new-*-*")}:
            with contextlib.suppress(filelock.Timeout), self._lease(f"{stripe}").acquire(timeout=0):
                self._remove_stages(stripe)

    async def _compile(self, key: Key, component: bool, workflow: bool, stage: Path) -> None:
        code = os.open(stage / "code", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with contextlib.closing(_Descriptor(code)), (stage / "module").open("rb") as source:
            task = frames.Compile(component=component, workflow=workflow)
            try:
                await self._run(task, source.fileno(), code)
            except JobUnfit as unfit:
                self._unfit[key] = (time.monotonic(), unfit)
                raise
            # The child is dead: nothing can change what is authenticated from here on.
            await in_thread(self._publish, key, code, stage)

    async def look_at(self, module: Path, *, component: bool, workflow: bool) -> None:
        """See whether the module can be compiled here, and keep nothing. Raises as `get`."""
        task = frames.Compile(component=component, workflow=workflow, look=True)
        nothing = _Descriptor(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
        with contextlib.closing(nothing), module.open("rb") as source:
            await self._run(task, source.fileno(), nothing.fd)

    async def _run(self, task: frames.Compile, source: int, target: int) -> None:
        profile = Profile(
            name="compile",
            uid=confinement.COMPILE_UID if "uid" in self._forkserver.features else None,
            threads=True,
            data_bytes=self._bounds.data_bytes,
            file_bytes=CODE_FILE_BYTES_MAX,
        )
        child = await self._forkserver.fork(profile, (source, target))
        try:
            async with asyncio.timeout(COMPILE_S_MAX):
                await child.send(task)
                ended = await child.receive()
        except TimeoutError:
            raise CompileFailed(f"compiling the module took more than {COMPILE_S_MAX:.0f} s") from None
        except SlotDied as error:
            if isinstance(error, SlotLost) or self._bounds.limited:
                raise JobUnfit(f"compiling the module failed here: {error}") from None
            raise CompileFailed(f"compiling the module failed: {error}") from None
        finally:
            await child.close()
        if not isinstance(ended, frames.Ended) or ended.outcome not in ("ok", "invalid", "host"):
            raise CompileFailed("compiling the module failed: its process sent nonsense")
        if ended.outcome == "host" and (ended.text != frames.NO_MEMORY or self._bounds.limited):
            raise JobUnfit(f"the module cannot be compiled here: {ended.text}")
        if ended.outcome == "host":
            raise BadModule(f"the module cannot run here: {ended.text}")
        if ended.outcome == "invalid":
            raise BadModule(f"the module cannot run here: {ended.text}")

    def _publish(self, key: Key, code: int, stage: Path) -> None:
        os.fchmod(code, 0o444)
        os.fsync(code)
        with open(stage / "mac", "wb", opener=private_opener) as file:
            file.write(self._mac(key, code).encode())
            file.flush()
            os.fsync(file.fileno())
        os.rename(stage / "mac", self._path(key, "mac"))
        os.rename(stage / "code", self._path(key, "cwasm"))

    def _path(self, key: Key, suffix: str) -> Path:
        return self._directory / f"{key}.{suffix}"

    def _mac(self, key: Key, fd: int) -> str:
        digest = hmac.new(self._host_key, key.encode(), "sha256")
        with open(fd, "rb", closefd=False, buffering=0) as file:
            file.seek(0)
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _is_fresh(self, key: Key) -> bool:
        """It was verified, and is the file that was."""
        try:
            # Asked for by every job: `Path` would cost more than the look itself.
            return key in self._verified and self._verified[key] == _stat(
                os.stat(f"{self._folder}/{key}.cwasm")
            )
        except FileNotFoundError:
            return False

    def _verify(self, key: Key) -> bool:
        """Read all of it and compare; remembers the file that was right."""
        self._verified.pop(key, None)
        try:
            fd = os.open(self._path(key, "cwasm"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        with contextlib.closing(_Descriptor(fd)):
            before = _stat(os.fstat(fd))
            try:
                expected = self._path(key, "mac").read_text()
            except (OSError, UnicodeDecodeError):
                return False
            if not hmac.compare_digest(expected.encode(), self._mac(key, fd).encode()):
                return False
            if _stat(os.fstat(fd)) != before:
                return False
        self._verified[key] = before
        return True

    def _touch(self, key: Key) -> None:
        """Note the use, on the MAC's file: the code's own times are part of how it is recognised."""
        now = time.monotonic()
        if now - self._touched.get(key, -TOUCH_S) >= TOUCH_S:
            self._touched[key] = now
            with contextlib.suppress(OSError):
                os.utime(self._path(key, "mac"))

    def _evict(self) -> None:
        """Remove what was used longest ago, until the rest is within the bound."""
        kept = set(list(self._verified)[-KEPT_MAX:])
        oldest = time.time() - EVICT_AGE_S_MIN
        found = sorted(self._files())
        total = sum(size for _, size, _ in found)
        for used, size, key in found:
            if total <= CODE_BYTES_MAX or used > oldest:
                return
            if key not in kept:
                self._path(key, "cwasm").unlink(missing_ok=True)
                self._path(key, "mac").unlink(missing_ok=True)
                total -= size

    def _files(self) -> Iterator[tuple[float, int, Key]]:
        for path in self._directory.glob("*.cwasm"):
            with contextlib.suppress(FileNotFoundError):
                yield self._path(path.stem, "mac").stat().st_mtime, path.stat().st_size, path.stem


class _Descriptor:
    """An open descriptor, for `contextlib.closing`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)


def _stat(found: os.stat_result) -> Stat:
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _key(digest: str, component: bool, workflow: bool) -> Key:
    parts = (
        digest,
        "component" if component else "module",
        _engine_version(),
        settings.fingerprint(workflow),
        _machine(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _engine_version() -> str:
    return importlib.metadata.version("wasmtime")


@functools.cache
def _machine() -> str:
    """The machine and its CPU's features: code for one need not run on another."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return f"{platform.machine()} {' '.join(sorted(found[1].split()))}"
    return platform.machine()


def _host_key(path: Path) -> bytes:
    """The host's key, made by whoever comes first. Raises MvmciError if others could read it."""
    if not path.exists():
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix="key-")  # 0600
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(HOST_KEY_BYTES))
            file.flush()
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # fails if somebody else was first, and then theirs is it
        os.unlink(temporary)
    found = path.stat()
    key = path.read_bytes()
    if found.st_mode & 0o077 or found.st_uid != os.geteuid() or len(key) != HOST_KEY_BYTES:
        raise MvmciError(
            f"{path} is not a key of ours alone", hint="remove it; compiled code is then made anew"
        )
    return key
