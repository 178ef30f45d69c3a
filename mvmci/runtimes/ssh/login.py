"""With which keys we say who we are: those of this user's files and agent, or the one that a host names.

A key that others can read does not count, and one with a passphrase only as the agent has it. Of a usual one
that is said where the host does not let us in; a `key:` that does not count is an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from mvmci.errors import Usage
from mvmci.runtimes.ssh.failures import words
from mvmci.runtimes.ssh.target import Target

_KEY_FILES = ("id_rsa", "id_ecdsa", "id_ed25519")


@dataclass(frozen=True)
class Login:
    """With what we say who we are: private keys by their files, and the agent's."""

    keys: Sequence[tuple[Path, Any]]
    agent: asyncssh.SSHAgentClient | None
    only: Sequence[bytes] | None = None  # of the agent's keys
    notes: Sequence[str] = ()  # on keys that do not count


class Logins:
    """The keys of this user. What lies on the disk is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._agent: asyncssh.SSHAgentClient | None = None

    async def of(self, target: Target) -> Login:
        """What `target` is shown. Raises Usage for a `key:` that cannot be used."""
        agent = await self._ask_agent()
        if target.key is None:
            return self._usual(agent)
        path = self._folder / Path(target.key).expanduser()
        try:
            return Login([(path, _load(path))], None)
        except _Protected as error:
            if agent is None:
                raise Usage(error.message, hint=error.hint) from None
            return Login([], agent, only=_public_half(path))

    def close(self) -> None:
        """Leave the agent."""
        if self._agent is not None:
            self._agent.close()

    async def _ask_agent(self) -> asyncssh.SSHAgentClient | None:
        if self._agent is None and os.environ.get("SSH_AUTH_SOCK"):
            with contextlib.suppress(OSError):
                self._agent = await asyncssh.connect_agent()
        return self._agent

    def _usual(self, agent: asyncssh.SSHAgentClient | None) -> Login:
        keys: list[tuple[Path, Any]] = []
        notes: list[str] = []
        for name in _KEY_FILES:
            path = Path("~/.ssh", name).expanduser()
            if path.exists():
                try:
                    keys.append((path, _load(path)))
                except Usage as error:
                    notes.append(error.message)
        return Login(keys, agent, notes=notes)


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
        raise Usage(f"{path} is no private key: {words(error)}", hint="look at `key:`") from None
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
