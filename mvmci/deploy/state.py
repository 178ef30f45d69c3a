"""What this machine keeps of a cluster that was brought up from here: one folder, and who may change it.

    <root>/<cluster>/version          the number of this format
                     lock             who is at work on the cluster: one `up` or `down` at a time
                     topology.yaml    the file as it was last applied, in full
                     applied.json     the `Deployment` that it came to
                     cluster.json     `Facts`

Keys, the broker's files and those of the units lie beside them, and belong to those who use them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from mvmci.cluster import topology
from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.deployment import Deployment
from mvmci.cluster.identity import Login
from mvmci.cluster.topology import HostSection, Topology
from mvmci.errors import StoreUnavailable, Usage, VersionsDiffer
from mvmci.runtime import Runtime
from mvmci.runtimes import open_runtime
from mvmci.system.files import private_folder, write_private
from mvmci.system.lock import acquire, hold
from mvmci.trust.known import CLIENT, KEYS

VERSION = "1"


class Facts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the cluster's broker is reached, what it is, and what units run on. `login` is that of nobody.

    `urls` is where other machines dial, and `broker` is None for a broker of the user's own.
    """

    login: Login
    urls: tuple[str, ...] = ()
    broker: BrokerSettings | None = None
    runtime: str = "local"
    file: str = ""  # that was applied last in full

    @property
    def outside(self) -> Login:
        """How other machines reach it."""
        return msgspec.structs.replace(self.login, urls=self.urls or self.login.urls)


@dataclass(frozen=True)
class ClusterState:
    """The folder of one cluster."""

    root: Path
    cluster: str
    _runtimes: list[tuple[str, Mapping[str, HostSection] | None, Runtime]] = field(
        default_factory=list, compare=False, repr=False
    )

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.root / self.cluster

    @property
    def ticket(self) -> Path:
        """What `mvmci worker --join @…` takes."""
        return self.folder / "ticket"

    def runtime(
        self,
        name: str | None = None,
        hosts: Mapping[str, HostSection] | None = None,
        *,
        accept_new_host_keys: bool = False,
    ) -> Runtime:
        """What its units run on: `name`, or what they were brought up on; the same each time, until `close`.

        With `hosts`, on those, as a file says them. Raises Usage.
        """
        facts = self.facts() if name is None else None
        name = name or (facts.runtime if facts is not None else "local")
        for there, on, runtime in reversed(self._runtimes):
            if there == name and hosts in (None, on):
                return runtime
        runtime = open_runtime(
            name, self.root, self.cluster, hosts or {}, accept_new_host_keys=accept_new_host_keys
        )
        self._runtimes.append((name, hosts, runtime))
        return runtime

    async def close(self) -> None:
        """Let go of the connections of its runtimes."""
        while self._runtimes:
            await self._runtimes.pop()[2].close()

    async def __aenter__(self) -> ClusterState:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def unit(self, name: str) -> Path:
        """What a unit of this machine has: its `identity.json`, and the `log` of what it printed."""
        return self.folder / "units" / name

    def applied(self) -> Topology | None:
        """The file as it was last applied; None before the first time. Raises BadTopology."""
        file = self.folder / "topology.yaml"
        return topology.read_topology(file.read_bytes(), name=str(file)) if file.exists() else None

    def facts(self) -> Facts | None:
        """How the broker is reached; None where that was never laid down. Raises Usage."""
        file = self.folder / "cluster.json"
        try:
            return msgspec.json.decode(file.read_bytes(), type=Facts)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is damaged"
            raise Usage(f"{file} cannot be read: {why}", hint="remove it, and `mvmci up` again") from None

    def keep_facts(self, facts: Facts) -> None:
        """Write down how the broker is reached."""
        write_private(self.folder / "cluster.json", msgspec.json.encode(facts))

    def applied_deployment(self) -> Deployment:
        """What was last applied, with every unit's place; before the first time, one with no units."""
        try:
            return msgspec.json.decode((self.folder / "applied.json").read_bytes(), type=Deployment)
        except (OSError, msgspec.DecodeError):
            return Deployment(units=())

    def keep_applied(self, text: bytes, deployment: Deployment) -> None:
        """Write down that the file was applied in full, and what it came to."""
        write_private(self.folder / "applied.json", msgspec.json.encode(deployment))
        write_private(self.folder / "topology.yaml", text)

    def check_version(self) -> None:
        """Raises VersionsDiffer when another mvmci made this folder."""
        file = self.folder / "version"
        found = file.read_text(errors="replace").strip() if file.exists() else VERSION
        if found != VERSION:
            raise VersionsDiffer(
                f"{self.folder} was made by an mvmci of another format: {found[:20]!r}, where this one's is "
                f"{VERSION!r}",
                hint="use the version that made it, or name another directory with --state",
            )

    @property
    def is_ours(self) -> bool:
        """Whether the cluster was brought up from here."""
        return (self.folder / KEYS).is_dir()

    def check_keys(self) -> None:
        """Raises StoreUnavailable where only a client or a unit of the cluster is, which was brought up
        elsewhere: another one of that name would hide it, and what is kept here is not ours to remove."""
        joined = (self.folder / CLIENT, *self.folder.glob("units/*/identity.json"))
        if not self.is_ours and any(path.exists() for path in joined):
            raise StoreUnavailable(
                f"the keys of cluster {self.cluster} are not on this machine",
                hint="do this as the user, and on the machine, that called `mvmci up`; "
                f"a cluster of its own needs another name, or --state DIR: {self.folder} belongs to that one",
            )

    def check_free(self) -> None:
        """Raises LockHeld when somebody is at work on the cluster now."""
        if (self.folder / "lock").exists():
            os.close(acquire(self.folder / "lock", *self._busy))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only one at work on the cluster. Raises LockHeld, which says who is, and Usage."""
        try:
            private_folder(self.folder)
        except OSError as error:
            raise Usage(
                f"the state directory {self.root} cannot be used: {error.strerror}",
                hint="name another one with --state DIR or MVMCI_STATE",
            ) from None
        with hold(self.folder / "lock", *self._busy):
            yield

    @property
    def _busy(self) -> tuple[str, str]:
        return f"is at work on {self.cluster}", "wait until it has finished, then try again"

    def remove(self) -> None:
        """Remove all of it; the lock is held."""
        shutil.rmtree(self.folder)
