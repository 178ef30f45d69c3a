"""The small process that slots are forked from: everything imported, nothing else going on.

Owns no job, no secret and no credential: its environment is empty, or says where Python's library is; its
only descriptors are a control socket and the null device, and it is single-threaded, so that a fork is a
clean copy. It forks a child per request, hands back a pidfd, and reports how each child ended. It ends
when the control socket closes or its parent dies, and its children end with it.

On the control socket (SOCK_SEQPACKET, one JSON value a message): `Fork` comes in with the child's
end of a socket pair and its streams as descriptors; `Forked` goes out with a pidfd, then, once,
`ChildExited`. `Ready` is said first.
"""

from __future__ import annotations

import array
import fcntl
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import msgspec

from mvmci.sandbox import confinement, frames, settings, wire
from mvmci.sandbox.confinement import Profile
from mvmci.system import linux

FORK_BYTES_MAX = 64 << 10
FDS_MAX = 8
SOCKET_FD = 3  # in a child: its socket, its memory meter, and its streams
METER_FD = 4
STREAM_FD = 5
MOVED_FD = 100  # where descriptors wait while they change places


class ZygoteStart(msgspec.Struct, frozen=True, kw_only=True):
    """The one argument of the process."""

    parent: int
    network: bool
    without: frozenset[str]
    control: int  # the descriptor of the control socket
    probe: str | None  # `module:function` that a child of profile `probe` runs; for tests


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    network: bool  # it is out of the host's network
    hides: bool  # programs that have our own user can be kept from the folder above the root


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    profile: Profile


class Forked(msgspec.Struct, frozen=True, kw_only=True, tag="forked"):
    number: int
    pid: int


class ForkRefused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    number: int
    why: str


class ChildExited(msgspec.Struct, frozen=True, kw_only=True, tag="exited"):
    number: int
    status: int  # as waitpid gives it


FromZygote = Ready | Forked | ForkRefused | ChildExited

Probe = Callable[[frozenset[str]], str]


def run_zygote(argument: str) -> NoReturn:
    """Serve until the control socket closes. `argument` is a `ZygoteStart` as JSON."""
    start = msgspec.json.decode(argument, type=ZygoteStart)
    control = socket.socket(fileno=start.control)
    control.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.umask(0o022)  # what a guest makes does not depend on who started us
    _enlarge_stack()
    # Everything is loaded before the first fork: a confined child can open no file of ours.
    from mvmci.sandbox import slot
    from mvmci.sandbox.program import can_hide, supervise_program

    probe: Probe | None = None
    if start.probe is not None:
        module, _, name = start.probe.partition(":")
        probe = getattr(importlib.import_module(module), name)
    slot.prepare_slot()
    hides = os.geteuid() != 0 and "namespace" not in start.without and can_hide(os.path.dirname(os.getcwd()))
    unshared = not start.network and "namespace" not in start.without and confinement.leave_network()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.die_with(start.parent)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    gc.collect()
    gc.freeze()
    control.send(msgspec.json.encode(Ready(network=unshared, hides=hides)))
    _ControlLoop(control, start, unshared, _Tasks(slot.serve_slot, supervise_program, probe)).serve()
    os._exit(0)


