"""What starts the units of a cluster and watches them: the port of `runtimes/`.

A runtime knows processes and hosts, not jobs: that a unit is *ready* is for presence to say. It does what
it is told to the units that are named, and compares nothing: what differs, `cluster.changes` says. Units
that crash are started again, with growing pauses and under their names, for as long as the runtime runs.

Everything that can take a network's time is asynchronous. One suite in `tests/contracts` runs over all.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mvmci.cluster.broker import ANY_PORT, LOOPBACK, BrokerSettings, url_of
from mvmci.cluster.changes import HostRow, Observed
from mvmci.cluster.deployment import Place, RoleName, Unit, UnitConfig
from mvmci.system.ports import check_port, is_loopback

if TYPE_CHECKING:  # supervisors, of which each host has one, need neither
    from mvmci.cluster.topology import Topology
    from mvmci.trust.authority import Authority

GRACE_S = 30.0  # how long a unit that is stopped may see to its jobs
_REASON_CHARS_MAX = 300
_USUAL = (" INFO ", " DEBUG ", "[INF]", "[DBG]")  # lines of logs, ours and the server's, that tell no trouble


def why_ended(lines: Iterable[str], how: str) -> str:
    """Why a unit ended that printed `lines`: its last error, else `how` and the last that it said."""
    said = [line.strip() for line in lines if line.strip() and not any(mark in line for mark in _USUAL)]
    errors = [line.removeprefix("Error: ") for line in said if line.startswith("Error: ")]
    why = errors[-1] if errors else f"{how}: {said[-1]}" if said else how
    return why[:_REASON_CHARS_MAX]


@dataclass(frozen=True, kw_only=True)
class Provisioning:
    """What is put where units find it when they start: for `starting`, among all that are `wanted`."""

    authority: Authority
    topology: Topology
    wanted: Sequence[UnitConfig]
    starting: Sequence[UnitConfig]


class Runtime(Protocol):
    """Where the units of one cluster run. `apart`: only over a network can they be reached from here.

    `away` are the hosts that could not be reached when this was last tried, each with the reason. Nothing is
    done there, and what is asked for there is left out. A broker of ours listens at `broker_listen` and
    `broker_port` where the file does not say. `notes` are sentences for the user, on what was started.
    """

    apart: bool
    away: Mapping[str, str]
    notes: Sequence[str]
    broker_listen: str
    broker_port: int

    async def check(self) -> None:
        """Raises Usage when units cannot run here, as far as that can be seen before a change."""

    async def place(self, unit: Unit) -> Place:
        """Where `unit`, which listens, is or will be. The same again, once it was started there.

        Raises Usage when it could not be started there: somebody else listens, or its program is missing.
        """

    async def check_port(self, unit: Unit, address: str, port: int) -> None:
        """Raises Usage where `unit`, which does not run yet, could not listen there."""

    def dial(self, unit: Unit, broker: BrokerSettings) -> str:
        """The URL at which units reach `unit`, a broker of ours."""

    def dial_here(self, unit: Unit, broker: BrokerSettings) -> str:
        """The one at which this machine does."""

    def adds(self, topology: Topology, unit: Unit) -> tuple[tuple[str, str], ...]:
        """What this runtime adds to what a unit is started with: keys of the file and their values."""

    async def observe(self) -> list[Observed]:
        """The units that are kept running, and those that are still leaving. Raises MvmciError.

        Those on a host that is away are as they were left, and down.
        """

    def watch(self) -> AsyncGenerator[list[Observed], None]:
        """What `observe` says, now and whenever it is something else. Never ends by itself.

        Raises MvmciError.
        """

    def lock(self, hosts: Collection[str] | None, owner: str) -> AbstractAsyncContextManager[None]:
        """Be the only one at work on the cluster on these hosts, or all. `owner` says whose cluster it is.

        Raises LockHeld, Usage where another cluster of that name is there.
        """

    async def provision(self, provisioning: Provisioning) -> None:
        """Put down what units find when they start. Takes as long as what it builds. Raises MvmciError."""

    async def start(self, units: Sequence[UnitConfig], *, attached: bool = False) -> None:
        """Keep `units` running from now on. One that runs, and was started with the same, is left alone.

        Returns when this is under way, not when they are ready. When nothing ran before, and `attached`,
        they are stopped when this process dies. Raises MvmciError.
        """

    async def stop(self, names: Collection[str] | None = None, grace_s: float = GRACE_S) -> bool:
        """Stop the units of these names, or all, in the reverse order of their start, and wait.

        False: nothing of that was kept running. Raises MvmciError.
        """

    def log(self, name: str, *, follow: bool = False, last: int | None = None) -> AsyncGenerator[bytes, None]:
        """What the unit `name` printed, as far as it is kept, in pieces; with `follow`, what it prints too.

        With `last`, no more than about so many bytes of what it has printed until now.
        Raises NotFound where none of that name is, or was, kept running here; MvmciError.
        """

    def hosts(self) -> list[HostRow]:
        """The hosts that are reached over a network, as they were last seen."""

    def absent(self) -> list[str]:
        """The hosts that are to be emptied, and are not yet."""

    def rerouted(self) -> list[str]:
        """The hosts that are reached otherwise than was written down. `lock` writes it down."""

    def lost(self) -> Mapping[str, Mapping[str, RoleName]]:
        """The hosts that the file gives up, and that were not yet given up, each with its units."""

    def give_up(self, authority: Authority) -> None:
        """Write down that those hosts are lost, once the keys of their units are revoked in the ledger. What
        runs there counts as nothing from then on."""

    def returned(self) -> list[str]:
        """The hosts that were given up and are to be used again. `lock` empties them first."""

    def left(self) -> list[str]:
        """What stays on hosts that are lost, and what removes it there: a sentence for each."""

    async def forget(self, hosts: Collection[str] | None = None) -> None:
        """Remove what stopped units left outside of the cluster's folder: on these hosts, or everywhere.

        Raises MvmciError.
        """

    async def close(self) -> None:
        """Let go of all connections."""


class OfThisMachine:
    """What the runtimes have in common whose units are all on this machine."""

    away: Mapping[str, str] = {}
    notes: Sequence[str] = ()
    broker_listen, broker_port = LOOPBACK, ANY_PORT
    apart: bool

    async def check_port(self, unit: Unit, address: str, port: int) -> None:
        check_port(address, max(port, 0))

    def dial_here(self, unit: Unit, broker: BrokerSettings) -> str:
        return url_of(broker, tls=self.apart or not is_loopback(broker.listen))

    @contextlib.asynccontextmanager
    async def lock(self, hosts: Collection[str] | None, owner: str) -> AsyncIterator[None]:
        yield  # the lock of the cluster's folder is that of its only host

    def hosts(self) -> list[HostRow]:
        return []

    def absent(self) -> list[str]:
        return []

    def rerouted(self) -> list[str]:
        return []

    def lost(self) -> Mapping[str, Mapping[str, RoleName]]:
        return {}

    def give_up(self, authority: Authority) -> None:
        """There is nobody to be given up."""

    def returned(self) -> list[str]:
        return []

    def left(self) -> list[str]:
        return []

    async def close(self) -> None:
        """There is none."""
