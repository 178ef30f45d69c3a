"""What is said of a host on which nothing can run, and of what a host tells that makes no sense."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from mvmci.cluster.changes import Observed
from mvmci.errors import HostRefused
from mvmci.runtimes.local.messages import Report
from mvmci.runtimes.ssh.host import ROOM_BYTES, SKEW_MAX_S, HostFacts, Place, Python, seen_by, unfit

PYTHON = Python(path="/usr/bin/python3.13", version="3.13.1", fits=True)
LACKING = msgspec.structs.replace(PYTHON, fits=False, lacks=("ssl", "ctypes"))
THERE = Place(path="/var/lib/mvmci", why_not="", free_bytes=ROOM_BYTES)
FIT = HostFacts(
    hostname="h1",
    user="root",
    uid=0,
    machine=os.uname().machine,
    libc="glibc 2.36",
    python=PYTHON,
    pythons=(PYTHON,),
    directory=THERE,
)
NEW = "aa"  # the digest of a program that is not there
OLD = Python(path="/usr/bin/python3", version="3.9.2")
UNKNOWN = Python(path="/python")


def but(**told: Any) -> HostFacts:
    return msgspec.structs.replace(FIT, **told)


def place(**told: Any) -> HostFacts:
    return but(directory=msgspec.structs.replace(THERE, **told))


def test_of_a_host_that_has_all_nothing_is_said() -> None:
    assert [*unfit(FIT, NEW)] == []
    assert [*unfit(but(libc="glibc 2.28", skew_s=SKEW_MAX_S), NEW)] == []


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            but(python=None, pythons=(OLD, UNKNOWN)),
            "it needs CPython 3.11 to 3.14, and has 3.9.2, /python: install one, or name it with `python`",
        ),
        (
            but(python=None, pythons=()),
            "it needs CPython 3.11 to 3.14, and has none: install one, or name it with `python`",
        ),
        (
            but(python=OLD, pythons=(OLD,)),
            "it needs CPython 3.11 to 3.14, and has 3.9.2: install one, or name it with `python`",
        ),
        (
            but(python=LACKING, pythons=(LACKING, OLD)),
            "/usr/bin/python3.13 lacks ssl, ctypes: install the rest of its distribution's Python",
        ),
        (
            but(python=msgspec.structs.replace(OLD, lacks=("ssl",)), pythons=(OLD,)),
            "it needs CPython 3.11 to 3.14, and has 3.9.2: install one, or name it with `python`",
        ),
        (
            but(machine="riscv64"),
            f"it is riscv64, and this file is for {os.uname().machine}: call `up` with one for that",
        ),
        (but(libc="glibc 2.17"), "it needs glibc 2.28 or newer, and has glibc 2.17"),
        (but(libc="musl"), "it needs glibc 2.28 or newer, and has musl"),
        (but(libc=""), "it needs glibc 2.28 or newer, and has another C library"),
        (
            place(why_not="Permission denied"),
            "/var/lib/mvmci cannot be used: Permission denied: name another one with `directory`",
        ),
        (
            place(noexec=True),
            "/var/lib/mvmci lies on a disk that holds no programs (noexec): name another `directory`",
        ),
        (place(free_bytes=10 << 20), "/var/lib/mvmci has 10.0 MiB free, and mvmci needs 300.0 MiB"),
        (
            but(holds_keys=True),
            "/var/lib/mvmci has the cluster's own keys in it: name another one with `directory`",
        ),
        (but(skew_s=-61.4), "its clock is 61 s behind this machine's: set it, and keep it so (NTP)"),
        (but(skew_s=3600), "its clock is 3600 s ahead of this machine's: set it, and keep it so (NTP)"),
    ],
)
def test_what_a_host_lacks_is_a_sentence_that_says_what_to_do(facts: HostFacts, said: str) -> None:
    assert [*unfit(facts, NEW)] == [said]


def test_where_the_program_is_already_it_needs_no_room() -> None:
    """A host that jobs have filled can still be changed, and emptied."""
    full = place(free_bytes=0)
    assert [*unfit(full, NEW)]
    assert [*unfit(msgspec.structs.replace(full, programs=("bb", NEW)), NEW)] == []


def test_everything_that_a_host_lacks_is_said_at_once() -> None:
    assert len([*unfit(but(machine="riscv64", libc="musl", directory=Place(), skew_s=100), NEW)]) == 4


def test_where_no_python_could_look_nothing_is_said_of_what_only_it_could_tell() -> None:
    (said,) = unfit(HostFacts(hostname="h1", user="root", uid=0, machine=os.uname().machine), NEW)
    assert said.startswith("it needs CPython")


def test_a_clock_of_which_is_known_only_roughly_how_late_it_is_gets_the_benefit_of_the_doubt() -> None:
    assert [*unfit(but(skew_s=70, skew_error_s=15), NEW)] == []
    assert len([*unfit(but(skew_s=70, skew_error_s=5), NEW)]) == 1


def test_the_units_of_a_host_are_what_its_supervisor_wrote() -> None:
    one = Observed(name="worker-1", role="worker", host="local", state="starting", pid=7)
    assert seen_by(FIT) == []
    assert seen_by(but(units=msgspec.json.encode(Report(units=[one])).decode())) == [one]


@pytest.mark.parametrize("units", ["nonsense", "[]", '{"units": [{"name": 1}]}', "[" * 100_000])
def test_units_that_make_no_sense_are_refused_in_a_sentence(units: str) -> None:
    with pytest.raises(HostRefused, match="what h1 says of its units makes no sense"):
        seen_by(but(units=units))
