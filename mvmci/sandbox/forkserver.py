"""The parent's side of slots: starts the zygote, asks it for children, talks frames with them.

Owns the zygote process and every child's socket. It promises that a child ends when its `Child` is
killed or closed, when the zygote dies, and when this process dies, however that happens; that what a
child sends is decoded within bounds or ends it; and that a signal goes to the very process that was
forked, never to a number that was used again. It does not perform effects and does not judge what a
guest says. It belongs to one event loop.

A zygote that died is not brought back: `fork` says so, and the caller starts another fork server.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Self, cast

import msgspec

from mvmci.errors import IsolationUnavailable, MvmciError
from mvmci.sandbox import confinement, frames, wire, zygote
from mvmci.sandbox.confinement import Profile
from mvmci.system import processes

START_S_MAX = 30.0
CLOSE_S_MAX = 10.0
RECEIVE_BYTES = 256 << 10
STDERR_BYTES_MAX = 2000
PACKAGES = ("mvmci", "wasmtime", "msgspec")  # what a zygote imports beyond the standard library

_BOOTSTRAP = """
import sys
sys.path[:0] = sys.argv[2:]
from mvmci.sandbox.zygote import run_zygote
run_zygote(sys.argv[1])
"""
_STATUS_SENTENCES = {
    wire.EXIT_UNCONFINED: "it could not be confined",
    wire.EXIT_CRASHED: "it failed",
    wire.EXIT_NO_CODE: "the compiled code was missing or was refused",
}


class SlotDied(MvmciError):
    """A child ended, or was ended, without saying how its task ended."""


class SlotLost(SlotDied):
    """A child was ended by the host, or could not begin, through no fault of what it was to run."""


class CodeGone(SlotDied):
    """A child could not map the code that it was to run; nothing of the guest has run."""


class NoSlot(MvmciError):
    """This host makes no process now; nothing has begun."""


class ForkServerDied(MvmciError):
    """The process that slots are forked from is gone."""


class Child:
    """One forked process and the frames to and from it."""

    def __init__(self, pid: int, pidfd: int, connection: socket.socket) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._connection = connection
        self._splitter = frames.Splitter()
        self._received: deque[bytes] = deque()
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._killed_for: str | None = None
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None  # of who receives
        self._can_write: asyncio.Event | None = None  # of who sends
        self._listening = False
        self._said_all = False

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return not self._ended.done()

    async def send(self, frame: frames.Frame) -> None:
        """Hand `frame` to the child, waiting while it does not read. Raises SlotDied, ValueError."""
        data = memoryview(frames.encode(frame))
        while data:
            try:
                data = data[self._connection.send(data) :]
            except BlockingIOError:
                await self._writable()
            except OSError:
                raise await self._died() from None

    async def receive(self) -> frames.ToParent:
        """The child's next frame. Raises SlotDied when there is none, or when it is not one.

        A call that is cancelled loses nothing.
        """
        while not self._received:
            if self._said_all:
                raise await self._died()
            await self._hear()
        try:
            return frames.to_parent.decode(self._received.popleft())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise await self._died("it sent something that is not a frame") from None

    async def _hear(self) -> None:
        """Until something came, or its end.

        The loop goes on listening for the next time: a warm slot is spoken with often.
        """
        if not self._listening:
            self._loop.add_reader(self._connection, self._on_readable)
            self._listening = True
        waiting = self._waiting = self._loop.create_future()
        try:
            await waiting
        finally:
            if self._waiting is waiting:
                self._waiting = None

    def _on_readable(self) -> None:
        """Called by the loop. What nobody waits for stays where it is: a child cannot fill our memory."""
        if self._waiting is None:
            self._stop_listening()
            return
        try:
            data = self._connection.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            self._received.extend(self._splitter.feed(data))
        except ValueError as error:
            self._killed_for = self._killed_for or f"it sent {error}"
            self._received.clear()
            data = b""
        if not data:
            self._said_all = True
            self._stop_listening()
        if (data and not self._received) or self._waiting.done():
            return
        self._waiting.set_result(None)

    def _stop_listening(self) -> None:
        if self._listening:
            self._loop.remove_reader(self._connection)
            self._listening = False

    def kill(self, number: int = signal.SIGKILL) -> None:
        """SIGKILL, at once and for sure, or another signal; nothing if it has ended."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    async def wait(self) -> int:
        """Its status as `os.waitpid` gives it, once it has ended."""
        return await asyncio.shield(self._ended)

    async def close(self) -> None:
        """Kill it if it lives, wait for its end, and let go of the socket."""
        self.kill()
        try:
            await self.wait()
        finally:
            self.disconnect()  # also for a caller that is cancelled here: it was killed

    def disconnect(self) -> None:
        """Let go of the socket."""
        self._stop_listening()
        self._connection.close()

    async def _writable(self) -> None:
        ready = self._can_write = asyncio.Event()
        self._loop.add_writer(self._connection, ready.set)
        try:
            await ready.wait()
        finally:
            # One that was cancelled may come here when the next already waits.
            if self._can_write is ready:
                self._loop.remove_writer(self._connection)

    async def _died(self, offence: str | None = None) -> SlotDied:
        """Kill it, whatever it still does: it has no more to say. The first offence is remembered."""
        self._killed_for = self._killed_for or offence
        self.kill()
        status = await self.wait()
        code = os.waitstatus_to_exitcode(status)
        died = SlotDied if self._killed_for else _ENDS.get(code, SlotDied)
        return died(f"the slot process {self._killed_for or _sentence(status)}")

    def ended(self, status: int) -> None:
        """Called by the fork server, once, when it is known to have ended."""
        if not self._ended.done():
            self._ended.set_result(status)
            os.close(self.pidfd)
            self.pidfd = -1


