"""Connections to hosts over ssh, and what is done through them.

A host is who it says it is, or nothing is sent to it: its key is judged before we say who we are. Nothing of
~/.ssh/config counts, so nothing in there turns that off. Ten connections at a time are being made, over all
hosts, as sshd drops more; through each go ten commands at a time, as sshd opens no more; and a jump host has
one connection for all hosts behind it.

Failures are sentences: `HostAway` for a host that does not answer now, `HostRefused` for one that is not to
be trusted, or does not let us in.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import getpass
import logging
import os
import random
import secrets
import shlex
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import asyncssh
import msgspec

from mvmci.cluster.topology import HostSection, host_and_port
from mvmci.errors import HostAway, HostRefused, MvmciError, Usage
from mvmci.runtimes.ssh import known_hosts
from mvmci.runtimes.ssh.known_hosts import HostKeys, KeyLine, fingerprint, key_type
from mvmci.system.tasks import TaskSet, at_most, cancel
from mvmci.system.text import one_line

CONNECT_S = 10.0  # until a host has shown its key
LOGIN_S = 60.0  # from then on: an agent may ask its user
STARTING_MAX = 10  # connections that are being made; sshd's MaxStartups drops some beyond
CHANNELS_MAX = 10  # of one connection; sshd's MaxSessions
BEGIN_S = 60.0  # for a login shell to start a command
PUT_S = 600.0  # for the program to be there
TRIES = 4  # of a connection that was dropped before the host said who it is, as a full sshd does
RETRY_S = 0.3  # doubles with every try
REOPEN_S = 0.05  # the same for a session
CLOSE_S = 1.0  # for a host to say that a command's streams are closed: till then sshd counts it
ALIVE_S, ALIVES_MAX = 4.0, 2  # pings: who is unplugged is away within 12 s
OUTPUT_BYTES_MAX = 8 << 20  # of a command that is run to its end
LINE_BYTES_MAX = 64 << 20  # of one that is talked with
GREETING_BYTES_MAX = 1 << 20  # of what a login shell says before a command begins
WORDS_BYTES_MAX = 64 << 10  # of a command's errors
WORDS_CHARS_MAX = 300
_PIECE_BYTES = 256 << 10

# What servers may prove themselves with: ssh's own, without those that end with SHA-1.
_ALGORITHMS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}
_OF_CERTIFICATES = "-cert-v01@openssh.com"
# Twice as fast here as what the library would choose first.
_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"
_KEY_FILES = ("id_rsa", "id_ecdsa", "id_ed25519")

asyncssh.set_log_level(logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What became of a command: its exit code, 128 and the signal's number where one ended it."""

    code: int
    out: bytes
    err: bytes  # its end, where that was much


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What `receive.py` says."""

    wanted: bool = False
    path: str = ""
    why_not: str = ""
    full: bool = False


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Whom to dial. `name` is what it is called in sentences."""

    name: str
    address: str
    port: int
    user: str
    key: str | None = None
    host_key: str | None = None
    jump: str | None = None

    def __str__(self) -> str:
        where = known_hosts.host_name(self.address, self.port)
        return self.name if self.name == where else f"{self.name} ({where})"


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
        self._logins = _Logins(folder)
        self._starting = asyncio.Semaphore(STARTING_MAX)
        self._tasks = TaskSet()
        self._made: dict[_Target, asyncio.Task[Connection]] = {}
        self._lines: list[KeyLine] | None = None  # of the files of known hosts, read once

    async def connect(self, name: str) -> Connection:
        """The connection to the host `name`. Raises HostAway, HostRefused, and Usage for a key of ours."""
        return await self._connect(self._target(name))

    async def close(self) -> None:
        """End all connections, and with them what is run through them."""
        await self._tasks.close()
        for task in self._made.values():
            if not task.cancelled() and not task.exception():
                await task.result().close()
        self._made.clear()
        self._logins.close()

    async def _connect(self, target: _Target) -> Connection:
        task = self._made.get(target)
        if task is None or (task.done() and (task.exception() or task.result().is_lost)):
            task = self._made[target] = self._tasks.start(self._open(target))
        return await asyncio.shield(task)  # others may wait for it too

    async def _open(self, target: _Target) -> Connection:
        jump = await self._jump(target)
        login = await self._logins.of(target)
        judge = self._judge(target)
        for attempt in range(TRIES):
            guard = _Guard(judge, login)
            try:
                async with self._starting:
                    return Connection(target, await _dial(target, jump, guard))
            except (asyncssh.Error, OSError) as error:
                dropped = isinstance(error, asyncssh.ConnectionLost | ConnectionResetError)
                if guard.has_other_authority:
                    judge.takes_certificates = False  # then its key counts, as with ssh
                    continue
                if guard.has_seen_key or not dropped or attempt == TRIES - 1:
                    raise _explained(error, target, jump, guard) from None
            finally:
                if guard.note():
                    self._lines = None
            await asyncio.sleep(RETRY_S * 2**attempt * random.uniform(1, 2))  # noqa: S311 (no secret)
        raise AssertionError("the last try ends it")

    async def _jump(self, target: _Target) -> Connection | None:
        if target.jump is None:
            return None
        try:
            return await self._connect(self._target(target.jump))
        except (HostAway, HostRefused) as error:
            message = f"{target.name} is behind {target.jump}, and {error.message}"
            raise type(error)(message, hint=error.hint) from None

    def _target(self, name: str) -> _Target:
        host = self._hosts.get(name)
        if host is not None:
            return _Target(
                name=name,
                address=(host.address or name).strip("[]"),
                port=host.port,
                user=host.user or _own_name(),
                key=host.key,
                host_key=host.host_key,
                jump=host.jump,
            )
        user, _, place = name.rpartition("@")
        address, port = host_and_port(place)
        address = address.strip("[]")
        where = int(port or known_hosts.SSH_PORT)
        return _Target(name=name, address=address, port=where, user=user or _own_name())

    def _judge(self, target: _Target) -> _Judge:
        if target.host_key is not None:
            return _Judge(target, _pinned(target), pinned=True)
        if self._lines is None:
            self._lines = known_hosts.read_lines((*known_hosts.user_files(), self._recorded))
        found = known_hosts.look_up(self._lines, target.address, target.port)
        return _Judge(target, found, record_in=self._recorded if self._accept_new else None)


