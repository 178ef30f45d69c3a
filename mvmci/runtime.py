"""What starts the units of a plan and watches them: the port of `runtimes/`.

A runtime knows processes and hosts, not jobs: that a unit is *ready* is for presence to say. Units that
crash are started again, with growing pauses and under their names, for as long as the runtime runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.deployment import Deployment, Place, Role, Unit
from mvmci.cluster.identity import Login
from mvmci.cluster.topology import Topology
from mvmci.trust.authority import Authority

GRACE_S = 30.0  # how long a unit that is stopped may see to its jobs

State = Literal["starting", "ready", "draining", "down"]


class UnitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A unit as its runtime sees it. A process that runs is `starting`, until presence knows better.

    A balancer has no presence: it is `ready` when its runtime sees that its port answers.
    """

    name: str
    role: Role
    host: str
    state: State = "down"
    pid: int | None = None
    restarts: int = 0  # after a crash, since the runtime was started
    last_exit: int | None = None  # the code of its last process, negative for a signal
    reason: str = ""  # why it is down, as far as it said
    since: int = 0  # when it came into this state, ms since 1970
    hostname: str = ""  # what it tells others as its host, where it has one of its own: `pid` is then ours


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the units of a cluster stand on.

    `login` is that of nobody, and says where this machine reaches the broker; `broker` is None for one of
    the user's own. Units in `refused` come back under new keys.
    """

    authority: Authority
    login: Login
    broker: BrokerSettings | None
    topology: Topology
    plan: Deployment
    refused: frozenset[str] = frozenset()


class Runtime(Protocol):
    """Where the units of one cluster run. `apart`: only over a network can they be reached from here."""

    apart: bool

    def check(self) -> None:
        """Raises Usage when units cannot run here, as far as that can be seen before a change."""

    def place(self, unit: Unit) -> Place:
        """Where `unit`, which listens, is or will be. The same again, once it was started there.

        Raises Usage when it could not be started there: somebody else listens, or its program is missing.
        """

    def planned(self) -> tuple[Unit, ...]:
        """The units that are kept running now; none when nothing is."""

    def units(self) -> list[UnitStatus]:
        """What became of them, in the order of the plan."""

    async def lay_down(self, ground: Ground) -> None:
        """Put down what units find when they start. Takes as long as what it builds. Raises MvmciError."""

    async def apply(self, units: Sequence[Unit], *, attached: bool = False) -> None:
        """Keep exactly `units` running from now on: only what differs is touched.

        Returns when this is under way, not when they are ready: from then on, `units` says of none that
        is to be stopped or started anew that it runs on. What is started while `attached` is stopped when
        this process dies. Raises MvmciError.
        """

    async def ended(self) -> None:
        """Wait until nothing is kept running any more."""

    async def stop(self, grace_s: float = GRACE_S) -> bool:
        """Stop all units in the reverse order of their start, and wait. False: nothing was running."""

    async def forget(self) -> None:
        """Remove what stopped units left outside of the cluster's folder. Raises MvmciError."""
