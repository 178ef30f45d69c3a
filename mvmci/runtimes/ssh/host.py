"""What a host has: asked in one command, which changes nothing there."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from importlib import resources

import msgspec

from mvmci.cluster.changes import Observed
from mvmci.config.quantity import rough_size
from mvmci.errors import HostAway, HostRefused
from mvmci.runtimes.local.messages import Report
from mvmci.runtimes.ssh.connection import Connection
from mvmci.system.text import one_line

FITTING = ("3.14", "3.13", "3.12", "3.11")  # the Pythons that the zipapp runs on, the best first
GLIBC_MIN = (2, 28)  # as packaging/launch.py has it
ROOM_BYTES = 300 << 20  # for a program, what it unpacks, and some jobs
SKEW_MAX_S = 60.0  # certificates begin an hour before they are made, and tickets live for an hour
ANSWER_S = 30.0
_WORDS_CHARS_MAX = 200

# The usual login of sshd has a short PATH. A Python may be a shim that runs none, so each gets its turn; with
# none at all the shell tells what it can. What it prints is quoted by leaving out what would need quoting.
_FIND_PYTHON = """\
PATH=$PATH:/usr/local/bin:/usr/bin:/bin
IFS='
'
pythons=$(for name in $names; do command -v "$name"; done)
for path in $pythons; do
    "$path" -I -S -B -c "$facts" "$fitting" "$pythons" "$@" </dev/null 2>/dev/null && exit
done
safe() { "$@" 2>/dev/null | tr -cd 'A-Za-z0-9._-'; }
printf '{"machine":"%s","kernel":"%s","hostname":"%s","user":"%s","uid":%s,"pythons":[' \\
    "$(safe uname -m)" "$(safe uname -r)" "$(safe uname -n)" "$(safe id -un)" "$(safe id -u)"
comma=
for path in $pythons; do
    printf '%s{"path":"%s"}' "$comma" "$(safe printf %s "$path")"
    comma=,
