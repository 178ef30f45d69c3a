"""One attempt at a connection: the host proves who it is, then we say who we are; or why there is none.

A host is who it says it is, or nothing of us is sent to it. Nothing of ~/.ssh/config counts, so nothing in
there turns that off. What kept us away is a sentence: `HostAway` for a host that does not answer now,
`HostRefused` for one that is not to be trusted, or does not let us in.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Any

import asyncssh

from mvmci.errors import HostAway, HostRefused, MvmciError
from mvmci.runtimes.ssh.failures import words
from mvmci.runtimes.ssh.host_keys import Judge
from mvmci.runtimes.ssh.known_hosts import key_type
from mvmci.runtimes.ssh.login import Login
from mvmci.runtimes.ssh.target import Target

CONNECT_S = 10.0  # until a host has shown its key
LOGIN_S = 60.0  # from then on: an agent may ask its user
ALIVE_S, ALIVES_MAX = 4.0, 2  # pings: who is unplugged is away within 12 s

# Twice as fast here as what the library would choose first.
_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"

asyncssh.set_log_level(logging.WARNING)


class Guard(asyncssh.SSHClient):
    """Judges a host's key, and then gives ours."""

    def __init__(self, judge: Judge, login: Login) -> None:
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


async def dial(
    target: Target, tunnel: asyncssh.SSHClientConnection | None, guard: Guard
) -> asyncssh.SSHClientConnection:
    """A connection to `target`, which proved who it is. Raises asyncssh.Error and OSError.

    `tunnel` is the connection to its jump host, if it has one.
    """
    loop = asyncio.get_running_loop()
    judge = guard.judge
    async with asyncio.timeout(CONNECT_S) as limit:
        guard.on_login = lambda: limit.reschedule(loop.time() + LOGIN_S)
        return await asyncssh.connect(
            target.address,
            target.port,
            tunnel=tunnel,
            config=None,
            client_factory=lambda: guard,
            known_hosts=_authorities(judge),
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


def explained(error: asyncssh.Error | OSError, target: Target, guard: Guard) -> MvmciError:
    """The sentence for what kept us from `target`."""
    if guard.refusal is not None:
        return guard.refusal
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return HostRefused(f"{target} does not prove who it is: {words(error)}", hint="nothing was sent")
    if isinstance(error, asyncssh.PermissionDenied) or "authentication failures" in str(error):
        return _not_let_in(error, target, guard)
    if isinstance(error, asyncssh.ChannelOpenError):
        return HostAway(f"{target.jump} does not reach {target}: {words(error)}", hint="look at `address:`")
    if isinstance(error, asyncssh.ConnectionLost | ConnectionResetError | BrokenPipeError):
        what = "lets us in" if guard.has_seen_key else "says who it is"
        hint = "look at the log of its sshd; a full one drops connections (MaxStartups)"
        return HostAway(f"{target} hangs up before it {what}", hint=hint)
    if isinstance(error, asyncssh.Error):
        return HostRefused(f"{target} speaks no ssh that is understood here: {words(error)}")
    return HostAway(*_unreached(error, target, guard), hint="look at `address:` and `port:`, and at the host")


def _unreached(error: OSError, target: Target, guard: Guard) -> tuple[str]:
    if isinstance(error, socket.gaierror):
        return (f"{target.name} is not found: there is no address of the name {target.address}",)
    if isinstance(error, TimeoutError) and guard.has_seen_key:
        return (f"{target} does not let us in within {LOGIN_S:.0f} s",)
    if isinstance(error, TimeoutError):
        return (f"{target} does not answer within {CONNECT_S:.0f} s",)
    if error.errno == errno.ECONNREFUSED or f"Errno {errno.ECONNREFUSED}]" in str(error):
        return (f"{target} refuses: nothing listens there",)
    return (f"there is no way to {target}: {error.strerror or error}",)


def _not_let_in(error: Exception, target: Target, guard: Guard) -> HostRefused:
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


def _authorities(judge: Judge) -> tuple[list[asyncssh.SSHKey], ...]:
    """What the library needs for certificates, which it judges: hosts' keys are for us to judge."""
    keys = judge.keys
    return [], _keys(keys.authorities), _keys(keys.revoked) if judge.takes_certificates else []


def _keys(blobs: Iterable[bytes]) -> list[asyncssh.SSHKey]:
    """Keys as the library has them, without those of types that it does not know."""
    found = []
    for blob in blobs:
        with contextlib.suppress(asyncssh.KeyImportError):
            text = f"{key_type(blob)} {base64.b64encode(blob).decode()}"
            found.append(asyncssh.import_public_key(text))
    return found