class Connection:
    """An open connection to one host. `target` says which."""

    def __init__(self, target: _Target, link: asyncssh.SSHClientConnection) -> None:
        self.name = target.name
        self.user = target.user
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
            async with self._within(BEGIN_S, "starts no command"):
                channel = Channel(await self._start(command), self._marker.encode(), self)
                stack.push_async_callback(channel.close)
                await channel.begin()
            yield channel

    @contextlib.asynccontextmanager
    async def _within(self, seconds: float, what: str) -> AsyncIterator[None]:
        """Raises HostAway for a host that lets us wait for longer: that answers pings tells little of it."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise HostAway(f"{self.name} {what} within {seconds:.0f} s", hint="look at that host") from None

    async def put(self, local: Path, digest: str, directory: str, *, python: str = "python3") -> str:
        """Have the program `local`, of this SHA-256, below `directory` there; its path.

        Nothing is sent if it is there. `python` runs what takes it. Raises HostAway, HostRefused, and
        MvmciError for a disk that is full, a directory that cannot be used, a Python that is not there.
        """
        script = resources.files(__package__).joinpath("receive.py").read_bytes()
        begin = f"import sys; exec(sys.stdin.buffer.read({len(script)}))"
        program = [python, "-I", "-S", "-B", "-c", begin, digest, directory, str(local.stat().st_size)]
        async with self._within(PUT_S, "takes no program"), self.channel(program) as channel:
            await channel.feed(script)
            answer = await self._answer(channel, directory)
            if answer.wanted:
                sending = asyncio.ensure_future(channel.feed_file(local))
                try:
                    answer = await self._answer(channel, directory)
                finally:
                    await cancel(sending)
            elif not answer.path:
                answer = await self._answer(channel, directory)
        return answer.path

    async def _answer(self, channel: Channel, directory: str) -> _Answer:
        line = await channel.readline()
        try:
            answer = msgspec.json.decode(line, type=_Answer)
        except msgspec.DecodeError:
            said = (line + (await channel.wait()).err).decode(errors="replace").strip().splitlines()
            why = _shown(said[-1]) if said else "it said nothing"
            raise MvmciError(
                f"{self.name} did not take the program: {why}", hint="`python:` of the host names its Python"
            ) from None
        if answer.full:
            raise MvmciError(
                f"{self.name} has no room for the program in {directory}", hint="make room there"
            )
        if answer.why_not:
            who = f"{self.user} cannot keep the program in {directory} on {self.name}"
            raise MvmciError(
                f"{who}: {_shown(answer.why_not)}", hint="`directory:` of the host names another place"
            )
        return answer

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
                    raise self._lost() from None
                if attempt == TRIES - 1:
                    raise HostRefused(
                        f"{self.name} lets {self.user} in and opens no session: {_words(error)}",
                        hint=f"its sshd is to allow {CHANNELS_MAX} of them at a time (MaxSessions)",
                    ) from None
            except (asyncssh.Error, OSError) as error:
                raise self._lost(error) from None
            await asyncio.sleep(REOPEN_S * 2**attempt)  # sshd counts one that has just ended
        raise AssertionError("the last try ends it")

    def _as_text(self, command: Sequence[str]) -> str:
        """`command` for the user's login shell, whichever that is, and whatever its files print first."""
        return f"echo {self._marker} && exec {shlex.join(command)}"

    def _lost(self, error: BaseException | None = None) -> HostAway:
        why = f": {_words(error)}" if error is not None and _words(error) else ""
        return HostAway(f"the connection to {self.name} is lost{why}", hint="try again when the host is back")


