"""Nurseries, slots and small guests for the tests of the sandbox."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from mvmci.sandbox.forkserver import ForkServer

Start = Callable[..., Awaitable[ForkServer]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A forkserver's root: every user may enter it, by name only."""
    path = tmp_path / "root"
    path.mkdir(mode=0o711)
    path.chmod(0o711)
    return path


@pytest.fixture
async def start(root: Path) -> AsyncIterator[Start]:
    """Starts nurseries, and closes them at the end."""
    started: list[ForkServer] = []

    async def begin(**options: object) -> ForkServer:
        started.append(await ForkServer.start(root, **options))
        return started[-1]

    yield begin
    for forkserver in started:
        await forkserver.close()


@pytest.fixture
async def forkserver(start: Start) -> ForkServer:
    return await start()


@pytest.fixture
def needs_root() -> None:
    """Skips without root; fails where everything must be tested."""
    if os.geteuid() != 0:
        assert os.environ.get("CI") != "true", "these tests need root"
        pytest.skip("needs root, to give slots users of their own")
