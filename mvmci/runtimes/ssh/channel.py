"""A command that runs on a host: what it is sent, what it says, and how it ended.

What the host's login shell prints first is not part of that. Who reads or writes is told when the host is
lost, and nobody waits for a host that is. All that a command can make us keep has a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from mvmci.errors import HostAway, HostRefused, MvmciError
from mvmci.runtimes.ssh.failures import lost, shown
from mvmci.runtimes.ssh.target import Target
from mvmci.system.tasks import at_most, cancel

CLOSE_S = 1.0  # for a host to say that a command's streams are closed: till then sshd counts it
LINE_BYTES_MAX = 64 << 20
GREETING_BYTES_MAX = 1 << 20  # of what a login shell says before a command begins
WORDS_BYTES_MAX = 64 << 10  # of a command's errors
_PIECE_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What became of a command: its exit code, 128 and the signal's number where one ended it."""

    code: int
    out: bytes
    err: bytes  # its end, where that was much


class Channel:
    """A command that runs on a host."""

    def __init__(
        self,
        process: asyncssh.SSHClientProcess[bytes],
        marker: bytes,
        link: asyncssh.SSHClientConnection,
        target: Target,
    ) -> None:
        self._process = process
        self._marker = marker + b"\n"
        self._link = link
        self._target = target
        self._rest = bytearray()  # what was read, and not yet asked for
        self._errors = bytearray()
        self._writing = asyncio.Lock()
        self._listening = asyncio.ensure_future(self._listen())

    async def begin(self) -> None:
        """Skip what the login shell said. Raises HostRefused where it then runs no command."""
        while (found := self._rest.find(self._marker)) < 0:
            piece = await self._read()
            self._rest += piece
            if not piece or len(self._rest) > GREETING_BYTES_MAX:
                raise await self._no_shell(ended=not piece)
        del self._rest[: found + len(self._marker)]

    async def write(self, data: bytes) -> None:
        """Send `data` to the command, in one piece whoever else writes. Raises HostAway.

        Who is cancelled in the middle ends the channel: half of something is nothing to go on from.
        """
        left = memoryview(data)
        async with self._writing:
            try:
                while left:
                    piece, left = left[:_PIECE_BYTES], left[_PIECE_BYTES:]
                    self._process.stdin.write(bytes(piece))
                    await self._process.stdin.drain()
            except asyncio.CancelledError:
                if left:
                    self._process.close()
                raise
            except (asyncssh.Error, OSError) as error:
                if not self._link.is_closed():
                    raise HostAway(f"a command on {self._target.name} has ended, and reads no more") from None
                raise lost(self._target.name, error) from None

    def end(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self._process.stdin.write_eof()

    async def feed(self, data: bytes, *, ends: bool = False) -> None:
        """Send `data`, and nothing more if it `ends`; a command may end without reading it."""
        with contextlib.suppress(HostAway):
            await self.write(data)
            if ends:
                self.end()

    async def feed_file(self, path: Path) -> None:
        """The same with what is in a file."""
        with open(path, "rb") as file, contextlib.suppress(HostAway):  # noqa: ASYNC230 (of this machine)
            while piece := file.read(_PIECE_BYTES):
                await self.write(piece)

    async def readline(self) -> bytes:
        """The next line, with its end; b"" once the command says no more. Raises HostAway, MvmciError."""
        start = 0
        while (end := self._rest.find(b"\n", start)) < 0:
            start = len(self._rest)
            piece = await self._read()
            if not piece:
                end = start - 1
                break
            self._rest += piece
            if len(self._rest) > LINE_BYTES_MAX:
                raise MvmciError(f"{self._target.name} sent a line of more than {LINE_BYTES_MAX >> 20} MiB")
        line = bytes(self._rest[: end + 1])
        del self._rest[: end + 1]
        return line

    async def read_all(self, bytes_max: int) -> bytes:
        """All that it prints until it ends. Raises HostAway, and MvmciError beyond `bytes_max`."""
        while piece := await self._read():
            self._rest += piece
            if len(self._rest) > bytes_max:
                raise MvmciError(f"a command on {self._target.name} printed more than {bytes_max >> 20} MiB")
        return bytes(self._rest)

    async def wait(self) -> Ran:
        """How it ended, once it has, and what it said of errors. Raises HostAway."""
        await self._listening
        await self._process.wait_closed()
        code = self._process.returncode
        if code is None:
            raise lost(self._target.name)
        return Ran(code=code if code >= 0 else 128 - code, out=b"", err=bytes(self._errors))

    def terminate(self) -> None:
        """Send it SIGTERM."""
        with contextlib.suppress(OSError):
            self._process.terminate()

    async def close(self) -> None:
        """End its streams, and so most commands. A host that is away is not waited for."""
        self._process.close()
        await cancel(self._listening)
        await at_most(CLOSE_S, self._process.wait_closed())

    async def _read(self) -> bytes:
        try:
            piece = await self._process.stdout.read(_PIECE_BYTES)
        except (asyncssh.Error, OSError) as error:
            raise lost(self._target.name, error) from None
        if not piece and self._link.is_closed():
            raise lost(self._target.name)
        return piece

    async def _listen(self) -> None:
        """Keep the last of what it says of errors."""
        with contextlib.suppress(asyncssh.Error, OSError):
            while piece := await self._process.stderr.read(_PIECE_BYTES):
                self._errors += piece
                del self._errors[:-WORDS_BYTES_MAX]

    async def _no_shell(self, *, ended: bool) -> MvmciError:
        who = f"{self._target.name} lets {self._target.user} in and runs no command"
        if not ended:
            return HostRefused(f"{who}: its login shell prints without end")
        ran = await self.wait()
        said = (bytes(self._rest) + ran.err).decode(errors="replace").strip().splitlines()
        why = f"it says: {shown(said[-1])}" if said else f"it ends with code {ran.code}"
        hint = "the user needs a login shell that runs commands, and a key without a command of its own"
        return HostRefused(f"{who}: {why}", hint=hint)