class Channel:
    """A command that runs on a host."""

    def __init__(self, process: asyncssh.SSHClientProcess[bytes], marker: bytes, owner: Connection) -> None:
        self._process = process
        self._marker = marker + b"\n"
        self._owner = owner
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
                if not self._owner.is_lost:
                    raise HostAway(f"a command on {self._owner.name} has ended, and reads no more") from None
                raise self._owner._lost(error) from None

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
                raise MvmciError(f"{self._owner.name} sent a line of more than {LINE_BYTES_MAX >> 20} MiB")
        line = bytes(self._rest[: end + 1])
        del self._rest[: end + 1]
        return line

    async def read_all(self, bytes_max: int) -> bytes:
        """All that it prints until it ends. Raises HostAway, and MvmciError beyond `bytes_max`."""
        while piece := await self._read():
            self._rest += piece
            if len(self._rest) > bytes_max:
                raise MvmciError(f"a command on {self._owner.name} printed more than {bytes_max >> 20} MiB")
        return bytes(self._rest)

    async def wait(self) -> Ran:
        """How it ended, once it has, and what it said of errors. Raises HostAway."""
        await self._listening
        await self._process.wait_closed()
        code = self._process.returncode
        if code is None:
            raise self._owner._lost()
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
            raise self._owner._lost(error) from None
        if not piece and self._owner.is_lost:
            raise self._owner._lost()
        return piece

    async def _listen(self) -> None:
        """Keep the last of what it says of errors."""
        with contextlib.suppress(asyncssh.Error, OSError):
            while piece := await self._process.stderr.read(_PIECE_BYTES):
                self._errors += piece
                del self._errors[:-WORDS_BYTES_MAX]

    async def _no_shell(self, *, ended: bool) -> MvmciError:
        who = f"{self._owner.name} lets {self._owner.user} in and runs no command"
        if not ended:
            return HostRefused(f"{who}: its login shell prints without end")
        ran = await self.wait()
        said = (bytes(self._rest) + ran.err).decode(errors="replace").strip().splitlines()
        why = f"it says: {_shown(said[-1])}" if said else f"it ends with code {ran.code}"
        hint = "the user needs a login shell that runs commands, and a key without a command of its own"
        return HostRefused(f"{who}: {why}", hint=hint)


@dataclass(frozen=True)
class _Login:
    """With what we say who we are: private keys by their files, and the agent's."""

    keys: Sequence[tuple[Path, Any]]
    agent: asyncssh.SSHAgentClient | None
    only: Sequence[bytes] | None = None  # of the agent's keys
    notes: Sequence[str] = ()  # on keys that do not count


