"""What a host has, told by itself as one line of JSON. It reads, and changes nothing.

This is sent over ssh, and run by the Python that is found there: the standard library alone, nothing that
Python 3.6 does not understand, and nothing that takes long to load. An old Python is to tell that it is old.

    facts.py FITTING PYTHONS DIRECTORY CLUSTER [ADDRESS:PORT ...]

FITTING are the versions that fit, with commas; PYTHONS what was found, a path a line; an empty DIRECTORY is
the usual one.
"""

import json
import os
import sys
import time

UNITS_BYTES_MAX = 4 << 20
PROGRAMS_MAX = 100
STATE, START_TIME = 0, 19  # of the fields of /proc/<pid>/stat behind the command's name
ENDED = ("Z", "X")


def read(path: str, bytes_max: int = 64 << 10) -> str:
    """The text of a file; empty where it cannot be read, or is longer."""
    try:
        with open(path, "rb") as file:
            data = file.read(bytes_max + 1)
    except OSError:
        return ""
    return data.decode("utf-8", "replace") if len(data) <= bytes_max else ""


def libc() -> str:
    """The C library and its version, as far as that can be told."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        musl = any(name.startswith("ld-musl-") for name in os.listdir("/lib"))
        return "musl" if musl else ""


def version_in(path: str) -> str:
    """The version that the name of a Python tells, where it leads in the end."""
    name = os.path.basename(os.path.realpath(path))
    return name[6:] if name.startswith("python") and name[6:7].isdigit() else ""


def python(fitting: "list[str]") -> "dict[str, object]":
    """The Python that runs this."""
    version = "{}.{}".format(*sys.version_info[:2])
    usual = sys.implementation.name == "cpython" and "t" not in sys.abiflags
    return {
        "path": sys.executable,
        "version": f"{version}.{sys.version_info[2]}",
        "fits": version in fitting and usual,
        "lacks": lacking(),
    }


def place(path: str) -> "dict[str, object]":
    """What can be done at `path`, whether it is there or is to be made."""
    there = path
    while not os.path.lexists(there) and there != os.path.dirname(there):
        there = os.path.dirname(there)
    try:
        disk = os.statvfs(there)
    except OSError as error:
        return {"path": path, "why_not": f"{there}: {error.strerror}"}
    return {
        "path": path,
        "why_not": cannot_write(there, disk.f_flag),
        "noexec": bool(disk.f_flag & os.ST_NOEXEC),
        "free_bytes": disk.f_bavail * disk.f_frsize,
    }


def cannot_write(there: str, flags: int) -> str:
    """Why nothing can be made in `there`; empty where it can."""
    if flags & os.ST_RDONLY:
        return "its disk is read-only"
    if not os.path.isdir(there):
        return f"{there} is no directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} belongs to others"


def cannot_listen(address: str) -> str:
    """Why nobody can listen at ADDRESS:PORT now; empty where one can."""
    import socket

    host, _, port = address.rpartition(":")
    try:
        info = socket.getaddrinfo(host.strip("[]"), int(port), 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)[0]
        with socket.socket(info[0], info[1], info[2]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(info[4])
            probe.listen(1)
    except OSError as error:
        return error.strerror or "it cannot be used"
    return ""


def is_alive(known: str) -> bool:
    """Whether the process that a `supervisor.json` names still runs: a number may be another's by now, or
    that of one which has ended and which nobody reaps."""
    try:
        process = json.loads(known)
        stat = read("/proc/{}/stat".format(int(process["pid"])))
        fields = stat.rpartition(")")[2].split()
        return fields[STATE] not in ENDED and int(fields[START_TIME]) == int(process["started"])
    except (ValueError, KeyError, IndexError, TypeError):
        return False


def programs(directory: str) -> "list[str]":
    """The digests of the programs that are there, the one that was used last first."""
    found = []
    try:
        for entry in os.scandir(os.path.join(directory, "bin")):
            if entry.name.endswith(".pyz"):
                found.append((entry.stat().st_mtime, entry.name[:-4]))
    except OSError:
        pass
    return [name for _, name in sorted(found, reverse=True)[:PROGRAMS_MAX]]


def listening() -> "list[int]":
    """The TCP ports at which somebody listens, at any address."""
    found = set()
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in read(file, 16 << 20).splitlines()[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == "0A":
                found.add(int(fields[1].rpartition(":")[2], 16))
    return sorted(found)


def memory_bytes() -> int:
    """How much memory the machine has."""
    for line in read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def lacking() -> "list[str]":
    """Modules that a Python without all of its standard library lacks."""
    needed = ("asyncio", "ctypes", "multiprocessing", "ssl", "zipfile")
    there = [os.path.join(folder, name) for name in needed for folder in sys.path]
    found = {os.path.basename(path) for path in there if os.path.exists(path) or os.path.exists(path + ".py")}
    return [name for name in needed if name not in found]


def facts(fitting: str, pythons: str, directory: str, cluster: str, *ports: str) -> "dict[str, object]":
    """All of it."""
    home, uid = os.path.expanduser("~"), os.getuid()
    user = os.environ.get("LOGNAME") or os.environ.get("USER") or str(uid)  # sshd says who it let in
    if not directory:
        directory = os.path.join(home, ".local/state/mvmci") if uid else "/var/lib/mvmci"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    ours = os.path.join(directory, cluster)
    alive = is_alive(read(os.path.join(ours, "supervisor.json")))
    return {
        "machine": os.uname().machine,
        "kernel": os.uname().release,
        "libc": libc(),
        "python": python(fitting.split(",")),
        "pythons": [{"path": path, "version": version_in(path)} for path in pythons.split("\n") if path],
        "directory": place(directory),
        "cache": place(os.path.join(cache, "mvmci")),
        "listening": listening(),
        "ports": {port: cannot_listen(port) for port in ports},
        "systemd": os.path.isdir("/run/systemd/system"),
        "user_manager": os.path.exists(f"/run/user/{uid}/systemd/private"),
        "lingers": os.path.exists("/var/lib/systemd/linger/" + user),
        "hostname": os.uname().nodename,
        "user": user,
        "uid": uid,
        "home": home,
        "boot_id": read("/proc/sys/kernel/random/boot_id").strip(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes(),
        "has_cluster": os.path.isdir(ours),
        "holds_keys": os.path.isdir(os.path.join(ours, "keys")),
        "owner": read(os.path.join(ours, "authority")),
        "is_running": alive,
        "units": read(os.path.join(ours, "units.json"), UNITS_BYTES_MAX) if alive else "",
        "programs": programs(directory),
        "clock_s": time.time(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts(*sys.argv[1:])) + "\n")
