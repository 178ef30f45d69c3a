"""What this machine does for who is at work on a cluster from another one: `mvmci host`, over ssh.

It is `Local` behind a wire, and keeps nothing but the lock, for as long as the channel is open. A line of
JSON is a request; to each there are lines with its number, the last of which says that it is done, or why it
failed.

    → {"id": 1, "ask": {"type": "start", …}}
    ← {"id": 1, "last": false, "value": …}   as often as there is something to tell, of `watch` and `log`
    ← {"id": 1, "last": true, "value": …}    or with {"error": {"kind": "Usage", "message": …, "hint": …}}

Keys of units are made here and stay here: of a key that is asked for, its public half is told. Whoever asks
says something every few seconds. One who has gone silent is gone: its lock ends, and so do units that were to
end with it, as they end with this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from mvmci.cluster.deployment import RoleName
from mvmci.errors import LockHeld, MvmciError, NotFound, Usage
from mvmci.runtimes.local.messages import Report, Start, Stop, Watch
from mvmci.runtimes.local.runtime import Local
from mvmci.system.files import private_folder, sync_folder, write_private
from mvmci.system.lock import hold
from mvmci.trust.provision import new_key, public_of, with_seed, without_seed

SILENT_S = 30.0  # who says nothing for so long has gone
LOCK_WAIT_S = 5.0  # for the lock: of one who was killed, an agent may still have it for a moment
LOCK_PAUSE_S = 0.1
LINE_BYTES_MAX = 64 << 20
OWNER = "authority"  # the file that says whose cluster it is


class Lock(msgspec.Struct, frozen=True, kw_only=True, tag="lock"):
    """Be the only one at work on the cluster here, until the channel is closed. `owner` is whose it is."""

    who: str
    owner: str


class Unlock(msgspec.Struct, frozen=True, kw_only=True, tag="unlock"):
    """Let go of the lock."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A unit that needs a key of that generation."""

    name: str
    role: RoleName
    generation: int


class Keys(msgspec.Struct, frozen=True, kw_only=True, tag="keys"):
    """See that these units have a key; answered by a `Key` for each."""

    units: tuple[Wanted, ...]


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """The public half of a unit's key, and the file that it has, without its secret half."""

    public: str
    there: bytes


class Provide(msgspec.Struct, frozen=True, kw_only=True, tag="provide"):
    """Lay down these files of units, by name, each with its key filled in."""

    files: dict[str, bytes]


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """Keep these units running, by this program; with `attached`, until the channel is closed.

    Answered by what the user has to do so that they come back after a boot, if anything.
    """

    start: Start
    attached: bool = False


class Observe(msgspec.Struct, frozen=True, kw_only=True, tag="observe"):
    """Tell how the units are."""


class Log(msgspec.Struct, frozen=True, kw_only=True, tag="log"):
    """Tell what a unit printed."""

    name: str
    follow: bool = False
    last: int | None = None


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag="forget"):
    """Remove all that is kept of the cluster here; its units were stopped."""


Ask = Lock | Unlock | Keys | Provide | Begin | Stop | Observe | Watch | Log | Forget


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of who asks. Without an `ask`, it only says that it is there."""

    id: int = 0
    ask: Ask | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An `MvmciError`: its class, and what it says."""

    kind: str
    message: str
    hint: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One line of what is told about the request of that number."""

    id: int
    last: bool
    value: msgspec.Raw = msgspec.Raw(b"null")
    error: Failure | None = None


_requests = msgspec.json.Decoder(Request)


async def serve(here: Local, reader: asyncio.StreamReader, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Answer until whoever asks is gone. `write` sends a line. Raises msgspec.DecodeError."""
    agent = Agent(here)
    with contextlib.ExitStack() as agent.held:
        async with asyncio.TaskGroup() as tasks:
            answering = set()
            while line := await _line(reader):
                request = _requests.decode(line)
                if request.ask is not None:
                    answering.add(tasks.create_task(_answer(agent, request.id, request.ask, write)))
            for task in answering:
                task.cancel()


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line; empty at the end, also of one who has gone without a word."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(SILENT_S):
            return await reader.readline()
    return b""


async def _answer(agent: Agent, number: int, ask: Ask, write: Callable[[bytes], Awaitable[None]]) -> None:
    async def tell(**what: Any) -> None:
        with contextlib.suppress(ConnectionError):  # who asked has gone, which is seen where lines are read
            await write(msgspec.json.encode(Answer(id=number, **what)) + b"\n")

    try:
        async with contextlib.aclosing(agent.answer(ask)) as parts:
            result = b"null"
            async for is_last, data in parts:
                if is_last:
                    result = data
                else:
                    await tell(last=False, value=msgspec.Raw(data))
        await tell(last=True, value=msgspec.Raw(result))
    except MvmciError as error:
        kind = type(error).__name__
        await tell(last=True, error=Failure(kind=kind, message=error.message, hint=error.hint))
    except OSError as error:
        why = f"{error.filename or 'a file'} cannot be written: {error.strerror}"
        hint = "see that this machine has room and the rights"
        await tell(last=True, error=Failure(kind="Usage", message=why, hint=hint))