class _Logins:
    """The keys of this user. What lies on the disk is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._agent: asyncssh.SSHAgentClient | None = None

    async def of(self, target: _Target) -> _Login:
        """What `target` is shown. Raises Usage for a `key:` that cannot be used."""
        agent = await self._ask_agent()
        if target.key is None:
            return self._usual(agent)
        path = self._folder / Path(target.key).expanduser()
        try:
            return _Login([(path, _load(path))], None)
        except _Protected as error:
            if agent is None:
                raise Usage(error.message, hint=error.hint) from None
            return _Login([], agent, only=_public_half(path))

    def close(self) -> None:
        """Leave the agent."""
        if self._agent is not None:
            self._agent.close()

    async def _ask_agent(self) -> asyncssh.SSHAgentClient | None:
        if self._agent is None and os.environ.get("SSH_AUTH_SOCK"):
            with contextlib.suppress(OSError):
                self._agent = await asyncssh.connect_agent()
        return self._agent

    def _usual(self, agent: asyncssh.SSHAgentClient | None) -> _Login:
        keys: list[tuple[Path, Any]] = []
        notes: list[str] = []
        for name in _KEY_FILES:
            path = Path("~/.ssh", name).expanduser()
            if path.exists():
                try:
                    keys.append((path, _load(path)))
                except Usage as error:
                    notes.append(error.message)
        return _Login(keys, agent, notes=notes)


class _Protected(Usage):
    """A private key that needs a passphrase."""


def _load(path: Path) -> Any:
    """A private key, with its certificate where it has one. Raises Usage."""
    try:
        status = path.stat()
        key = asyncssh.read_private_key(path)
    except OSError as error:
        raise Usage(f"the key {path} cannot be read: {error.strerror}", hint="look at `key:`") from None
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        if "assphrase" in str(error) or isinstance(error, asyncssh.KeyEncryptionError):
            raise _Protected(
                f"the key {path} is protected by a passphrase, and no agent has it", hint=f"ssh-add {path}"
            ) from None
        raise Usage(f"{path} is no private key: {_words(error)}", hint="look at `key:`") from None
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        raise Usage(f"others can read the key {path}, so it does not count", hint=f"chmod 600 {path}")
    certificate = path.with_name(path.name + "-cert.pub")
    return (key, str(certificate)) if certificate.exists() else key


def _public_half(path: Path) -> list[bytes] | None:
    """The key of the agent that belongs to a private key; None, which is any, where that cannot be told."""
    try:
        return [asyncssh.read_public_key(path.with_name(path.name + ".pub")).public_data]
    except (OSError, asyncssh.KeyImportError):
        return None


class _Judge:
    """Says whether a host may have the key that it shows."""

    def __init__(
        self, target: _Target, keys: HostKeys, *, pinned: bool = False, record_in: Path | None = None
    ) -> None:
        self._target = target
        self.keys = keys
        self._pinned = pinned
        self._record_in = record_in
        self.takes_certificates = bool(keys.authorities)

    def algorithms(self) -> list[str]:
        """With what the host is to prove itself: by keys of the types that are known, before all others."""
        known = [key_type(blob) for blob in (*self.keys.known, *self.keys.elsewhere)]
        types = [name for name in dict.fromkeys(known) if name in _ALGORITHMS]
        if not self._pinned or not types:
            types += [name for name in _ALGORITHMS if name not in types]
        plain = [algorithm for name in types for algorithm in _ALGORITHMS[name]]
        signed = [name + _OF_CERTIFICATES for name in plain] if self.takes_certificates else []
        return signed + plain

    def authorities(self) -> tuple[list[asyncssh.SSHKey], ...]:
        """What the library needs for certificates, which it judges: hosts' keys are for us to judge."""
        keys = self.keys
        return [], _keys(keys.authorities), _keys(keys.revoked) if self.takes_certificates else []

    def refusal(self, blob: bytes) -> HostRefused | None:
        """Why it may not have the key `blob`."""
        shown, keys = f"{self._target} shows the key {fingerprint(blob)}", self.keys
        if blob in keys.revoked:
            return HostRefused(f"{shown}, which {keys.revoked[blob].where} revokes", hint="give it another")
        if keys.trusts(blob) or (self._record_in is not None and not keys.known):
            return None
        if self._pinned:
            wanted = ", ".join(map(fingerprint, keys.known))
            return HostRefused(
                f"{shown}, and its `host_key:` is another: {wanted}",
                hint="nothing was sent; if the host was set up anew, write its new key into the cluster file",
            )
        place = known_hosts.host_name(self._target.address, self._target.port)
        if keys.known:
            line = next(
                (line for known, line in keys.known.items() if key_type(known) == key_type(blob)), None
            )
            where = (line or next(iter(keys.known.values()))).where
            return HostRefused(
                f"{shown}, which is not the one that is known for it ({where})",
                hint="nothing was sent; somebody may listen in. If the host was set up anew: "
                f"ssh-keygen -R '{place}' -f {shlex.quote(where.rpartition(':')[0])}",
            )
        return HostRefused(
            f"{shown}, and nothing is known of it",
            hint="nothing was sent; compare it with what `ssh-keygen -lf` says on the host, then repeat this "
            "with --accept-new-host-keys, or write it into the cluster file as `host_key:`",
        )

    def note(self, blob: bytes) -> bool:
        """The host has proved that it has the key: record it, if it is to be. Raises Usage."""
        if self._record_in is None or self.keys.trusts(blob):
            return False
        try:
            known_hosts.record(self._record_in, self._target.address, self._target.port, blob)
        except OSError as error:
            raise Usage(f"{self._record_in} cannot be written: {error.strerror}") from None
        return True


