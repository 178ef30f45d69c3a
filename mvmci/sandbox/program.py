"""The child's side of `exec`: one native program, in a process tree that ends with it.

`supervise_program` runs in a process that was forked for it, and makes two more:

    supervisor ── init ── program ── …

Init is process 1 of a PID namespace where the host has one for us (root, or unprivileged user
namespaces), and then the kernel kills the whole tree with it. Elsewhere it is a subreaper that finds
its descendants in /proc and kills them until none is left. In both, when `supervise_program` returns, the
program and everything that it started are dead, daemons with a group of their own too; and when the
supervisor is killed, or nobody reads the program's standard output any more, they die as well.

SIGTERM to the supervisor goes on to the whole tree, which may then end by itself.

Promised to the caller: the end of the program itself, the limits on processes and file size, and that
the program has its three streams and no other descriptor. Not promised: a bound on memory or CPU
time, and, as a subreaper without a uid of its own, that a program which kills init leaves nothing
behind. Nothing here hides the host's files from the program; that is what its uid is for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from mvmci.sandbox import frames
from mvmci.system import linux
from mvmci.system.linux import checked, libc

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
COUNT_INTERVAL_S = 0.05
COUNT_SHARE = 10  # counting takes at most one part in so many of the time
THREADS_PER_PROCESS = 4  # what the kernel's own limit allows beyond ours, which counts threads
THREADS_BEYOND = 1000  # and so many more, so that we see what is growing before it fails by itself
REPORT_BYTES_MAX = 64 << 10
REASON_BYTES_MAX = 4000
HANDOVER_FD = 64  # streams wait at or above this one while they change places
_EXIT_FAILED = 72
# What we changed, and what whoever started us may have had ignored.
_DEFAULT = (
    signal.SIGCHLD,
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
)

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND = 2, 4, 8, 4096
_MS_REC_PRIVATE = 0x4000 | 1 << 18


class _Tree(msgspec.Struct, frozen=True, kw_only=True):
    """How the tree is held together."""

    namespace: bool  # init is process 1 of its own PID namespace
    others: int = 0  # threads of the same user that are not of this tree


def supervise_program(
    task: frames.RunProgram, streams: tuple[int, int, int], uid: int | None, *, namespaces: bool = True
) -> frames.Ended:
    """Run `task` to its end with `streams` as its 0, 1 and 2, as user `uid` where one is given.

    Returns when everything that it started is dead: outcome `exit` or `signal` with `code`, `limit`
    for `processes`, or `invalid` where it could not be started (`text` says why). The standard output
    is the lifeline: when its reader is gone, the tree is killed and the outcome is signal 9. The
    process that calls this is changed for good and should end soon after.
    """
    # From here on it waits, in init too, until somebody can hear of it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        tree = _isolate(uid, namespaces)
        lifeline, hold = os.pipe()
        report, tell = os.pipe()
        init = os.fork()
    except OSError as error:
        return frames.Ended(outcome="invalid", text=f"no process could be made: {error.strerror}")
    if init == 0:
        try:
            os.close(hold)
            os.close(report)
            try:
                ended = _Init(task, streams, uid, tree, lifeline).run()
            except OSError as error:
                ended = frames.Ended(
                    outcome="invalid", text=f"the program's place could not be made: {error}"
                )
            os.write(tell, msgspec.json.encode(ended)[:REPORT_BYTES_MAX])
            os._exit(0)
        finally:  # whatever happened, init never returns into its caller's code
            os._exit(_EXIT_FAILED)
    os.close(lifeline)
    os.close(tell)
    os.write(hold, b"%d" % init)
    return _follow(init, report, hold, streams[1], tree)


def _follow(init: int, report: int, hold: int, stdout: int, tree: _Tree) -> frames.Ended:
    """In the supervisor: wait for the report and for init's end, or bring both about."""
    wake = _signals_to_a_pipe(signal.SIGTERM)
    poll = select.poll()
    poll.register(report, select.POLLIN)
    poll.register(wake, select.POLLIN)
    poll.register(stdout, 0)  # POLLERR and POLLHUP only: nobody reads any more
    while report not in (ready := [fd for fd, _ in poll.poll()]):
        if wake in ready:
            os.read(wake, 4096)
            os.kill(init, signal.SIGTERM)
        if stdout in ready:
            poll.unregister(stdout)
            os.close(hold)
            os.kill(init, signal.SIGKILL if tree.namespace else signal.SIGCONT)
    os.waitpid(init, 0)
    data = os.read(report, REPORT_BYTES_MAX)
    if not data:
        return _killed("killed with its process tree")
    return msgspec.json.decode(data, type=frames.Ended)


def _isolate(uid: int | None, namespaces: bool) -> _Tree:
    """Put the children to come into a PID and a mount namespace of their own, if the host allows it."""
    me, flags = os.geteuid(), linux.CLONE_NEWPID | linux.CLONE_NEWNS
    if me == 0:
        return _Tree(namespace=namespaces and linux.unshare(flags))
    others = _threads_of(me)
    if not namespaces:
        return _Tree(namespace=False, others=others)
    entered = linux.unshare_as_user(flags)
    if entered:
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
    return _Tree(namespace=entered, others=others)