done
printf ']}\\n'
"""


class Python(msgspec.Struct, frozen=True, kw_only=True):
    """A Python of a host. `version` has three numbers where it was started, else what its name tells."""

    path: str
    version: str = ""
    fits: bool = False
    lacks: tuple[str, ...] = ()  # modules that its distribution has in another package


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A directory of a host, which may have to be made. An empty `why_not` says that one can write there."""

    path: str = ""
    why_not: str = "no Python could look"
    noexec: bool = False
    free_bytes: int = 0


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a host says of itself. What it cannot tell is empty; fields that are new here are passed over."""

    hostname: str
    user: str
    uid: int
    machine: str  # as `uname -m` says it
    kernel: str = ""
    libc: str = ""  # "glibc 2.36", "musl"
    python: Python | None = None  # the one that would run mvmci, if it fits
    pythons: tuple[Python, ...] = ()
    directory: Place = Place()
    cache: Place = Place()  # where the zipapp unpacks itself
    listening: tuple[int, ...] = ()  # ports of TCP
    ports: dict[str, str] = {}  # why nobody can listen at ADDRESS:PORT, or empty
    systemd: bool = False
    user_manager: bool = False  # that of this user runs now
    lingers: bool = False  # and when nobody is logged in
    home: str = ""
    boot_id: str = ""
    processors: int = 0
    memory_bytes: int = 0
    has_cluster: bool = False  # its folder is there
    holds_keys: bool = False  # that folder is the one of who brought it up
    owner: str = ""  # whose cluster that is
    is_running: bool = False  # so is its supervisor
    units: str = ""  # `units.json` of a running supervisor, as it is
    programs: tuple[str, ...] = ()  # the digests of those that are there, the last used first
    clock_s: float = 0.0
    skew_s: float = 0.0  # how much its clock is before ours; found here
    skew_error_s: float = 0.0  # and how exactly that is known


def seen_by(facts: HostFacts) -> list[Observed]:
    """The units that its supervisor keeps running. Raises HostRefused."""
    if not facts.units:
        return []
    try:
        return msgspec.json.decode(facts.units, type=Report).units
    except (msgspec.DecodeError, RecursionError) as error:
        raise HostRefused(f"what {facts.hostname} says of its units makes no sense: {error}") from None


def unfit(facts: HostFacts, program: str) -> Iterator[str]:
    """Why the program of that digest cannot run on a host, a sentence each, with what to do."""
    python = facts.python
    if python is not None and python.lacks and python.version.rpartition(".")[0] in FITTING:
        lacks = ", ".join(python.lacks)
        yield f"{python.path} lacks {lacks}: install the rest of its distribution's Python"
    elif python is None or not python.fits:
        there = ", ".join(one.version or one.path for one in facts.pythons) or "none"
        wanted = f"CPython {FITTING[-1]} to {FITTING[0]}"
        yield f"it needs {wanted}, and has {there}: install one, or name it with `python`"
    if facts.machine != os.uname().machine:
        yield f"it is {facts.machine}, and this file is for {os.uname().machine}: call `up` with one for that"
    name, _, version = facts.libc.partition(" ")
    if python is not None and (name != "glibc" or _numbers(version) < GLIBC_MIN):
        needed = ".".join(map(str, GLIBC_MIN))
        yield f"it needs glibc {needed} or newer, and has {facts.libc or 'another C library'}"
    place = facts.directory
    if python is not None:
        if place.why_not:
            yield f"{place.path} cannot be used: {place.why_not}: name another one with `directory`"
        elif place.noexec:
            yield f"{place.path} lies on a disk that holds no programs (noexec): name another `directory`"
        elif facts.holds_keys:
            yield f"{place.path} has the cluster's own keys in it: name another one with `directory`"
        elif place.free_bytes < ROOM_BYTES and program not in facts.programs:
            free, needed = rough_size(place.free_bytes), rough_size(ROOM_BYTES)
            yield f"{place.path} has {free} free, and mvmci needs {needed}"
    if abs(facts.skew_s) - facts.skew_error_s > SKEW_MAX_S:
        way = "ahead of" if facts.skew_s > 0 else "behind"
        yield f"its clock is {abs(facts.skew_s):.0f} s {way} this machine's: set it, and keep it so (NTP)"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


async def ask(
    connection: Connection,
    cluster: str,
    *,
    directory: str | None = None,
    python: str | None = None,
    ports: Sequence[str] = (),
) -> HostFacts:
    """The facts of a host; `ports` are those of which it is to say whether they are free, as ADDRESS:PORT.

    `directory` is its state directory if it is not the usual one; `python` is the only one to look at.
    Raises HostAway, and HostRefused where what it says makes no sense.
    """
    asked = time.time()
    try:
        async with asyncio.timeout(ANSWER_S):
            ran = await connection.run(["sh", "-s"], _question(cluster, directory, python, ports))
    except TimeoutError:
        raise HostAway(f"{connection.name} does not say what it has within {ANSWER_S:.0f} s") from None
    answered = time.time()
    lines = ran.out.strip().splitlines()
    try:
        facts = msgspec.json.decode(lines[-1] if lines else b"", type=HostFacts)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = (ran.err.strip() or ran.out.strip()).decode(errors="replace").splitlines()
        why = one_line(said[-1])[:_WORDS_CHARS_MAX] if said else "it said nothing"
        raise HostRefused(f"{connection.name} cannot say what it has: {why}") from None
    if not facts.clock_s:
        return facts
    return msgspec.structs.replace(
        facts, skew_s=facts.clock_s - (asked + answered) / 2, skew_error_s=(answered - asked) / 2
    )


def _question(cluster: str, directory: str | None, python: str | None, ports: Sequence[str]) -> bytes:
    """What the shell reads: all of it from its input, as arguments are for everybody there to see."""
    facts = resources.files(__package__).joinpath("facts.py").read_text()
    names = [python] if python else [*(f"python{version}" for version in FITTING), "python3", "python"]
    told = {
        "names": "\n".join(names),
        "fitting": ",".join(FITTING),
        "facts": facts,
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in told.items()]
    lines.append(shlex.join(["set", "--", directory or "", cluster, *ports]))
    return ("\n".join(lines) + "\n" + _FIND_PYTHON).encode()