class _Guard(asyncssh.SSHClient):
    """Judges a host's key, and then gives ours."""

    def __init__(self, judge: _Judge, login: _Login) -> None:
        self.login = login
        self.refusal: HostRefused | None = None
        self.offered: list[str] = []
        self.on_login: Callable[[], object] = lambda: None
        self.judge = judge
        self.has_other_authority = False  # its certificate is of one that is not known
        self._blob = b""
        self._is_proved = False
        self._has_given = False

    @property
    def has_seen_key(self) -> bool:
        """Whether the host has said who it is."""
        return bool(self._blob) or self._is_proved

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Called before anything of us is sent."""
        self._blob = key.public_data
        self.refusal = self.judge.refusal(self._blob)
        return self.refusal is None

    def validate_host_ca_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Called for a certificate of an authority that is not known."""
        self.has_other_authority = True
        return False

    def begin_auth(self, username: str) -> None:
        """The host has proved that it has its key: now it is about us."""
        self._is_proved = True
        self.on_login()

    def note(self) -> bool:
        """Record the host's key, if it is new and was proved. Raises Usage."""
        return self._is_proved and bool(self._blob) and self.judge.note(self._blob)

    async def public_key_auth_requested(self) -> list[Any] | None:
        """All of our keys, once."""
        if self._has_given:
            return None
        self._has_given = True
        keys: list[Any] = []
        if self.login.agent is not None:
            with contextlib.suppress(ValueError):  # it has ended
                keys += await self.login.agent.get_keys(self.login.only)
        self.offered += [f"{len(keys)} of the agent"] if keys else []
        self.offered += [str(path) for path, _ in self.login.keys]
        return [*keys, *(key for _, key in self.login.keys)] or None


async def _dial(target: _Target, jump: Connection | None, guard: _Guard) -> asyncssh.SSHClientConnection:
    """A connection to `target`, which proved who it is. Raises asyncssh.Error and OSError."""
    loop = asyncio.get_running_loop()
    judge = guard.judge
    async with asyncio.timeout(CONNECT_S) as limit:
        guard.on_login = lambda: limit.reschedule(loop.time() + LOGIN_S)
        return await asyncssh.connect(
            target.address,
            target.port,
            tunnel=None if jump is None else jump.tunnel,
            config=None,
            client_factory=lambda: guard,
            known_hosts=judge.authorities(),
            server_host_key_algs=judge.algorithms(),
            encryption_algs=_CIPHERS,
            x509_trusted_certs=None,
            username=target.user,
            client_keys=None,  # the guard gives them
            preferred_auth="publickey",
            gss_host=None,
            keepalive_interval=ALIVE_S,
            keepalive_count_max=ALIVES_MAX,
            login_timeout=2 * LOGIN_S,
        )


