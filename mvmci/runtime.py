"""What starts the units of a cluster and watches them: the port of `runtimes/`.

A runtime knows processes and hosts, not jobs: that a unit is *ready* is for presence to say. It does what
it is told to the units that are named, and compares nothing: what differs, `cluster.changes` says. Units
that crash are started again, with growing pauses and under their names, for as long as the runtime runs.

Everything that can take a network's time is asynchronous. One suite in `tests/contracts` runs over all.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mvmci.cluster.broker import BrokerSettings
from mvmci.cluster.changes import Observed
from mvmci.cluster.deployment import Place, Unit, UnitConfig
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
    """Where the units of one cluster run. `apart`: only over a network can they be reached from here."""

    apart: bool

    async def check(self) -> None:
        """Raises Usage when units cannot run here, as far as that can be seen before a change."""

    async def place(self, unit: Unit) -> Place:
        """Where `unit`, which listens, is or will be. The same again, once it was started there.

        Raises Usage when it could not be started there: somebody else listens, or its program is missing.
        """

    def dial(self, broker: BrokerSettings) -> str:
        """The URL at which units reach a broker of ours."""

    def adds(self, topology: Topology, unit: Unit) -> tuple[tuple[str, str], ...]:
        """What this runtime adds to what a unit is started with: keys of the file and their values."""

    async def observe(self) -> list[Observed]:
        """The units that are kept running, and those that are still leaving. Raises MvmciError."""

    def watch(self) -> AsyncGenerator[list[Observed], None]:
        """What `observe` says, now and whenever it is something else. Never ends by itself.

        Raises MvmciError.
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

    def log(self, name: str, *, follow: bool = False) -> AsyncGenerator[bytes, None]:
        """What the unit `name` printed, as far as it is kept, in pieces; with `follow`, what it prints too.

        Raises NotFound where none of that name is, or was, kept running here; MvmciError.
        """

    async def forget(self) -> None:
        """Remove what stopped units left outside of the cluster's folder. Raises MvmciError."""
