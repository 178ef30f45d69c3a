"""A home with a key that real sshds take, and connections that are closed at the end."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from mvmci.cluster.topology import HostSection
from mvmci.runtimes.ssh.connection import Connections
from tests.harness.places import need
from tests.harness.sshd import Sshd, find_sshd, make_key, serve

Connect = Callable[..., Connections]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own: ~/.ssh of whoever runs this is not looked at."""
    find_sshd()
    home = tmp_path / "home"
    (home / ".ssh").mkdir(0o700, parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


@pytest.fixture
def key(home: Path) -> str:
    """The public half of ~/.ssh/id_ed25519."""
    return make_key(home / ".ssh/id_ed25519")


@pytest.fixture
async def sshd(tmp_path: Path, home: Path, key: str) -> AsyncIterator[Sshd]:
    """One that lets us in, and that ~/.ssh/known_hosts knows."""
    async with serve(tmp_path / "sshd") as sshd:
        sshd.authorized_keys.write_text(key + "\n")
        (home / ".ssh/known_hosts").write_text(sshd.known())
        yield sshd


@pytest.fixture
async def connect(tmp_path: Path) -> AsyncIterator[Connect]:
    """Makes `Connections` to hosts by name."""
    async with contextlib.AsyncExitStack() as stack:

        def to(accept_new: bool = False, **hosts: HostSection) -> Connections:
            recorded = tmp_path / "cluster" / "known_hosts"
            connections = Connections(hosts, folder=tmp_path, recorded=recorded, accept_new=accept_new)
            stack.push_async_callback(connections.close)
            return connections

        yield to


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for 1 MiB."""
    need(os.geteuid() == 0, "only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)
