"""Connections to hosts over ssh, and commands that are run through them.

Ten connections at a time are being made, over all hosts, as sshd drops more; through each go ten commands at
a time, as sshd opens no more; and a jump host has one connection for all hosts behind it. A host that was
lost is dialled anew when it is asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import asyncssh

from mvmci.cluster.topology import HostSection
from mvmci.errors import HostAway, HostRefused
from mvmci.runtimes.ssh import known_hosts
from mvmci.runtimes.ssh.channel import Channel, Ran
from mvmci.runtimes.ssh.dial import Guard, dial, explained
from mvmci.runtimes.ssh.failures import lost, words
from mvmci.runtimes.ssh.host_keys import Judge, pinned
from mvmci.runtimes.ssh.known_hosts import KeyLine
from mvmci.runtimes.ssh.login import Logins
from mvmci.runtimes.ssh.target import Target, find_target
from mvmci.system.tasks import TaskSet, cancel

STARTING_MAX = 10  # connections that are being made; sshd's MaxStartups drops some beyond
CHANNELS_MAX = 10  # of one connection; sshd's MaxSessions
BEGIN_S = 60.0  # for a login shell to start a command
TRIES = 4  # of a connection that was dropped before the host said who it is, as a full sshd does
RETRY_S = 0.3  # doubles with every try
REOPEN_S = 0.05  # the same for a session
OUTPUT_BYTES_MAX = 8 << 20  # of a command that is run to its end


class Connections:
    """The connections to `hosts`, each made when it is asked for first.

    A host's `key` is a path below `folder`. Keys that are known stand in the user's files and in
    `recorded`, into which `accept_new` writes those of hosts that have none yet.
    """

    def __init__(
        self, hosts: Mapping[str, HostSection], *, folder: Path, recorded: Path, accept_new: bool = False
    ) -> None:
        self._hosts = hosts
        self._recorded = recorded
        self._accept_new = accept_new
        self._logins = Logins(folder)
        self._starting = asyncio.Semaphore(STARTING_MAX)
        self._tasks = TaskSet()
        self._made: dict[Target, asyncio.Task[Connection]] = {}
        self._lines: list[KeyLine] | None = None  # of the files of known hosts, read once

    async def connect(self, name: str) -> Connection:
        """The connection to the host `name`. Raises HostAway, HostRefused, and Usage for a key of ours."""
        return await self._connect(find_target(self._hosts, name))

    async def close(self) -> None:
        """End all connections, and with them what is run through them."""
        await self._tasks.close()
        for task in self._made.values():
            if not task.cancelled() and not task.exception():
                await task.result().close()
        self._made.clear()
        self._logins.close()

    async def _connect(self, target: Target) -> Connection:
        task = self._made.get(target)
        if task is None or (task.done() and (task.exception() or task.result().is_lost)):
            task = self._made[target] = self._tasks.start(self._open(target))
        return await asyncio.shield(task)  # others may wait for it too

    async def _open(self, target: Target) -> Connection:
        tunnel = await self._tunnel(target)
        login = await self._logins.of(target)
        judge = self._judge(target)
        for attempt in range(TRIES):
            guard = Guard(judge, login)
            try:
                async with self._starting:
                    return Connection(target, await dial(target, tunnel, guard))
            except (asyncssh.Error, OSError) as error:
                dropped = isinstance(error, asyncssh.ConnectionLost | ConnectionResetError)
                if guard.has_other_authority:
                    judge.takes_certificates = False  # then its key counts, as with ssh
                    continue
                if guard.has_seen_key or not dropped or attempt == TRIES - 1:
                    raise explained(error, target, guard) from None
            finally:
                if guard.note():
                    self._lines = None
            await asyncio.sleep(RETRY_S * 2**attempt * random.uniform(1, 2))  # noqa: S311 (no secret)
        raise AssertionError("the last try ends it")

    async def _tunnel(self, target: Target) -> asyncssh.SSHClientConnection | None:
        if target.jump is None:
            return None
        try:
            return (await self._connect(find_target(self._hosts, target.jump))).tunnel
        except (HostAway, HostRefused) as error:
            message = f"{target.name} is behind {target.jump}, and {error.message}"
            raise type(error)(message, hint=error.hint) from None

    def _judge(self, target: Target) -> Judge:
        if target.host_key is not None:
            return Judge(target, pinned(target), pinned=True)
        if self._lines is None:
            self._lines = known_hosts.read_lines((*known_hosts.user_files(), self._recorded))
        found = known_hosts.look_up(self._lines, target.address, target.port)
        return Judge(target, found, record_in=self._recorded if self._accept_new else None)


class Connection:
    """An open connection to one host. `target` says which."""

    def __init__(self, target: Target, link: asyncssh.SSHClientConnection) -> None:
        self.name = target.name
        self.user = target.user
        self._target = target
        self._link = link
        self._free = asyncio.Semaphore(CHANNELS_MAX)
        self._marker = f"mvmci-{secrets.token_hex(8)}"

    @property
    def is_lost(self) -> bool:
        """Whether it has ended."""
        return bool(self._link.is_closed())

    @property
    def tunnel(self) -> asyncssh.SSHClientConnection:
        """What hosts behind this one are dialled through."""
        return self._link

    async def run(self, command: Sequence[str], stdin: bytes = b"") -> Ran:
        """Run `command` to its end. Cancelled, its streams are closed. Raises HostAway and HostRefused.

        Raises MvmciError for one that prints more than `OUTPUT_BYTES_MAX`.
        """
        async with self.channel(command) as channel:
            feeding = asyncio.ensure_future(channel.feed(stdin, ends=True))
            try:
                out = await channel.read_all(OUTPUT_BYTES_MAX)
                return replace(await channel.wait(), out=out)
            except BaseException:
                channel.terminate()  # it need not read or write, and would not notice
                raise
            finally:
                await cancel(feeding)

    @contextlib.asynccontextmanager
    async def channel(self, command: Sequence[str]) -> AsyncIterator[Channel]:
        """Run `command` and talk with it; its streams are closed at the end. Raises as `run` does."""
        async with self._free, contextlib.AsyncExitStack() as stack:
            async with self.within(BEGIN_S, "starts no command"):
                process = await self._start(command)
                channel = Channel(process, self._marker.encode(), self._link, self._target)
                stack.push_async_callback(channel.close)
                await channel.begin()
            yield channel

    @contextlib.asynccontextmanager
    async def within(self, seconds: float, what: str) -> AsyncIterator[None]:
        """Raises HostAway for a host that lets us wait for longer: that answers pings tells little of it."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise HostAway(f"{self.name} {what} within {seconds:.0f} s", hint="look at that host") from None

    async def close(self) -> None:
        """End it."""
        self._link.close()
        await self._link.wait_closed()

    async def _start(self, command: Sequence[str]) -> asyncssh.SSHClientProcess[bytes]:
        for attempt in range(TRIES):
            try:
                return await self._link.create_process(self._as_text(command), encoding=None)
            except asyncssh.ChannelOpenError as error:
                if self.is_lost:
                    raise lost(self.name) from None
                if attempt == TRIES - 1:
                    raise HostRefused(
                        f"{self.name} lets {self.user} in and opens no session: {words(error)}",
                        hint=f"its sshd is to allow {CHANNELS_MAX} of them at a time (MaxSessions)",
                    ) from None
            except (asyncssh.Error, OSError) as error:
                raise lost(self.name, error) from None
            await asyncio.sleep(REOPEN_S * 2**attempt)  # sshd counts one that has just ended
        raise AssertionError("the last try ends it")

    def _as_text(self, command: Sequence[str]) -> str:
        """`command` for the user's login shell, whichever that is, and whatever its files print first."""
        return f"echo {self._marker} && exec {shlex.join(command)}"