class Agent:
    """What one channel has: the lock, and the keys of units that have no file yet."""

    def __init__(self, here: Local) -> None:
        self.here = here
        self.held: contextlib.ExitStack
        self._owner = ""  # of the cluster, as who has the lock says
        self._keys: dict[str, str] = {}
        self._beginning = asyncio.Lock()

    async def answer(self, ask: Ask) -> AsyncGenerator[tuple[bool, bytes], None]:
        """What there is to tell: whether it is the last, and JSON. Raises MvmciError, OSError."""
        here = self.here
        if isinstance(ask, Watch):
            async for seen in here.watch():
                yield False, msgspec.json.encode(Report(units=seen))
        elif isinstance(ask, Log):
            async for data in here.log(ask.name, follow=ask.follow, last=ask.last):
                yield False, msgspec.json.encode(data)
        elif isinstance(ask, Lock):
            await self._lock(ask)
        elif isinstance(ask, Unlock):
            self.held.close()
        elif isinstance(ask, Keys):
            yield True, msgspec.json.encode([self._key(one) for one in ask.units])
        elif isinstance(ask, Provide):
            self._own()
            for name, data in ask.files.items():
                write_private(here.files.config(name), with_seed(data, self._keys[name]))
        elif isinstance(ask, Begin):
            async with self._beginning:
                await here.start(ask.start.units, attached=ask.attached)
            yield True, msgspec.json.encode("" if ask.attached else here.after_boot)
        elif isinstance(ask, Stop):
            async with self._beginning:  # of one who gave that up, it would miss what is not there yet
                pass
            yield True, msgspec.json.encode(await here.stop(ask.names, ask.grace_s))
        elif isinstance(ask, Observe):
            yield True, msgspec.json.encode(Report(units=await here.observe()))
        else:
            await asyncio.to_thread(_forget, here.files.folder)

    async def _lock(self, ask: Lock) -> None:
        """Raises LockHeld, and Usage where a cluster of the same name is here that is another."""
        end = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                return self._try_lock(ask)
            except LockHeld:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(LOCK_PAUSE_S)

    def _try_lock(self, ask: Lock) -> None:
        folder = private_folder(self.here.files.folder)
        name, file = self.here.cluster, folder / OWNER
        with contextlib.ExitStack() as held:
            hint = "wait until it has finished, then try again"
            held.enter_context(hold(folder / "lock", f"is at work on {name}", hint, ask.who))
            check_owner(file.read_text() if file.exists() else "", ask.owner, name, folder)
            self.held.enter_context(held.pop_all())
        self._owner = ask.owner

    def _own(self) -> None:
        """Say whose cluster it is, before the first of its files is here."""
        file = self.here.files.folder / OWNER
        if not file.exists():
            write_private(file, self._owner.encode())

    def _key(self, unit: Wanted) -> Key:
        file = self.here.files.config(unit.name)
        there, key, generation = without_seed(file.read_bytes() if file.exists() else b"")
        if not key or generation != unit.generation:
            there, key = b"", self._keys.get(unit.name) or new_key(unit.role)
        self._keys[unit.name] = key
        return Key(public=public_of(unit.role, key), there=there)


def _forget(folder: Path) -> None:
    gone = folder.with_name(f"_{folder.name}.removed")
    if folder.exists():
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)  # at once, so that nobody takes what is left of it for a cluster
        sync_folder(folder.parent)
    if gone.exists():
        shutil.rmtree(gone)


async def remove(here: Local) -> None:
    """Stop the units that an `up` on another machine left here, and remove all that is kept of the cluster.
    Raises NotFound where none did, MvmciError."""
    folder = here.files.folder
    if not (folder / OWNER).exists():
        raise NotFound(
            f"{folder} is not of a cluster that was brought up from another machine",
            hint="`mvmci down --purge` removes one that was brought up from here",
        )
    await here.stop(grace_s=0)
    await asyncio.to_thread(_forget, folder)


def check_owner(there: str, owner: str, name: str, folder: object) -> None:
    """Raises Usage where the cluster `name`, which `there` says whose it is, is not that of `owner`."""
    if there not in ("", owner):
        raise Usage(
            f"another cluster named {name} is there, which was brought up from elsewhere",
            hint=f"give this one another name; what is there lies in {folder}",
        )


async def serve_stdio(here: Local) -> None:
    """Answer on this process's own streams. What is at their other end is one program, over ssh."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    lock = asyncio.Lock()

    def put(line: bytes) -> None:
        rest, out = memoryview(line), sys.stdout.fileno()  # of the stream, a reader's end would be our end
        while rest:
            try:
                rest = rest[os.write(out, rest) :]
            except BlockingIOError:  # sshd gives one socket for both ways, and we wait at none of them
                if not select.select([], [out], [], SILENT_S)[1]:
                    raise ConnectionAbortedError from None  # this thread would keep the process

    async def write(line: bytes) -> None:
        async with lock:
            await asyncio.to_thread(put, line)

    await serve(here, reader, write)
