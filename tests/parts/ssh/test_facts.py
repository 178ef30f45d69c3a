"""What a host says of itself, whatever Python, shell and disk it has."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from mvmci.errors import HostRefused
from mvmci.runtimes.ssh import facts as source
from mvmci.runtimes.ssh import host
from mvmci.runtimes.ssh.connection import Connection
from mvmci.system.processes import Known, this_process
from tests.harness.sshd import Sshd, user
from tests.harness.waiting import until_true
from tests.parts.ssh.conftest import Connect


@pytest.fixture
async def h1(sshd: Sshd, connect: Connect) -> Connection:
    return await connect(h1=sshd.section()).connect("h1")


def script(path: Path, text: str) -> Path:
    """A program that is a shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def test_a_host_says_what_it_is(h1: Connection, sshd: Sshd, tmp_path: Path) -> None:
    told = await host.ask(h1, "ci", directory=str(tmp_path / "new" / "mvmci"), python=sys.executable)
    assert (told.machine, told.hostname) == (os.uname().machine, os.uname().nodename)
    assert (told.user, told.uid, told.home) == (user(), os.getuid(), str(sshd.home))
    assert told.python is not None
    assert told.python.fits
    assert told.python.version == sys.version.split()[0]
    assert told.libc == os.confstr("CS_GNU_LIBC_VERSION")
    assert told.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert told.directory.path == str(tmp_path / "new" / "mvmci")
    assert told.directory.why_not == ""
    assert told.directory.free_bytes > 0
    assert told.cache.path == str(sshd.home / ".cache/mvmci")
    assert told.processors == len(os.sched_getaffinity(0))
    assert not told.has_cluster
    assert abs(told.skew_s) <= told.skew_error_s
    assert not (tmp_path / "new").exists()


async def test_a_host_says_that_it_is_the_one_with_the_keys_of_the_cluster(
    h1: Connection, tmp_path: Path
) -> None:
    for cluster, part, expected in (("ci", "units", False), ("other", "keys", True)):
        (tmp_path / cluster / part).mkdir(parents=True)
        told = await host.ask(h1, cluster, directory=str(tmp_path), python=sys.executable)
        assert (told.has_cluster, told.holds_keys) == (True, expected)


async def test_the_usual_directory_is_that_of_the_user(h1: Connection, sshd: Sshd) -> None:
    told = await host.ask(h1, "ci")
    usual = "/var/lib/mvmci" if os.getuid() == 0 else f"{sshd.home}/.local/state/mvmci"
    assert told.directory.path == usual
    assert {one.path for one in told.pythons} >= {
        shutil.which("python3", path="/usr/bin") or "/usr/bin/python3"
    }


async def test_a_running_cluster_tells_its_units_and_one_that_has_ended_does_not(
    h1: Connection, tmp_path: Path
) -> None:
    folder, units = tmp_path / "state" / "ci", '{"units": [1, "ü"]}'
    folder.mkdir(parents=True)
    (folder / "units.json").write_text(units)
    (folder / "supervisor.json").write_bytes(msgspec.json.encode(this_process()))
    told = await host.ask(h1, "ci", directory=str(tmp_path / "state"))
    assert (told.has_cluster, told.is_running, told.units) == (True, True, units)
    ended = msgspec.structs.replace(this_process(), started=1)
    for damaged in (msgspec.json.encode(ended), b"{}", b"[]", b"", b"\xff"):
        (folder / "supervisor.json").write_bytes(damaged)
        told = await host.ask(h1, "ci", directory=str(tmp_path / "state"))
        assert (told.has_cluster, told.is_running, told.units) == (True, False, "")


async def test_a_supervisor_that_has_ended_and_that_nobody_reaps_does_not_run(
    h1: Connection, tmp_path: Path
) -> None:
    """Its parent may be an agent that somebody still talks with, or the first process of a container."""
    folder = tmp_path / "state" / "ci"
    folder.mkdir(parents=True)
    (folder / "units.json").write_text('{"units": []}')
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {})  # noqa: ASYNC221 (it ends at once)
    await until_true(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG))
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[source.START_TIME])
    (folder / "supervisor.json").write_bytes(msgspec.json.encode(Known(pid=pid, started=started)))
    told = await host.ask(h1, "ci", directory=str(tmp_path / "state"))
    os.waitpid(pid, 0)  # noqa: ASYNC222 (it has ended)
    assert (told.is_running, told.units) == (False, "")


async def test_the_programs_that_are_there_are_told_the_last_used_first(
    h1: Connection, tmp_path: Path
) -> None:
    folder = tmp_path / "state" / "bin"
    folder.mkdir(parents=True)
    for age, name in enumerate(["c", "a", "b"]):
        (folder / f"{name}.pyz").touch()
        os.utime(folder / f"{name}.pyz", (1000 - age, 1000 - age))
    (folder / ".part-1").touch()
    assert (await host.ask(h1, "ci", directory=str(tmp_path / "state"))).programs == ("c", "a", "b")


