"""Clusters on hosts that are reached over ssh: the zipapp, and real sshds on the loopback.

Each has a state directory of its own, as hosts have; what they have not of their own is the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.harness import sshd
from tests.harness.ports import own_port
from tests.harness.program import Mvmci, Outcome, Running, files_in
from tests.harness.proxy import Proxy
from tests.harness.sshd import Sshd


class Line(Proxy):
    """What leads to a host, and can be cut for good."""

    is_cut = False

    def go(self) -> None:
        """Be cut now, and let nobody through."""
        self.is_cut = True
        self.cut()

    def swap(self, port: int) -> None:
        """Lead to another port."""
        self._target = urlsplit(f"tcp://{sshd.ADDRESS}:{port}")
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            raise ConnectionRefusedError
        await super()._serve(reader, writer)


@dataclasses.dataclass
class Host:
    """A host of a cluster file. `settings` are those that it has there."""

    name: str
    sshd: Sshd
    line: Line
    directory: Path
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        """What it has of the cluster."""
        return self.directory / "demo"

    @property
    def port(self) -> int:
        """The one at which it is reached."""
        return int(self.line.url.rpartition(":")[2])

    def files(self) -> dict[str, str]:
        """What lies there, each file with its digest."""
        found = {}
        for path in sorted(files_in(self.directory)):
            with contextlib.suppress(FileNotFoundError):  # a unit has removed it
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


@dataclasses.dataclass
class Farm:
    """Hosts, a cluster's file that names them, and the program."""

    mvmci: Mvmci
    folder: Path
    hosts: dict[str, Host]
    port: int  # of the broker
    workers: str = "count: 2, slots: 1"
    more: str = ""

    @property
    def state(self) -> Path:
        """What the operator has of the cluster."""
        return self.mvmci.state / "demo"

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def write(self) -> Path:
        """The cluster's file, as things are."""
        broker = f"broker: {{listen: '0.0.0.0:{self.port}'}}"  # two runs of these tests share the machine
        workers = f"workers: {{{self.workers}}}"
        lines = ["cluster: demo", "runtime: ssh", broker, workers, self.more, "hosts:"]
        for host in self.hosts.values():
            told = {"address": sshd.ADDRESS, "port": host.port} | host.settings
            lines.append(f"  {host.name}: {{{', '.join(f'{key}: {told[key]!s}' for key in told)}}}")
        file = self.folder / "demo.yaml"
        file.write_text("\n".join(lines) + "\n")
        return file

    async def up(self, *options: str, state: Path | None = None) -> Outcome:
        """`up --detach`, however it ends."""
        verb = dataclasses.replace(self.mvmci, state=state or self.mvmci.state)
        done = await asyncio.to_thread(verb, "up", self.write(), "--detach", *options)
        assert "bug in mvmci" not in done.err, done
        assert "Traceback" not in done.err, done
        return done

    async def down(self, *options: str) -> Outcome:
        """`down`, however it ends."""
        return await asyncio.to_thread(self.mvmci, "down", "--cluster", "demo", *options)

    def start_up(self) -> Running:
        """`up --detach`, under way."""
        return self.mvmci.start("up", self.write(), "--detach")

    async def units(self) -> dict[str, dict[str, Any]]:
        """What `ps` says, by name."""
        found = await asyncio.to_thread(self.mvmci.look, "ps")
        return {unit["name"]: unit for unit in found["units"]}

    def settled(self) -> dict[str, str]:
        """What lies on all hosts, without what running units write."""
        written = ("log", "broker", "_host", "_cache", "units.json", "lock", "witness.json", "identity.json")
        return {
            path: digest
            for path, digest in self.files().items()
            if not any(part in path.split("/") or path.endswith(part) for part in written)
        }

    def files(self) -> dict[str, str]:
        """What lies on all hosts."""
        return {path: digest for host in self.hosts.values() for path, digest in host.files().items()}


@pytest.fixture
async def farm(program: Mvmci, tmp_path: Path) -> AsyncIterator[Farm]:
    """Two hosts, h1 and h2, whose keys are pinned.

    They find the program unpacked where this run has it: each by itself would take most of these tests' time.
    """
    public = sshd.make_key(tmp_path / "key")
    async with contextlib.AsyncExitStack() as stack:
        hosts = {}
        for name in ("h1", "h2"):
            served = await stack.enter_async_context(sshd.serve(tmp_path / name / "sshd"))
            served.authorized_keys.write_text(public)
            line = await stack.enter_async_context(Line(f"tcp://{sshd.ADDRESS}:{served.port}").serve())
            line.is_cut = False
            directory = tmp_path / name / "state"
            directory.mkdir(mode=0o700)
            (directory / "_cache").symlink_to(program.home / ".cache" / "mvmci")
            settings = {
                "user": sshd.user(),
                "key": tmp_path / "key",
                "host_key": f"'{served.host_keys[0]}'",
                "python": sys.executable,
                "directory": directory,
                "service": "none",
            }
            assert isinstance(line, Line)
            hosts[name] = Host(name, served, line, directory, settings)
        operator = dataclasses.replace(program, state=tmp_path / "operator")
        found = Farm(operator, tmp_path, hosts, own_port("0.0.0.0"))
        yield found
        for host in hosts.values():
            host.line.is_cut = False
        if (found.state / "version").exists():
            done = await found.down("--purge")
            assert done.code == 0, done
        for host in hosts.values():
            left = await asyncio.to_thread(_until_nothing_runs, found.mvmci, host.directory)
            assert not left
            shutil.rmtree(host.directory, ignore_errors=True)


def _until_nothing_runs(mvmci: Mvmci, directory: Path) -> list[str]:
    there = dataclasses.replace(mvmci, state=directory)
    there.assert_nothing_runs()
    return there.processes()
