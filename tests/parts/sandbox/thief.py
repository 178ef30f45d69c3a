"""Native code that has broken out of WebAssembly, and what it tries. Runs inside a confined child.

`thief.json` in its current directory says what to try, and against whom.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from mvmci.sandbox.zygote import SOCKET_FD

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
Victims = dict[str, Any]


def check(result: int) -> str:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return f"returned {result}"


def read(path: str) -> str:
    with open(path, "rb") as file:
        return f"read {len(file.read())} bytes"


def write(path: str) -> str:
    with open(path, "wb") as file:
        return f"wrote {file.write(b'x')} bytes"


def send_sigio(victims: Victims) -> str:
    # Of its own socket, which would send it on the next byte with O_ASYNC; any signal can be chosen.
    return f"owner set: {fcntl.fcntl(SOCKET_FD, fcntl.F_SETOWN, victims['parent'])}"


def connect(victims: Victims) -> str:
    with socket.socket() as connection:
        connection.settimeout(2)
        connection.connect((b"127.0.0.1", victims["port"]))
        return "connected"


def fork(_: Victims) -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return f"forked {os.waitpid(pid, 0)}"


def open_descriptors(_: Victims) -> str:
    found = []
    for fd in range(1024):
        try:
            os.fstat(fd)
        except OSError:
            continue
        found.append(fd)
    return json.dumps(found)


def grow_file(_: Victims) -> str:
    with open("mine/big", "wb", buffering=0) as file:
        file.truncate(1 << 40)
    return "made a file of a tebibyte"


def thread_that_is_a_process(_: Victims) -> str:
    number = 56 if os.uname().machine == "x86_64" else 220
    pid = check(libc.syscall(number, signal.SIGCHLD, 0, 0, 0, 0))
    if pid == "returned 0":
        os._exit(0)
    return pid


ATTEMPTS: dict[str, Callable[[Victims], object]] = {
    "read a file of the world's": lambda _: read("/etc/passwd"),
    "read the parent's environment": lambda v: read(f"/proc/{v['parent']}/environ"),
    "read another slot's file": lambda _: read("other/secret"),
    "leave its directory by ..": lambda _: read("mine/../other/secret"),
    "write into another slot's directory": lambda _: write("other/planted"),
    "write beside its directory": lambda _: write("planted"),
    "list the root": lambda _: os.listdir("/"),
    "signal the parent": lambda v: os.kill(v["parent"], 0),
    "signal another slot": lambda v: os.kill(v["slot"], 0),
    "signal a thread of another slot": lambda v: check(
        libc.syscall(234 if os.uname().machine == "x86_64" else 131, v["slot"], v["slot"], 0)
    ),
    "have the kernel signal the parent": send_sigio,
    "trace another slot": lambda v: check(libc.ptrace(0x4206, v["slot"], None, None)),
    "trace the parent": lambda v: check(libc.ptrace(0x4206, v["parent"], None, None)),
    "make a socket": lambda _: socket.socket().close(),
    "make a local socket": lambda _: [end.close() for end in socket.socketpair()],
    "connect to the host": connect,
    "fork": fork,
    "clone": thread_that_is_a_process,
    "leave a namespace": lambda _: check(libc.unshare(0x10000000)),
    "mount": lambda _: check(libc.mount(b"none", b"mine", b"tmpfs", 0, None)),
    "set up io_uring": lambda _: check(libc.syscall(425, 8, ctypes.create_string_buffer(120))),
    "take a pidfd": lambda v: check(libc.syscall(434, v["parent"], 0)),
    "raise its limits": lambda _: check(libc.prlimit(0, 7, b"\xff" * 16, None)),
    "become root": lambda _: os.setresuid(0, 0, 0),
    "use more memory": lambda _: bytearray(1 << 30) and "took a gibibyte",
    "use memory that no limit counts": lambda _: mmap.mmap(-1, 1 << 20) and "shared memory",
    "make a file in memory": lambda _: os.memfd_create("hidden"),
    "make a large file": grow_file,
    "dump its environment": lambda _: json.dumps(dict(os.environ)),
    "list its descriptors": open_descriptors,
    "use its own directory": lambda _: write("mine/file"),
    "run another program": lambda _: os.execv("/bin/true", ["/bin/true"]),
}


def run(features: frozenset[str]) -> str:
    with open("thief.json") as file:
        victims = json.load(file)
    outcomes = {"features": sorted(features)}
    for name in victims["attempts"]:
        try:
            outcomes[name] = f"done: {ATTEMPTS[name](victims)}"
        except Exception as error:
            kind = "refused" if isinstance(error, (OSError, MemoryError)) else "broken"
            outcomes[name] = f"{kind}: {error!r}"
    return json.dumps(outcomes)
