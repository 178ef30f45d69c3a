"""The level at which a cluster writes (`mvmci.wire`): raised once all that are to read understand the next.

Who is to read is everybody who is present, and every unit of the registry, also one that is away: it may come
back as it was. What each understands it says in presence, and the registry keeps that. Not counted are
clients, which hold nothing and are told when they are too old; and units of `up` that were not there for
`AWAY_S`: whoever starts those again gives them a program of its own.

Who holds a level up is said once, by name. A machine that does not come back is let go by `mvmci revoke`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable

import msgspec

from mvmci.store import Member
from mvmci.stores.nats import Cluster
from mvmci.trust.registry import UnitRecord, change_unit, read_units
from mvmci.wire import WIRE

SETTLED_S = 5.0  # for so long nobody is in the way: after a broker's restart not all have spoken yet
AWAY_S = 600.0
NAMED_MAX = 5

log = logging.getLogger(__name__)


class Leveller:
    """Raises the level of one cluster. `clock` is monotonic, in s."""

    def __init__(self, cluster: Cluster, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._clock = clock
        self._began = clock()
        self._seen: dict[str, float] = {}  # when a unit was last there
        self._free_since: float | None = None  # since when nobody is in the way
        self._named: list[str] = []
        cluster.link.on_reconnect.append(self._begin_anew)

    def _begin_anew(self) -> None:
        self._free_since = None

    async def look(self, members: Iterable[Member]) -> None:
        """See who is in the way of the next level, and raise it if nobody was for a while.

        Raises StoreUnavailable, and VersionsDiffer where it was raised beyond what this build understands.
        """
        level = self._cluster.store.level.spoken + 1
        if level > WIRE:
            return
        there: dict[str, int] = {}
        for one in members:  # of copies of one identity the oldest build counts
            there[one.unit] = min(one.about.wire, there.get(one.unit, one.about.wire))
        records = await read_units(self._cluster.config)
        await self._note(there, records)
        slow = sorted(behind(level, there, records, self._is_away))
        if slow != self._named and slow:
            more = f" and {len(slow) - NAMED_MAX} more" if len(slow) > NAMED_MAX else ""
            log.info("level %d waits for %s%s, of an older build", level, ", ".join(slow[:NAMED_MAX]), more)
        self._named = slow
        if slow:
            self._free_since = None
            return
        self._free_since = self._free_since if self._free_since is not None else self._clock()
        if self._clock() - self._free_since < SETTLED_S:
            return
        if await self._cluster.config.raise_level(level):
            log.info("all units understand level %d: from now on it is spoken", level)

    async def _note(self, there: dict[str, int], records: dict[str, UnitRecord]) -> None:
        """Let the registry keep what those who are there understand."""
        for unit, wire in there.items():
            self._seen[unit] = self._clock()
            if unit in records and records[unit].wire != wire:
                noted = await change_unit(self._cluster.config, unit, functools.partial(_with_wire, wire))
                if noted is not None:
                    records[unit] = noted

    def _is_away(self, unit: str) -> bool:
        return self._clock() - self._seen.get(unit, self._began) > AWAY_S


def _with_wire(wire: int, there: UnitRecord | None) -> UnitRecord | None:
    return None if there is None else msgspec.structs.replace(there, wire=wire)


def behind(
    level: int, there: dict[str, int], records: dict[str, UnitRecord], is_away: Callable[[str], bool]
) -> set[str]:
    """The units that do not understand `level`: of those that are `there`, and of the registry."""
    known = {
        unit: record.wire
        for unit, record in records.items()
        if record.role != "client" and not record.revoked and (record.ticket or not is_away(unit))
    }
    return {unit for unit, wire in (known | there).items() if wire < level}
