"""Shuts the calling process in, for good: what is left when a guest breaks out of WebAssembly.

Owns the layers and what each one denies. WebAssembly itself is the first wall and stands at every
level: a guest has only its preopened directories, its streams and the host functions. What follows
bounds native code that got past it. Each layer is applied as far as the host has it, and the ones
that were reached are returned; nothing is lowered in silence.

| layer        | denies to native code in the slot                                                  |
|--------------|------------------------------------------------------------------------------------|
| no-new-privs | gaining rights through an executable; all capabilities are dropped with it         |
| rlimits      | core dumps, more than its memory, its file size, its descriptors                   |
| uid          | other processes, files that are not the world's; a fork, by a limit of zero        |
| landlock     | every path but the profile's; also TCP (from ABI 4), signals to others (ABI 6)     |
| seccomp      | every system call but the listed: no socket, exec, fork, signal, trace, mount      |
| network      | everything but an empty network, by a namespace that the zygote has entered before |

| level    | layers                       | so native code cannot                                     |
|----------|------------------------------|-----------------------------------------------------------|
| process  | neither landlock nor seccomp | gain rights, or outlive its parent                        |
| filtered | landlock, or seccomp         | read files outside; or start, signal or trace a process,  |
|          |                              | or make a socket                                          |
| confined | landlock and seccomp         | do any of these                                           |
| isolated | all of the first table       | do so where one layer has a hole either                   |

It does not bound CPU time (the parent kills), and does not hide that files exist: `stat` passes
Landlock. Without another uid, a process that was not confined (the parent) is protected from a slot
by Landlock and seccomp alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
from typing import Literal

import msgspec

from mvmci.system import linux
from mvmci.system.linux import checked, libc

LEVELS = ("process", "filtered", "confined", "isolated")
LAYERS = frozenset({"uid", "landlock", "seccomp", "namespace"})  # those that tests may leave out
SLOT_UID_BASE = 64000
COMPILE_UID = SLOT_UID_BASE - 1
THREADS_MAX = 512  # of a slot that may have threads, where its uid is its own


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is for, and what it may have. Paths are relative to the fork server's root."""

    name: Literal["command", "workflow", "compile", "program", "layers", "probe"]
    uid: int | None = None
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    threads: bool = False
    data_bytes: int = 4 << 30  # writable private memory of the whole process, the guest's included
    file_bytes: int = 1 << 30  # of any one file; a write beyond it is EFBIG
    files_max: int = 256


def level(features: frozenset[str]) -> str:
    """The name, one of `LEVELS`, of what `features` amount to."""
    filters = {"landlock", "seccomp"} & features
    if len(filters) < 2:
        return "filtered" if filters else "process"
    return "isolated" if {"uid", "network"} <= features else "confined"


def confine(profile: Profile, *, parent: int, without: frozenset[str] = frozenset()) -> frozenset[str]:
    """Confine this single-threaded process for good; the layers reached.

    `parent` is the process it must not outlive. `without` names `LAYERS` to leave out. Raises
    OSError when a layer that the host has cannot be applied; the caller must then exit.
    """
    features = {"no-new-privs", "rlimits"}
    with contextlib.suppress(PermissionError):
        os.setsid()
    if profile.uid is not None and "uid" not in without and _change_user(profile.uid):
        features.add("uid")
    linux.die_with(parent)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # traced and inspected by nobody
    _forgo_privileges()
    if "landlock" not in without and _landlock(profile.readable, profile.writable):
        features.add("landlock")
    _limit(profile, own_user="uid" in features)
    if "seccomp" not in without and _seccomp(profile.threads):
        features.add("seccomp")
    return frozenset(features)


# ---- processes and rights

SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION = 0x20080522


def _change_user(uid: int) -> bool:
    if os.geteuid() != 0:
        return False
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
    except OSError:
        return False  # a user namespace that has no such id, or a container without the right
    os.setresuid(uid, uid, uid)
    return True