async def test_ports_are_told_that_nobody_can_listen_at(h1: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        busy, idle = (f"127.0.0.1:{one.getsockname()[1]}" for one in (taken, free))
        free.close()
        told = await host.ask(h1, "ci", ports=[busy, idle, "192.0.2.1:4222"])
        assert told.ports[busy] == "Address already in use"
        assert told.ports[idle] == ""
        assert "assign requested address" in told.ports["192.0.2.1:4222"]


async def test_what_cannot_be_written_is_told(h1: Connection, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = await host.ask(h1, "ci", directory=str(tmp_path / "file" / "mvmci"))
    assert told.directory.why_not == f"{tmp_path}/file is no directory"
    if os.getuid():
        told = await host.ask(h1, "ci", directory="/mvmci")
        assert told.directory.why_not == "/ belongs to others"


@pytest.mark.parametrize(
    ("flags", "noexec", "why_not"),
    [(os.ST_NOEXEC, True, ""), (os.ST_RDONLY, False, "its disk is read-only"), (0, False, "")],
)
def test_what_a_disk_is_mounted_with_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int, noexec: bool, why_not: str
) -> None:
    disk = SimpleNamespace(f_flag=flags, f_bavail=3, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    told = source.place(str(tmp_path / "new" / "mvmci"))
    assert (told["noexec"], told["why_not"], told["free_bytes"]) == (noexec, why_not, 3 * 4096)


async def test_a_host_without_python_still_says_what_it_is(h1: Connection, tmp_path: Path) -> None:
    old = script(tmp_path / "old python", "exit 2")
    for python in (str(old), str(tmp_path / "missing")):
        told = await host.ask(h1, "ci", python=python)
        assert told.python is None
        assert (told.machine, told.user, told.uid) == (os.uname().machine, user(), os.getuid())
        assert len(told.pythons) == (python == str(old))


async def test_a_python_that_is_only_a_shim_gives_way_to_the_next(
    h1: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = script(tmp_path / "shim", "cat >/dev/null; echo no such version; exit 127")
    monkeypatch.setattr(host, "FITTING", ("3.14",))
    question = host._question("ci", None, None, ()).replace(b"python3.14", str(shim).encode())
    ran = await h1.run(["sh", "-s"], question)
    told = msgspec.json.decode(ran.out.splitlines()[-1], type=host.HostFacts)
    assert told.python is not None
    assert told.pythons[0].path == str(shim)


OLD = sorted(Path("~/.pyenv/versions").expanduser().glob("3.[678].*/bin/python"))


@pytest.mark.skipif(not OLD, reason="no old Python here")
@pytest.mark.parametrize("python", OLD, ids=lambda path: path.parts[-3])
async def test_an_old_python_says_that_it_is_old(h1: Connection, python: Path) -> None:
    told = await host.ask(h1, "ci", python=str(python))
    assert told.python is not None
    assert told.python.version == python.parts[-3]
    assert not told.python.fits


@pytest.mark.parametrize("name", ["facts.py", "receive.py"])
def test_what_is_sent_is_read_by_the_oldest_python(name: str) -> None:
    import ast

    text = Path(source.__file__).with_name(name).read_text()
    ast.parse(text, feature_version=(3, 6))
    assert "from __future__" not in text
    assert text.isascii()  # in the locale C an old Python reads no more
    assert len(text) < 100_000  # it is an argument: the kernel takes 128 KiB


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("exit 0", "it said nothing"),
        ("echo '{}'", "{}"),
        ("echo '[[[['; echo 'No \x1b[31mspace' >&2", r"No \x1b\[31mspace"),
    ],
)
async def test_a_host_whose_answer_makes_no_sense_is_said_to(
    h1: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, why: str
) -> None:
    monkeypatch.setattr(host, "_question", lambda *_: answer.encode())
    with pytest.raises(HostRefused) as refused:
        await host.ask(h1, "ci")
    assert refused.value.message.startswith("h1 cannot say what it has: ")


async def test_a_field_that_is_new_is_passed_over(h1: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"hostname": "h", "user": "u", "uid": 1, "machine": "m", "from_the_future": [1]})
    monkeypatch.setattr(host, "_question", lambda *_: f"echo '{line}'".encode())
    assert (await host.ask(h1, "ci")).hostname == "h"


def test_the_facts_take_little_of_a_host() -> None:
    """What Python loads for them is counted: time means nothing on a busy machine."""
    code = f"{Path(source.__file__).read_text()}\nprint(len(sys.modules))"
    command = [sys.executable, "-I", "-S", "-c", code, "3.11", "", "", "ci"]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(ran.stdout.split()[-1]) < 60