class _Init:
    """The process above the program: starts it, reaps, counts, and takes everything down with it."""

    def __init__(
        self,
        task: frames.RunProgram,
        streams: tuple[int, int, int],
        uid: int | None,
        tree: _Tree,
        lifeline: int,
    ) -> None:
        self._task = task
        self._streams = streams
        self._uid = uid
        self._tree = tree
        self._lifeline = lifeline
        self._directory = os.path.realpath(task.directory)
        self._env = {
            "PATH": DEFAULT_PATH,
            "HOME": self._directory,
            "TMPDIR": "/tmp",  # noqa: S108 -- a default that the caller replaces
            "LANG": "C.UTF-8",
            **dict(task.env),
        }

    def run(self) -> frames.Ended:
        """Until the program has ended, was stopped, or nobody wants it any more."""
        if self._tree.namespace:
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        else:
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        number = os.read(self._lifeline, 16)
        if not number:
            os._exit(_EXIT_FAILED)  # the supervisor is dead already
        self._root = int(number)
        self._private_proc = self._tree.namespace and self._mount()
        if self._must_hide and not self._private_proc:
            raise OSError(errno.EPERM, "it cannot be kept from the keys of mvmci any more")
        wake = _signals_to_a_pipe(signal.SIGCHLD, signal.SIGTERM)
        started = self._start()
        ended = started if isinstance(started, frames.Ended) else self._watch(started, wake)
        if not self._tree.namespace:
            self._kill_descendants()
        return ended

    @property
    def _must_hide(self) -> bool:
        return bool(self._task.hidden) and os.geteuid() != 0

    def _start(self) -> int | frames.Ended:
        says, say = os.pipe()
        try:
            program = os.fork()
        except OSError as error:
            return frames.Ended(outcome="invalid", text=f"no process could be made: {error.strerror}")
        if program == 0:
            held = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HANDOVER_FD) for fd in (*self._streams, say)]
            try:
                self._become(held)
            except OSError as error:
                what = self._task.argv[0] if error.filename is None else os.fsdecode(error.filename)
                _say(held[3], f"{what}: {error.strerror}")
            except ValueError as error:  # a NUL, or a '=' in the name of a variable
                _say(held[3], f"{self._task.argv[0]!r}: {error}")
            finally:
                os._exit(_EXIT_FAILED)
        os.close(say)
        why = os.read(says, REASON_BYTES_MAX)  # the end of file comes with the exec
        os.close(says)
        if why:
            return frames.Ended(outcome="invalid", text=why.decode(errors="replace"))
        for stream in set(self._streams):
            os.close(stream)
        return program

    def _watch(self, program: int, wake: int) -> frames.Ended:
        """Until the program has ended; once it was told to, until all have that it started."""
        poll = select.poll()
        poll.register(self._lifeline, select.POLLIN)
        poll.register(wake, select.POLLIN)
        due = time.monotonic() + COUNT_INTERVAL_S
        ended: frames.Ended | None = None
        told = False
        while True:
            ready = dict(poll.poll(max(0, due - time.monotonic()) * 1000))
            if self._lifeline in ready:
                return _killed("killed: nobody waits for it")
            if wake in ready:
                if signal.SIGTERM in os.read(wake, 4096):
                    told = True
                    self._tell_all(signal.SIGTERM, signal.SIGCONT)
                status = dict(_reaped()).get(program)
                if status is not None:
                    # A program that met the kernel's limit before we looked may give up by itself.
                    code = os.waitstatus_to_exitcode(status)
                    ended = self._crowded() or frames.Ended(
                        outcome="signal" if code < 0 else "exit", code=abs(code)
                    )
                if ended is not None and not (told and _has_children()):
                    return ended
            before = time.monotonic()
            if before >= due:
                if crowded := self._crowded():
                    return crowded
                after = time.monotonic()
                due = after + max(COUNT_INTERVAL_S, (after - before) * COUNT_SHARE)

    def _tell_all(self, *numbers: int) -> None:
        """To every process of the tree: what a shell started would hear nothing from it."""
        for number in numbers:
            for pid in [-1] if self._tree.namespace else descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _crowded(self) -> frames.Ended | None:
        if self._private_proc:
            count = sum(name.isdigit() for name in os.listdir("/proc")) - 1
        else:
            count = len(descendants(self._root))
        return frames.Ended(outcome="limit", limit="processes") if count > self._task.processes_max else None

    def _become(self, held: list[int]) -> NoReturn:
        """In the program's process: leave everything of ours behind, and exec.

        `held` are its streams, and what is left open until the exec.
        """
        parent = os.getppid()
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in _DEFAULT:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for target, fd in enumerate(held[:3]):
            os.dup2(fd, target)
        os.closerange(3, held[3])
        os.closerange(held[3] + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        os.chdir(self._directory)  # while the path to it is still open to us
        self._limit()
        if self._uid is not None and os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(self._uid, self._uid, self._uid)
            os.setresuid(self._uid, self._uid, self._uid)
        os.umask(0o022)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.die_with(parent)  # a change of uid had reset it
        os.execvpe(self._task.argv[0], list(self._task.argv), self._env)  # noqa: S606 -- never through a shell

    def _limit(self) -> None:
        limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: self._task.file_bytes}
        # The kernel's own limit is the backstop against what grows faster than we count. It is per
        # user, and root has none.
        ours = self._task.processes_max * THREADS_PER_PROCESS + THREADS_BEYOND
        limits[resource.RLIMIT_NPROC] = self._tree.others + ours
        linux.lower_limits(limits)

    def _mount(self) -> bool:
        """A /proc of our own, and a way to the workspace; whether there is such a /proc."""
        if libc.mount(None, b"/", None, _MS_REC_PRIVATE, None) != 0:
            return False
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        private: bool = libc.mount(b"proc", b"/proc", b"proc", flags, None) == 0
        if private and self._must_hide:
            self._cover(os.path.realpath(self._task.hidden))
        elif private and self._uid is not None and os.geteuid() == 0:
            self._open_the_way(self._uid)
        return private

    def _open_the_way(self, uid: int) -> None:
        """Make the absolute path of the workspace passable for the program's user.

        It may lie beneath a directory that only our user enters. That directory is covered, for this
        tree only, by an empty one that holds the way to the workspace and to TMPDIR and nothing else.
        """
        closed = _first_closed(self._directory, uid)
        if closed is not None:
            self._cover(closed)

    def _cover(self, closed: str) -> None:
        """Have a directory hold the workspace and TMPDIR, as far as they lie in it, and nothing else."""
        keep = [self._directory] if self._directory.startswith(f"{closed}/") else []
        temporary = os.path.realpath(self._env["TMPDIR"])
        beneath = temporary.startswith(f"{closed}/") and not f"{temporary}/".startswith(f"{self._directory}/")
        if beneath and os.path.isdir(temporary):
            keep.append(temporary)
        fds = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC) for path in keep]
        flags = _MS_NOSUID | _MS_NODEV
        checked(libc.mount(b"tmpfs", os.fsencode(closed), b"tmpfs", flags, b"mode=755,size=1m"), closed)
        for path, fd in zip(keep, fds, strict=True):
            os.makedirs(path, mode=0o755, exist_ok=True)
            checked(libc.mount(b"/proc/self/fd/%d" % fd, os.fsencode(path), None, _MS_BIND, None), path)
            os.close(fd)

    def _kill_descendants(self) -> None:
        """As a subreaper: until nothing is left. Stopped first, so that none forks ahead of the kill."""
        while True:
            if self._uid is not None and os.geteuid() == 0:
                _kill_all_of(self._uid)
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in descendants(os.getpid()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.001)