# A process that we did not kill was killed for want of memory, or with its zygote.
_ENDS = {wire.EXIT_NO_CODE: CodeGone, wire.EXIT_UNCONFINED: SlotLost, -signal.SIGKILL: SlotLost}


def _sentence(status: int) -> str:
    """How a process ended, to stand behind "the slot process"."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code in _STATUS_SENTENCES:
        return f"ended because {_STATUS_SENTENCES[code]}"
    return f"ended with status {code} without saying how its task ended"


class ForkServer:
    """Where slots come from. Made by `start`."""

    def __init__(
        self, root: Path, process: subprocess.Popen[bytes], control: socket.socket, log: int
    ) -> None:
        self.root = root
        self.features: frozenset[str] = frozenset()  # the layers that a slot reaches on this host
        self._hides = False  # programs of our own user can be kept from the folder above the root
        self._process = process
        self._control = control
        self._log = log  # what the zygote writes to its standard error
        self._children: dict[int, Child] = {}
        self._waiting: dict[int, tuple[socket.socket, asyncio.Future[Child]]] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._died: str | None = None
        self._number = 0
        self._senders: set[asyncio.Event] = set()  # who waits until the control socket can be written

    @classmethod
    async def start(
        cls,
        root: Path,
        *,
        network: bool = False,
        without: frozenset[str] = frozenset(),
        probe: str | None = None,
    ) -> Self:
        """Start a zygote whose current directory is `root`, a directory that slots' users can enter.

        With `network` its children keep the host's network: for programs, not for guests. `without`
        names layers of confinement to leave out, and `probe` a `module:function` for children of
        profile `probe` to run: both are for tests. Raises IsolationUnavailable, ForkServerDied.
        """
        assert without <= confinement.LAYERS
        forkserver = cls(root, *_spawn(root, network, without, probe))
        asyncio.get_running_loop().add_reader(forkserver._control, forkserver._on_message)
        try:
            async with asyncio.timeout(START_S_MAX):
                await forkserver._ready
                forkserver.features = await forkserver._layers()
        except BaseException as error:
            await forkserver.close()
            if isinstance(error, TimeoutError):
                raise ForkServerDied(f"the slots' zygote did not start within {START_S_MAX:.0f} s") from None
            raise
        return forkserver

    @property
    def alive(self) -> bool:
        """Whether it can fork, as far as is known."""
        return self._died is None

    @property
    def isolation(self) -> str:
        """The level, one of `confinement.LEVELS`, that slots of this fork server reach."""
        return confinement.level(self.features)

    @property
    def parts_programs(self) -> bool:
        """Whether native programs are out of reach of the folder above the root, where keys lie."""
        return self._hides or "uid" in self.features

    def slot_uid(self, index: int) -> int | None:
        """The user of slot `index`; None where slots cannot have one of their own."""
        return confinement.SLOT_UID_BASE + index if "uid" in self.features else None

    async def fork(self, profile: Profile, streams: Sequence[int] = ()) -> Child:
        """A new child, confined and ready for its first task.

        `streams` are the descriptors that its task uses: three for a command or a program, module and
        target for a compile. The caller keeps (and closes) its own. Raises NoSlot, ForkServerDied.
        """
        if self._died is not None:
            raise ForkServerDied(self._died)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._number += 1
        number = self._number
        answer: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (ours, answer)
        message = msgspec.json.encode(zygote.Fork(number=number, profile=profile))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno(), *streams]))]
        try:
            await self._send(message, rights)
        except BaseException:
            self._waiting.pop(number, None)
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(_discard)  # the child may come yet, and must not stay
            raise

    async def close(self) -> None:
        """Kill every child and the zygote, and wait until they are gone."""
        self._mark_dead("the fork server was closed")
        for child in list(self._children.values()):
            child.kill()
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        await self._all_gone()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    async def _send(self, message: bytes, rights: list[tuple[int, int, array.array[int]]]) -> None:
        while True:
            try:
                self._control.sendmsg([message], rights)
                return
            except BlockingIOError:
                await self._writable()
            except OSError:
                self._mark_dead(self._last_words())
                raise ForkServerDied(cast(str, self._died)) from None

    async def _writable(self) -> None:
        ready = asyncio.Event()
        self._senders.add(ready)
        asyncio.get_running_loop().add_writer(self._control, self._wake_senders)
        try:
            await ready.wait()
        finally:
            self._senders.discard(ready)
            if not self._senders and self._died is None:
                asyncio.get_running_loop().remove_writer(self._control)

    def _wake_senders(self) -> None:
        for ready in self._senders:
            ready.set()

    async def _layers(self) -> frozenset[str]:
        uid = confinement.SLOT_UID_BASE if os.geteuid() == 0 else None
        child = await self.fork(Profile(name="layers", uid=uid))
        try:
            ended = await child.receive()
        except SlotDied as error:
            raise IsolationUnavailable(f"no slot can be started on this host: {error}") from None
        finally:
            await child.close()
        assert isinstance(ended, frames.Ended)
        return frozenset(msgspec.json.decode(ended.text, type=list[str]))

    def _on_message(self) -> None:
        """Read one message of the zygote's; called by the loop."""
        try:
            space = socket.CMSG_SPACE(zygote.FDS_MAX * 4)
            data, ancillary, _, _ = self._control.recvmsg(
                zygote.FORK_BYTES_MAX, space, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        if not data:
            self._mark_dead(self._last_words())
            return
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        match msgspec.json.decode(data, type=zygote.FromZygote):
            case zygote.Ready(hides=hides):
                self._hides = hides
                self._ready.set_result(None)
            case zygote.Forked(number=number, pid=pid):
                connection, answer = self._waiting.pop(number)
                child = self._children[number] = Child(pid, fds[0], connection)
                answer.set_result(child)
            case zygote.ForkRefused(number=number, why=why):
                connection, answer = self._waiting.pop(number)
                connection.close()
                answer.set_exception(NoSlot(f"no slot process could be made: {why}"))
            case zygote.ChildExited(number=number, status=status):
                self._children.pop(number).ended(status)

    def _mark_dead(self, why: str) -> None:
        """The zygote is gone, or goes now: it forks no more, and its children die with it."""
        if self._died is not None:
            return
        self._died = why
        self._wake_senders()  # they find out
        asyncio.get_running_loop().remove_reader(self._control)
        asyncio.get_running_loop().remove_writer(self._control)
        self._control.close()
        if not self._ready.done():
            self._ready.set_exception(ForkServerDied(why))
            self._ready.exception()  # looked at, whether or not somebody waits
        for connection, answer in self._waiting.values():
            connection.close()
            if not answer.done():
                answer.set_exception(ForkServerDied(why))
                answer.exception()
        self._waiting.clear()
        for child in self._children.values():
            self._watch(child)

    def _watch(self, child: Child) -> None:
        """Learn of the end of a child that has nobody left to report it: it was killed."""
        loop = asyncio.get_running_loop()
        pidfd = child.pidfd
        child.kill()  # the kernel does it too, unless the child was forked just now

        def gone() -> None:
            loop.remove_reader(pidfd)
            child.ended(signal.SIGKILL)

        loop.add_reader(pidfd, gone)

    async def _all_gone(self) -> None:
        async with asyncio.timeout(CLOSE_S_MAX):
            for child in self._children.values():
                await child.wait()
        for child in self._children.values():
            child.disconnect()
        self._children.clear()

    def _last_words(self) -> str:
        size = os.fstat(self._log).st_size if self._log >= 0 else 0
        text = os.pread(self._log, STDERR_BYTES_MAX, max(0, size - STDERR_BYTES_MAX)) if size else b""
        lines = text.decode(errors="replace").strip().splitlines()
        return f"the slots' zygote ended{': ' + lines[-1] if lines else ''}"


def _discard(answer: asyncio.Future[Child]) -> None:
    if not answer.cancelled() and answer.exception() is None:
        child = answer.result()
        child.kill()
        child.disconnect()


def _spawn(
    root: Path, network: bool, without: frozenset[str], probe: str | None
) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    """The zygote's process, our end of its control socket, and its standard error as a file."""
    processes.mend_program()  # it loads all of it anew
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    log = os.memfd_create("zygote-stderr", os.MFD_CLOEXEC)
    start = zygote.ZygoteStart(
        parent=os.getpid(), network=network, without=without, control=theirs.fileno(), probe=probe
    )
    argument = msgspec.json.encode(start).decode()
    packages = PACKAGES if probe is None else (*PACKAGES, probe.partition(".")[0])
    roots = dict.fromkeys(map(_root, packages))
    flags = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, *flags, "-c", _BOOTSTRAP, argument, *roots],
            cwd=root,
            env=_environment(),  # clearing it later would leave it readable in /proc
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    return process, ours, log


def _environment() -> dict[str, str]:
    """Nothing, but for a Python that finds its own library by it."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _root(package: str) -> str:
    """The directory that a zygote imports it from. It is not imported here."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise IsolationUnavailable(f"the package {package} is not installed")
    return str(Path(next(iter(spec.submodule_search_locations))).resolve().parent)