def _forgo_privileges() -> None:
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    capability = 0
    while libc.prctl(linux.PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    header = struct.pack("Ii", CAPABILITY_VERSION, 0)
    checked(libc.syscall(_number("capset"), header, bytes(24)), "capset")


def _limit(profile: Profile, *, own_user: bool) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        # Bounds what a guest can touch: a reservation without access does not count towards it.
        resource.RLIMIT_DATA: profile.data_bytes,
        resource.RLIMIT_FSIZE: profile.file_bytes,
        resource.RLIMIT_NOFILE: profile.files_max,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if not profile.threads:
        limits[resource.RLIMIT_NPROC] = 0
    elif own_user:
        limits[resource.RLIMIT_NPROC] = THREADS_MAX
    linux.lower_limits(limits)


def leave_network() -> bool:
    """Move this process into an empty network namespace; False where the host does not allow it."""
    as_root = os.geteuid() == 0 and linux.unshare(linux.CLONE_NEWNET)
    return as_root or linux.unshare_as_user(linux.CLONE_NEWNET)


# ---- Landlock

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on both machines
_READ = 0xC  # files and directories; nothing is ever executed
# All but execute (bit 0), devices (6, 11, 15), sockets (9) and fifos (10), which no guest can make.
_NEVER = 0x8E41
_OF_FILES = 0xC006  # the rights that a rule for a single file may hold


def _landlock(readable: tuple[str, ...], writable: tuple[str, ...]) -> bool:
    abi = int(libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))
    if abi < 1:
        return False
    handled = 0x1FFF | (0x2000 if abi >= 2 else 0) | (0x4000 if abi >= 3 else 0) | (0x8000 if abi >= 5 else 0)
    network = 3 if abi >= 4 else 0  # bind and connect over TCP: nothing is allowed
    scoped = 3 if abi >= 6 else 0  # abstract sockets and signals: none to outside
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = struct.pack("QQQ", handled, network, scoped)[:size]
    rules = checked(libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0), "landlock")
    for paths, access in ((readable, _READ), (writable, handled & ~_NEVER)):
        for path in paths:
            _allow_beneath(rules, path, access)
    checked(libc.syscall(LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    os.close(rules)
    return True


def _allow_beneath(rules: int, path: str, access: int) -> None:
    directory = os.path.isdir(path)
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    rule = struct.pack("=Qi", access if directory else access & _OF_FILES, beneath)
    checked(libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0), f"landlock rule for {path}")
    os.close(beneath)


# ---- seccomp

_MACHINE = platform.machine()
_COLUMN, _AUDIT = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(_MACHINE, (0, 0))
_NONE = -1  # the machine has no such call

# Number on x86_64 and on aarch64. The commonest first: the filter is a list.
_CALLS: dict[str, tuple[int, int]] = {
    "read": (0, 63),
    "write": (1, 64),
    "futex": (202, 98),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "epoll_wait": (232, _NONE),
    "epoll_pwait": (281, 22),
    "openat": (257, 56),
    "openat2": (437, 437),
    "close": (3, 57),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "stat": (4, _NONE),
    "lstat": (6, _NONE),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "getdents64": (217, 61),
    "readlink": (89, _NONE),
    "readlinkat": (267, 78),
    "symlinkat": (266, 36),
    "linkat": (265, 37),
    "unlinkat": (263, 35),
    "mkdirat": (258, 34),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "utimensat": (280, 88),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "fadvise64": (221, 223),
    "copy_file_range": (326, 285),
    "fstatfs": (138, 44),
    "statfs": (137, 43),
    "getcwd": (79, 17),
    "dup": (32, 23),
    "brk": (12, 214),
    "mremap": (25, 216),
    "poll": (7, _NONE),
    "ppoll": (271, 73),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "eventfd2": (290, 19),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, _NONE),
    "getrandom": (318, 278),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "gettid": (186, 178),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# Allowed only with the right argument, or used by this module.
_GUARDED: dict[str, tuple[int, int]] = {
    "mmap": (9, 222),
    "prctl": (157, 167),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "tgkill": (234, 131),
    "clone": (56, 220),
    "clone3": (435, 435),
    "capset": (126, 91),
}
_PRCTL_OPTIONS = (15, 0x53564D41)  # name a thread, name a mapping
# Terminal or not, bytes waiting, non-blocking, close on exec: never TIOCSTI and its like.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# Duplicate, flags. Not the owner or the signal of a descriptor: they send signals.
_FCNTLS = (0, 1, 2, 3, 4, 1030)
# What glibc and musl pass when they start a thread, to the bit.
_THREAD_FLAGS = (0x3D0F00, 0x7D0F00)
_MAP_SHARED = 1  # the limit of memory counts private mappings alone

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_CALL_AT, _MACHINE_AT, _ARGUMENT_AT = 0, 4, 16  # offsets in struct seccomp_data; low halves, little endian
_X32 = 0x40000000

Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand


def _number(name: str) -> int:
    return (_CALLS | _GUARDED)[name][_COLUMN]


def _load(offset: int) -> Instruction:
    return (_LOAD, 0, 0, offset)


def _return(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _argument_in(call: int, argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow `call` if its 32-bit argument is one of `values`, refuse it with EPERM otherwise."""
    body = [_load(_ARGUMENT_AT + 8 * argument)]
    for value in values:
        body += [(_EQUAL, 0, 1, value), _return(_ALLOW)]
    body.append(_return(_ERRNO | _EPERM))
    return [(_EQUAL, 0, len(body), call), *body]


def _program(threads: bool, pid: int) -> bytes:
    """The filter, for `pid`: everything that is not listed is refused with EPERM."""
    code = [_load(_MACHINE_AT), (_EQUAL, 1, 0, _AUDIT), _return(_KILL), _load(_CALL_AT)]
    if _MACHINE == "x86_64":
        code += [(_AT_LEAST, 0, 1, _X32), _return(_KILL)]
    code += [(_EQUAL, 0, 4, _number("mmap")), _load(_ARGUMENT_AT + 8 * 3)]
    code += [(_ANY_BIT, 0, 1, _MAP_SHARED), _return(_ERRNO | _EPERM), _return(_ALLOW)]
    for numbers in _CALLS.values():
        if numbers[_COLUMN] != _NONE:
            code += [(_EQUAL, 0, 1, numbers[_COLUMN]), _return(_ALLOW)]
    code += _argument_in(_number("prctl"), 0, _PRCTL_OPTIONS)
    code += _argument_in(_number("ioctl"), 1, _IOCTLS)
    code += _argument_in(_number("fcntl"), 1, _FCNTLS)
    code += _argument_in(_number("tgkill"), 0, (pid,))  # abort() is a signal to oneself
    if threads:
        code += _argument_in(_number("clone"), 0, _THREAD_FLAGS)
    # A filter cannot look behind clone3's pointer; told that it is missing, libc uses clone.
    code += [(_EQUAL, 0, 1, _number("clone3")), _return(_ERRNO | _ENOSYS), _return(_ERRNO | _EPERM)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _seccomp(threads: bool) -> bool:
    if not _AUDIT:
        return False
    program = _program(threads, os.getpid())
    buffer = ctypes.create_string_buffer(program)
    filter_ = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    )
    result = libc.prctl(linux.PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(filter_), 0, 0)
    if result < 0 and ctypes.get_errno() == errno.EINVAL:  # a kernel built without filters
        return False
    return checked(result, "seccomp") == 0
