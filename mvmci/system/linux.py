"""What Linux offers beyond Python's `os`: prctl, namespaces, limits, and whose child dies with whom.

Every call is made of the calling process, and raises OSError where the kernel refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
TFD_TIMER_ABSTIME = 1
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


def checked(result: int, what: str) -> int:
    """The result of a call on `libc`. Raises OSError, which names `what`, for a negative one."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def prctl(option: int, value: int) -> None:
    """Set one property of this process."""
    checked(libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def die_with(parent: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send us `signum` when our `parent` dies; at once if it already has."""
    prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


def stoppable() -> None:
    """What a child that we stop by a signal does between fork and exec: we may ignore it ourselves."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)


def dying_with_us(signum: int = signal.SIGKILL) -> Callable[[], None]:
    """What a child does between fork and exec, so that it ends when we say so, and does not outlive us."""
    parent = os.getpid()

    def prepare() -> None:
        stoppable()
        die_with(parent, signum)

    return prepare


def timer() -> int:
    """A descriptor that becomes readable at a moment of the monotonic clock: `set_timer` says at which."""
    return checked(libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC), "timerfd_create")


def set_timer(fd: int, at_ns: int) -> None:
    """Let `fd` be readable from `at_ns` on, which may be over, and not before."""
    moment = (ctypes.c_long * 4)(0, 0, *divmod(at_ns, 1_000_000_000))  # never again; s and ns
    checked(libc.timerfd_settime(fd, TFD_TIMER_ABSTIME, moment, None), "timerfd_settime")


def unshare(flags: int) -> bool:
    """Leave the namespaces of `flags` for new ones; False where the host does not allow it."""
    return bool(libc.unshare(flags) == 0)


def unshare_as_user(flags: int) -> bool:
    """The same in a user namespace, in which only our own uid and gid exist: without root.

    It is tried in a child first: a host may grant the namespaces and then refuse the mapping, and there is
    no way back. This process must be dumpable, or it may not write its own maps.
    """
    trial = os.fork()
    if trial == 0:
        with contextlib.suppress(OSError):
            _enter_user_namespace(flags)
            os._exit(0)
        os._exit(1)
    if os.waitpid(trial, 0)[1] != 0:
        return False
    _enter_user_namespace(flags)
    return True


def _enter_user_namespace(flags: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    checked(libc.unshare(CLONE_NEWUSER | flags), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def lower_limits(limits: Mapping[int, int]) -> None:
    """Set resource limits by their number in `resource`, both soft and hard; none is raised."""
    for number, value in limits.items():
        hard = resource.getrlimit(number)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (most, most))
