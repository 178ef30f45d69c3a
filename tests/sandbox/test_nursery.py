"""The parent's side of a zygote that refuses, and of one that is slow to read."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mvmci import effect
from mvmci.sandbox import zygote
from mvmci.sandbox.confinement import Profile
from mvmci.sandbox.exec import run_program
from mvmci.sandbox.nursery import NoSlot, Nursery

PROFILE = Profile(name="workflow", uid=None)


class Zygote:
    """The other end of a nursery's control socket, in the hands of the test."""

    def __init__(self, root: Path) -> None:
        control, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        self.socket.setblocking(False)
        self.nursery = Nursery(root, subprocess.Popen(["sleep", "inf"]), control, -1)
        asyncio.get_running_loop().add_reader(control, self.nursery._on_message)

    async def refuse(self) -> None:
        """Refuse the next request, as on a host that is out of processes."""
        data = await asyncio.get_running_loop().sock_recv(self.socket, zygote.MESSAGE_BYTES_MAX)
        number = msgspec.json.decode(data, type=zygote.Fork).number
        self.socket.send(msgspec.json.encode(zygote.Refused(number=number, why="fork failed")))


@pytest.fixture
async def slow(root: Path) -> AsyncIterator[Zygote]:
    made = Zygote(root)
    yield made
    await made.nursery.close()
    made.socket.close()


async def test_a_fork_that_is_refused_is_no_end_of_a_slot(slow: Zygote) -> None:
    forking = asyncio.create_task(slow.nursery.fork(PROFILE))
    await slow.refuse()
    with pytest.raises(NoSlot, match="no slot process could be made: fork failed"):
        await forking


async def test_a_program_whose_fork_is_refused_did_not_happen(slow: Zygote) -> None:
    request = effect.Exec(argv=("true",))
    running = asyncio.create_task(
        run_program(slow.nursery, request, directory="work", uid=None, key=None, file_bytes=1)
    )
    await slow.refuse()
    answer = await running
    assert isinstance(answer, effect.Error)
    assert answer.why == "failed"