def _enlarge_stack() -> None:
    """The main thread's stack may grow to what guests are promised; it is a bound, not memory."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    most = settings.STACK_BYTES if hard == resource.RLIM_INFINITY else min(settings.STACK_BYTES, hard)
    if most < settings.STACK_BYTES_MIN:
        sys.exit(f"the hard limit of the stack is {most} bytes, and {settings.STACK_BYTES_MIN} are needed")
    resource.setrlimit(resource.RLIMIT_STACK, (most, hard))


class _Tasks(NamedTuple):
    """What children run, loaded before any fork."""

    serve: Callable[[str, int, int, int], None]
    supervise: Callable[[frames.RunProgram, tuple[int, int, int], int | None], frames.Ended]
    probe: Probe | None


class _ControlLoop:
    """The control loop."""

    def __init__(self, control: socket.socket, start: ZygoteStart, unshared: bool, tasks: _Tasks) -> None:
        self._control = control
        self._start = start
        self._unshared = unshared
        self._tasks = tasks
        self._pid = os.getpid()
        self._children: dict[int, tuple[int, int]] = {}  # pidfd -> number, pid
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def serve(self) -> None:
        """Until the control socket closes: fork, and report the ends."""
        while True:
            for fd, _ in self._poll.poll():
                if fd != self._control.fileno():
                    self._reap(fd)
                elif not self._request():
                    return

    def _request(self) -> bool:
        flags = socket.MSG_CMSG_CLOEXEC
        data, ancillary, _, _ = self._control.recvmsg(FORK_BYTES_MAX, socket.CMSG_SPACE(FDS_MAX * 4), flags)
        if not data:
            return False
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        request = msgspec.json.decode(data, type=Fork)
        try:
            pid = os.fork()
        except OSError as error:
            self._send(ForkRefused(number=request.number, why=f"fork failed: {error.strerror}"))
        else:
            if pid == 0:
                self._become(request.profile, list(fds))
            self._adopt(request.number, pid)
        for fd in fds:
            os.close(fd)
        return True

    def _adopt(self, number: int, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (number, pid)
        self._poll.register(pidfd, select.POLLIN)
        self._send(Forked(number=number, pid=pid), pidfd)

    def _reap(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        number, pid = self._children.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        self._send(ChildExited(number=number, status=status))

    def _send(self, message: FromZygote, *fds: int) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._control.sendmsg([msgspec.json.encode(message)], rights)
        except OSError:
            os._exit(0)  # nobody is there any more

    def _become(self, profile: Profile, fds: list[int]) -> NoReturn:
        """In the child: take the descriptors, be confined, run, and never return.

        Whatever goes wrong ends in a status that the parent puts into words: the child's own streams
        may belong to a guest.
        """
        status = wire.EXIT_CRASHED
        try:
            # Asked for now it could be somebody else's: the zygote may have died since the fork.
            parent = self._pid
            _arrange(fds, inherit=profile.name == "command")
            if profile.name == "program":
                linux.die_with(parent)
                linux.prctl(linux.PR_SET_DUMPABLE, 1)  # it has yet to write the maps of its namespace
                self._run_program(profile)
            else:
                status = wire.EXIT_UNCONFINED
                features = confinement.confine(profile, parent=parent, without=self._start.without)
                status = wire.EXIT_CRASHED
                self._run(profile, features | ({"network"} if self._unshared else frozenset()))
            status = 0
        finally:
            os._exit(status)

    def _run(self, profile: Profile, features: frozenset[str]) -> None:
        if profile.name == "layers":
            text = msgspec.json.encode(sorted(features)).decode()
            wire.send(SOCKET_FD, frames.Ended(outcome="ok", text=text))
        elif profile.name == "probe":
            assert self._tasks.probe is not None
            wire.send(SOCKET_FD, frames.Ended(outcome="ok", text=self._tasks.probe(features)))
        else:
            self._tasks.serve(profile.name, SOCKET_FD, METER_FD, STREAM_FD)

    def _run_program(self, profile: Profile) -> None:
        task = wire.read_task(SOCKET_FD)
        if task is not None:
            assert isinstance(task, frames.RunProgram)
            streams = (STREAM_FD, STREAM_FD + 1, STREAM_FD + 2)
            wire.send(SOCKET_FD, self._tasks.supervise(task, streams, profile.uid))


def _arrange(fds: list[int], *, inherit: bool) -> None:
    """Put socket, meter and streams where a child expects them, and close everything else.

    The meter is opened here because a confined process can open nothing of /proc.
    """
    meter = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, MOVED_FD) for fd in (fds[0], meter, *fds[1:])]
    streams = moved[2:]
    targets = [SOCKET_FD, METER_FD, *((0, 1, 2) if inherit else range(STREAM_FD, STREAM_FD + len(streams)))]
    for fd, target in zip(moved, targets, strict=True):
        os.dup2(fd, target, inheritable=target <= 2)
    if not inherit:
        os.dup2(1, 2)  # the zygote's own log is not for what a guest makes the engine say
    os.closerange(
        STREAM_FD if inherit else STREAM_FD + len(streams), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    )
