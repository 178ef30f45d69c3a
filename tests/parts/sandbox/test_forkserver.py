"""The parent's side of a zygote that refuses, and of one that is slow to read."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mvmci.engines.embedded.effects.exec import Exec, run_program
from mvmci.jobs import effect
from mvmci.sandbox import zygote
from mvmci.sandbox.confinement import Profile
from mvmci.sandbox.forkserver import ForkServer, ForkServerDied, NoSlot
from tests.harness.waiting import LONG_S

MESSAGES_MAX = 100_000
PROFILE = Profile(name="workflow", uid=None)


class Zygote:
    """The other end of a fork server's control socket, in the hands of the test."""

    def __init__(self, root: Path) -> None:
        control, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        self.socket.setblocking(False)
        self.forkserver = ForkServer(root, subprocess.Popen(["sleep", "inf"]), control, -1)
        asyncio.get_running_loop().add_reader(control, self.forkserver._on_message)

    async def refuse(self) -> None:
        """Refuse the next request, as on a host that is out of processes."""
        data = await asyncio.get_running_loop().sock_recv(self.socket, zygote.FORK_BYTES_MAX)
        number = msgspec.json.decode(data, type=zygote.Fork).number
        self.socket.send(msgspec.json.encode(zygote.ForkRefused(number=number, why="fork failed")))

    def fill(self) -> int:
        """Leave no room for another request; how many messages that took."""
        for count in range(MESSAGES_MAX):
            try:
                self.forkserver._control.send(b"{}")
            except BlockingIOError:
                return count
        raise AssertionError("there is always room")

    def drain(self, count: int) -> None:
        """Read what `fill` wrote."""
        for _ in range(count):
            self.socket.recv(zygote.FORK_BYTES_MAX)


@pytest.fixture
async def slow(root: Path) -> AsyncIterator[Zygote]:
    made = Zygote(root)
    yield made
    await made.forkserver.close()
    made.socket.close()


async def test_a_fork_that_is_refused_is_no_end_of_a_slot(slow: Zygote) -> None:
    forking = asyncio.create_task(slow.forkserver.fork(PROFILE))
    await slow.refuse()
    with pytest.raises(NoSlot, match="no slot process could be made: fork failed"):
        await forking


async def test_a_program_whose_fork_is_refused_did_not_happen(slow: Zygote) -> None:
    request = Exec(argv=("true",))
    running = asyncio.create_task(
        run_program(slow.forkserver, request, directory="work", uid=None, key=None, file_bytes=1)
    )
    await slow.refuse()
    answer = await running
    assert isinstance(answer, effect.Error)
    assert answer.why == "failed"


async def test_forks_that_wait_for_a_slow_zygote_all_go_out_and_nothing_is_watched_after_them(
    slow: Zygote,
) -> None:
    loop = asyncio.get_running_loop()
    filled = slow.fill()
    forking = [asyncio.create_task(slow.forkserver.fork(PROFILE)) for _ in range(3)]
    await asyncio.sleep(0)
    forking.pop().cancel()  # the others still hear of it
    await asyncio.sleep(0)
    slow.drain(filled)
    async with asyncio.timeout(LONG_S):
        for _ in forking:
            await slow.refuse()
        refused = await asyncio.gather(*forking, return_exceptions=True)
    assert all(isinstance(one, NoSlot) for one in refused)
    assert not loop.remove_writer(slow.forkserver._control), "the loop would never rest again"


async def test_a_fork_that_waits_for_a_zygote_that_dies_hears_of_it(slow: Zygote) -> None:
    slow.fill()
    forking = asyncio.create_task(slow.forkserver.fork(PROFILE))
    await asyncio.sleep(0)
    slow.socket.close()
    with pytest.raises(ForkServerDied):
        await forking
