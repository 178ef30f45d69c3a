"""Whom to dial: a host of the cluster file, or a jump host that need not stand in there."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from dataclasses import dataclass

from mvmci.cluster.topology import HostSection, host_and_port
from mvmci.errors import Usage
from mvmci.runtimes.ssh.known_hosts import SSH_PORT, host_name


@dataclass(frozen=True, kw_only=True)
class Target:
    """Whom to dial. `name` is what it is called in sentences."""

    name: str
    address: str
    port: int
    user: str
    key: str | None = None
    host_key: str | None = None
    jump: str | None = None

    def __str__(self) -> str:
        where = host_name(self.address, self.port)
        return self.name if self.name == where else f"{self.name} ({where})"


def find_target(hosts: Mapping[str, HostSection], name: str) -> Target:
    """The host `name` of `hosts`; what is none of them is [USER@]ADDRESS[:PORT]. Raises Usage."""
    host = hosts.get(name)
    if host is not None:
        return Target(
            name=name,
            address=(host.address or name).strip("[]"),
            port=host.port,
            user=host.user or own_name(),
            key=host.key,
            host_key=host.host_key,
            jump=host.jump,
        )
    user, _, place = name.rpartition("@")
    address, port = host_and_port(place)
    address = address.strip("[]")
    where = int(port or SSH_PORT)
    return Target(name=name, address=address, port=where, user=user or own_name())


def own_name() -> str:
    """The user that we are here, and so there. Raises Usage."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise Usage("this user has no name, which ssh needs", hint="set LOGNAME to one") from None
