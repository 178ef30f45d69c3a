"""What a process, its family, its cgroup and its machine have used so far, as Linux counts it.

All of it is counters since a start, read when somebody asks: whoever wants shares reads twice. What cannot be
read (an old kernel, no cgroup) is zero.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import msgspec

TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_US, _NS_PER_US = 1_000_000, 1_000
_NO_LIMIT = 1 << 60  # version 1 says a number then, too
_MEMORY_COUNTS = ("memory.events", "memory.oom_control")
_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
PRESSURES = ("cpu", "io", "memory")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine: `boot` is this start of it, times in µs over all of its processors.

    `stalled` is how long something waited (`some`) or everything did (`full`), by pressure stall information.
    """

    boot: str
    model: str = ""  # of its processors
    processors: int
    busy_us: int
    memory_bytes: int
    free_bytes: int
    stalled: dict[str, int]  # µs, by "cpu.some", "io.full", …


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process and its family. Its loop is the main thread: that runs, waits for a processor, or idles.

    `children_us` has those of its children that have ended and were waited for.
    """

    loop_ran_us: int
    loop_waited_us: int
    cpu_us: int
    children_us: int
    children_waited_us: int
    memory_bytes: int
    files: int


class Cgroup(msgspec.Struct, frozen=True, kw_only=True):
    """Its limits and what they did: it was held back for `throttled_us`, and lost `killed` processes."""

    throttled_us: int
    killed: int
    memory_bytes_max: int  # 0: none


@functools.cache
def boot_id() -> str:
    """This start of this machine. Containers share it, and the clock that goes with it."""
    return _text("/proc/sys/kernel/random/boot_id").strip()


@functools.cache
def _model() -> str:
    """Of the first processor; some machines tell none."""
    lines = (line.partition(":") for line in _text("/proc/cpuinfo").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "")


def machine() -> Machine:
    """This one."""
    numbers = [int(field) for field in _text("/proc/stat").partition("\n")[0].split()[1:9]]
    busy = sum(numbers) - sum(numbers[3:5])  # but idle, and idle while a disk is waited for
    memory = dict(_fields("/proc/meminfo"))
    return Machine(
        boot=boot_id(),
        model=_model(),
        processors=os.cpu_count() or 1,
        busy_us=busy * _US // TICKS,
        memory_bytes=memory.get("MemTotal:", 0) * 1024,
        free_bytes=memory.get("MemAvailable:", 0) * 1024,
        stalled=dict(_stalled()),
    )


def _stalled() -> Iterator[tuple[str, int]]:
    for what in PRESSURES:
        for line in _text(f"/proc/pressure/{what}").splitlines():
            kind, *pairs = line.split()
            yield f"{what}.{kind}", int(pairs[-1].removeprefix("total="))


def process(pid: int | None = None) -> Process:
    """This process, or `pid`; all zero once it has ended."""
    pid = pid or os.getpid()
    ran, waited = _schedule(f"/proc/{pid}/task/{pid}")
    own, ended = _cpu_us(pid)
    family = list(descendants(pid))
    used = [_cpu_us(one) for one in family]
    return Process(
        loop_ran_us=ran,
        loop_waited_us=waited,
        cpu_us=own,
        children_us=ended + sum(map(sum, used)),
        children_waited_us=sum(_schedule(f"/proc/{one}")[1] for one in family),
        memory_bytes=sum(map(_resident, (pid, *family))),
        files=_count(f"/proc/{pid}/fd"),
    )


def descendants(pid: int) -> Iterator[int]:
    """The processes that it started, and those that these did."""
    for thread in _names(f"/proc/{pid}/task"):
        for child in map(int, _text(f"/proc/{pid}/task/{thread}/children").split()):
            yield child
            yield from descendants(child)


def _schedule(where: str) -> tuple[int, int]:
    """How long a thread ran, and waited for a processor, in µs."""
    numbers = _text(f"{where}/schedstat").split()
    return (int(numbers[0]) // _NS_PER_US, int(numbers[1]) // _NS_PER_US) if numbers else (0, 0)


def _cpu_us(pid: int) -> tuple[int, int]:
    """What a process used, and what those of its children did that have ended."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    own, ended = (sum(map(int, fields[start : start + 2])) * _US // TICKS for start in (11, 13))
    return own, ended


def _resident(pid: int) -> int:
    fields = _text(f"/proc/{pid}/statm").split()
    return int(fields[1]) * PAGE_BYTES if fields else 0


def cgroup() -> Cgroup:
    """What bounds this process: its own cgroup, of either version, and those in which that lies."""
    cpu = [dict(_fields(f"{folder}/cpu.stat")) for folder in _cgroup_folders("cpu")]
    memory = list(_cgroup_folders("memory"))
    counts = [dict(_fields(f"{folder}/{name}")) for folder in memory for name in _MEMORY_COUNTS]
    told = (_text(f"{folder}/{name}").strip() for folder in memory for name in _MEMORY_LIMITS)
    limits = [int(text) for text in told if text.isdecimal()]
    return Cgroup(
        throttled_us=sum(
            one.get("throttled_usec", one.get("throttled_time", 0) // _NS_PER_US) for one in cpu
        ),
        killed=next((one["oom_kill"] for one in counts if "oom_kill" in one), 0),
        memory_bytes_max=min((limit for limit in limits if limit < _NO_LIMIT), default=0),
    )


def quota_file(pid: int) -> Path | None:
    """Where the innermost quota of a processor stands that bounds that process; None where there is none."""
    names = ("cpu.max", "cpu.cfs_quota_us")
    files = [Path(folder, name) for folder in _cgroup_folders("cpu", pid) for name in names]
    return next((file for file in files if _text(str(file))[:1].isdecimal()), None)


def _cgroup_folders(controller: str, pid: int | None = None) -> Iterator[str]:
    """From the innermost on. In a container, those outside of it are not there."""
    for line in _text(f"/proc/{pid or 'self'}/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            base = Path("/sys/fs/cgroup") / (controller if number != "0" else "")
            for folder in (path, *PurePosixPath(path).parents):
                yield f"{base}{folder}".rstrip("/")


def _fields(path: str) -> Iterator[tuple[str, int]]:
    """The lines of a file that are a name and a number."""
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdecimal():
            yield words[0], int(words[1])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")  # names of programs are any bytes
    except OSError:
        return ""


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _count(path: str) -> int:
    return len(_names(path))
