"""Hosts on one machine: each a network namespace with its own address, an empty home, and Python alone.

    this machine      a bridge, 198.18.N.1 (of the range that is set apart for tests of networks)
    a host            198.18.N.2 and up, in a namespace, at the other end of a veth pair

Unplugging takes the host's line down: packets are lost without a word, as when a cable is drawn. All of
it goes away with the block, and with every process that still runs in one of the namespaces.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.program import Mvmci

PYTHONS = (getattr(sys, "_base_executable", sys.executable), "/usr/local/bin/python3", "/usr/bin/python3")
PATH = "/usr/local/bin:/usr/bin:/bin"
HOSTS_MAX = 250
NEW_ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11))"


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    return "" if shutil.which("ip") else "ip (iproute2) is not there"


@dataclass
class Host:
    """A host: `home` is all that it has of its own."""

    name: str
    namespace: str
    line: str  # this machine's end
    address: str
    home: Path

    @property
    def inside(self) -> tuple[str, ...]:
        """What to put before a command so that it runs there."""
        return ("ip", "netns", "exec", self.namespace)

    def program(self, zipapp: Path) -> Mvmci:
        """The program there: a copy of `zipapp`, an empty home, and a Python that is not ours."""
        copy = self.home / "mvmci.pyz"
        shutil.copy(zipapp, copy)
        return Mvmci(
            copy, self.home / "state", self.home, prefix=self.inside, python=python(), env={"PATH": PATH}
        )

    def unplug(self) -> None:
        _ip("link", "set", self.line, "down")

    def plug(self) -> None:
        _ip("link", "set", self.line, "up")

    def close(self) -> None:
        pids = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        for pid in map(int, pids.stdout.split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _ip("netns", "del", self.namespace, check=False)
        _ip("link", "del", self.line, check=False)


@dataclass
class Network:
    """A bridge and its hosts. `address` is this machine's."""

    token: str
    prefix: str
    folder: Path
    hosts: list[Host] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.prefix}.1"

    @property
    def bridge(self) -> str:
        return f"mvb{self.token}"

    def host(self, name: str) -> Host:
        """A new host."""
        number = len(self.hosts) + 2
        assert number < HOSTS_MAX
        home = self.folder / name
        home.mkdir(mode=0o700)
        line = f"mv{number}{self.token}"
        host = Host(name, f"mvmci-{self.token}-{name}", line, f"{self.prefix}.{number}", home)
        self.hosts.append(host)
        _ip("netns", "add", host.namespace)
        _ip("link", "add", line, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _ip("link", "set", line, "master", self.bridge, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{host.address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            _ip("-n", host.namespace, *command)
        return host


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network whose hosts keep what they have in `folder`. It is removed with the block."""
    token = secrets.token_hex(3)
    prefix = f"198.{18 + secrets.randbelow(2)}.{secrets.randbelow(256)}"
    found = Network(token, prefix, folder)
    try:
        _ip("link", "add", "name", found.bridge, "type", "bridge")
        _ip("addr", "add", f"{found.address}/24", "dev", found.bridge)
        _ip("link", "set", found.bridge, "up")
        yield found
    finally:
        for host in found.hosts:
            host.close()
        _ip("link", "del", found.bridge, check=False)


def python() -> str:
    """A Python that is not that of the project's environment."""
    for path in PYTHONS:
        found = shutil.which(path)
        if found and subprocess.run([found, "-c", NEW_ENOUGH], check=False).returncode == 0:
            return found
    raise AssertionError("no Python that is new enough is there")


def _ip(*args: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"ip {' '.join(args)}: {done.stderr}"
