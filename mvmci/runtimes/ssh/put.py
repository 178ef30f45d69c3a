"""The program on a host: sent to it, unless it is there. `receive.py` is the other half, which runs there."""

from __future__ import annotations

import asyncio
from importlib import resources
from pathlib import Path

import msgspec

from mvmci.errors import MvmciError
from mvmci.runtimes.ssh.channel import Channel
from mvmci.runtimes.ssh.connection import Connection
from mvmci.runtimes.ssh.failures import shown
from mvmci.system.tasks import cancel

PUT_S = 600.0  # for the program to be there


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What `receive.py` says."""

    wanted: bool = False
    path: str = ""
    why_not: str = ""
    full: bool = False


async def put_program(
    connection: Connection, local: Path, digest: str, directory: str, *, python: str = "python3"
) -> str:
    """Have the program `local`, of this SHA-256, below `directory` of a host; its path.

    Nothing is sent if it is there. `python` runs what takes it. Raises HostAway, HostRefused, and
    MvmciError for a disk that is full, a directory that cannot be used, a Python that is not there.
    """
    script = resources.files(__package__).joinpath("receive.py").read_bytes()
    begin = f"import sys; exec(sys.stdin.buffer.read({len(script)}))"
    program = [python, "-I", "-S", "-B", "-c", begin, digest, directory, str(local.stat().st_size)]
    async with connection.within(PUT_S, "takes no program"), connection.channel(program) as channel:
        await channel.feed(script)
        answer = await _read_answer(connection, channel, directory)
        if answer.wanted:
            sending = asyncio.ensure_future(channel.feed_file(local))
            try:
                answer = await _read_answer(connection, channel, directory)
            finally:
                await cancel(sending)
        elif not answer.path:
            answer = await _read_answer(connection, channel, directory)
    return answer.path


async def _read_answer(connection: Connection, channel: Channel, directory: str) -> _Answer:
    line = await channel.readline()
    try:
        answer = msgspec.json.decode(line, type=_Answer)
    except msgspec.DecodeError:
        said = (line + (await channel.wait()).err).decode(errors="replace").strip().splitlines()
        why = shown(said[-1]) if said else "it said nothing"
        raise MvmciError(
            f"{connection.name} did not take the program: {why}",
            hint="`python:` of the host names its Python",
        ) from None
    if answer.full:
        raise MvmciError(
            f"{connection.name} has no room for the program in {directory}", hint="make room there"
        )
    if answer.why_not:
        who = f"{connection.user} cannot keep the program in {directory} on {connection.name}"
        raise MvmciError(
            f"{who}: {shown(answer.why_not)}", hint="`directory:` of the host names another place"
        )
    return answer