def can_hide(folder: str) -> bool:
    """Whether a program with our own user can be kept from `folder`, and from other processes of ours.

    Tried as it is done, in processes that end: not every host that grants namespaces lets one mount in them.
    """
    trial = os.fork()
    if trial == 0:
        try:
            if linux.unshare_as_user(linux.CLONE_NEWPID | linux.CLONE_NEWNS):
                init = os.fork()
                if init == 0:
                    os._exit(not _hides(folder))
                os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]))
        finally:
            os._exit(1)
    return os.waitpid(trial, 0)[1] == 0


def _hides(folder: str) -> bool:
    flags = _MS_NOSUID | _MS_NODEV
    return bool(
        libc.mount(None, b"/", None, _MS_REC_PRIVATE, None) == 0
        and libc.mount(b"proc", b"/proc", b"proc", flags | _MS_NOEXEC, None) == 0
        and libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, b"mode=755,size=1m") == 0
    )


def descendants(root: int) -> list[int]:
    """The processes beneath `root` in the /proc that is mounted, zombies included."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    todo = [root]
    while todo:
        beneath = children.pop(todo.pop(), [])
        found += beneath
        todo += beneath
    return found


def _threads_of(uid: int) -> int:
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _reaped() -> Iterator[tuple[int, int]]:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, status


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _signals_to_a_pipe(*numbers: int) -> int:
    """Where the numbers of these signals can be read from now on, as bytes."""
    wake, poke = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(poke, False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(poke, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    return wake


def _killed(why: str) -> frames.Ended:
    return frames.Ended(outcome="signal", code=int(signal.SIGKILL), text=why)


def _say(fd: int, text: str) -> None:
    os.write(fd, text.encode(errors="replace")[:REASON_BYTES_MAX])


def _first_closed(directory: str, uid: int) -> str | None:
    """The first directory on the way to `directory` that user and group `uid` cannot enter."""
    above = Path(directory).parents
    for path in reversed(above):
        status = path.stat()
        bit = 0o100 if status.st_uid == uid else 0o010 if status.st_gid == uid else 0o001
        if not status.st_mode & bit:
            return str(path)
    return None


def _kill_all_of(uid: int) -> None:
    """SIGKILL to every process of `uid` at once, which no fork outruns."""
    killer = os.fork()
    if killer == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(killer, 0)