def _explained(
    error: asyncssh.Error | OSError, target: _Target, jump: Connection | None, guard: _Guard
) -> MvmciError:
    """The sentence for what kept us from `target`."""
    if guard.refusal is not None:
        return guard.refusal
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return HostRefused(f"{target} does not prove who it is: {_words(error)}", hint="nothing was sent")
    if isinstance(error, asyncssh.PermissionDenied) or "authentication failures" in str(error):
        return _not_let_in(error, target, guard)
    if isinstance(error, asyncssh.ChannelOpenError):
        assert jump is not None
        return HostAway(f"{jump.name} does not reach {target}: {_words(error)}", hint="look at `address:`")
    if isinstance(error, asyncssh.ConnectionLost | ConnectionResetError | BrokenPipeError):
        what = "lets us in" if guard.has_seen_key else "says who it is"
        hint = "look at the log of its sshd; a full one drops connections (MaxStartups)"
        return HostAway(f"{target} hangs up before it {what}", hint=hint)
    if isinstance(error, asyncssh.Error):
        return HostRefused(f"{target} speaks no ssh that is understood here: {_words(error)}")
    return HostAway(*_unreached(error, target, guard), hint="look at `address:` and `port:`, and at the host")


def _unreached(error: OSError, target: _Target, guard: _Guard) -> tuple[str]:
    if isinstance(error, socket.gaierror):
        return (f"{target.name} is not found: there is no address of the name {target.address}",)
    if isinstance(error, TimeoutError) and guard.has_seen_key:
        return (f"{target} does not let us in within {LOGIN_S:.0f} s",)
    if isinstance(error, TimeoutError):
        return (f"{target} does not answer within {CONNECT_S:.0f} s",)
    if error.errno == errno.ECONNREFUSED or f"Errno {errno.ECONNREFUSED}]" in str(error):
        return (f"{target} refuses: nothing listens there",)
    return (f"there is no way to {target}: {error.strerror or error}",)


def _not_let_in(error: Exception, target: _Target, guard: _Guard) -> HostRefused:
    """Permission was denied: to whom, and with which keys."""
    who = f"{target} does not let {target.user} in"
    notes = "; ".join(guard.login.notes)
    if not guard.offered:
        none = notes or "the agent has none, and neither has ~/.ssh"
        return HostRefused(f"{who}, and there is no key to show it: {none}", hint="name one with `key:`")
    hint = (
        f"add one to ~/.ssh/authorized_keys of {target.user} there, or name another with `key:`, or `user:`"
    )
    if "authentication failures" in str(error):
        who, hint = f"{who}: too many keys were shown it", "name the right one with `key:`"
    return HostRefused(f"{who} with {', '.join(guard.offered)}", hint=f"{hint} ({notes})" if notes else hint)


def _pinned(target: _Target) -> HostKeys:
    """The one key that it may have. Raises Usage."""
    assert target.host_key is not None
    try:
        blob = known_hosts.parse_key(target.host_key)
    except ValueError:
        raise Usage(
            f"the `host_key:` of {target.name} is no public key",
            hint="as `ssh-keyscan` prints it behind the name: ssh-ed25519 AAAA…",
        ) from None
    return HostKeys(known={blob: known_hosts.KeyLine("host_key:", "", target.address, blob)})


def _keys(blobs: Iterable[bytes]) -> list[asyncssh.SSHKey]:
    """Keys as the library has them, without those of types that it does not know."""
    found = []
    for blob in blobs:
        with contextlib.suppress(asyncssh.KeyImportError):
            text = f"{key_type(blob)} {base64.b64encode(blob).decode()}"
            found.append(asyncssh.import_public_key(text))
    return found


def _own_name() -> str:
    """The user that we are here, and so there. Raises Usage."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise Usage("this user has no name, which ssh needs", hint="set LOGNAME to one") from None


def _words(error: BaseException) -> str:
    """What the library, or the other side, says."""
    return _shown(getattr(error, "reason", None) or str(error))


def _shown(text: str) -> str:
    return one_line(text)[:WORDS_CHARS_MAX]
