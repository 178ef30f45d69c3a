"""Who belongs to a cluster and how each of them is: what its runtime and what presence say, put together.

The runtime knows processes; presence knows who is at work, on any machine. Pure: a function of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from mvmci.cluster.changes import HostRow, Observed, UnitState
from mvmci.cluster.deployment import ROLES, Unit
from mvmci.store import Member, copies

OTHER_BUILD = "it runs another build than the cluster: `mvmci upgrade` there"
SILENT = "its process runs, and says nothing to the broker"
SILENT_MS = 10_000  # a process that has run for so long and says nothing is not starting any more


class UnitRow(msgspec.Struct, frozen=True, kw_only=True):
    """One unit, as `ps --json` prints it. `pid` is that of the process that does the work, if it is here."""

    name: str
    role: str
    host: str
    state: UnitState
    pid: int | None = None
    slots: int = 0
    busy: int = 0
    queues: tuple[str, ...] = ()
    isolation: str | None = None
    version: str | None = None
    reason: str | None = None  # why it is down or takes no jobs, or what else is to be known of it
    labels: dict[str, str] = {}
    address: str | None = None  # where others dial it
    drained: bool = False  # by `mvmci drain`, and not because it stops
    build: str | None = None  # what tells its program from another one of the same version

    @property
    def is_settled(self) -> bool:
        """Whether it is as it is to be: at work, or kept from it by the owner's word."""
        return self.state == "ready" or (self.state == "draining" and self.drained)


class Room(msgspec.Struct, frozen=True):
    """How full a part of the store is, in bytes."""

    used: int
    most: int


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All of a cluster, as `ps --json` prints it. Of a cluster on other machines, not all is known."""

    cluster: str
    access: str | None
    runtime: str | None
    units: list[UnitRow]
    loss: tuple[str, ...] = ()  # what its store lacks, until `mvmci recover`
    trouble: str = ""  # why a broker on this machine stores nothing now
    store: dict[str, Room] = {}  # of journals and blobs
    hosts: list[HostRow] = []  # that are reached over a network


def rows(
    planned: Sequence[Unit],
    seen: Iterable[Observed],
    members: Sequence[Member] | None,
    *,
    here: str,
    now_ms: int,
    broker_at: str | None = None,
    hosts: Iterable[HostRow] = (),
) -> list[UnitRow]:
    """The `planned` units in their order, those that are still leaving, and who joined by hand.

    `members` is None when nobody could be asked. `here` is what units of this machine give as their host, and
    `broker_at` the URL at which others reach the broker. Units on `hosts` are reached where those are.
    """
    builds = {one.about.build for one in members or () if one.unit in {unit.name for unit in planned}} - {""}
    at = {host.name: host.address.rpartition(":")[0] for host in hosts}
    addresses = {
        unit.name: broker_at if unit.role == "broker" else _reached(unit, at.get(unit.host))
        for unit in planned
    }
    down = [Observed(name=unit.name, role=unit.role, host=unit.host) for unit in planned]
    units = list(({one.name: one for one in down} | {one.name: one for one in seen}).values())
    known, copied = {unit.name: unit for unit in units}, copies(members or ())
    joined = [
        _with_word(UnitRow(name=one.unit, role=one.about.role, host=one.about.host, state="ready"), one, here)
        for one in members or ()
        if one.about.role in ROLES
        and (one.unit not in known or (one.unit in copied and not _is_of(one, known[one.unit])))
    ]
    joined = [
        msgspec.structs.replace(row, reason=OTHER_BUILD)
        if builds and row.build and row.build not in builds and not row.reason
        else row
        for row in joined
    ]
    order = {str(role): place for place, role in enumerate(ROLES)}
    joined.sort(key=lambda row: (order[row.role], row.name, row.host))
    return [
        msgspec.structs.replace(
            row,
            address=addresses.get(row.name),
            reason=f"its identity was copied: it runs on {copied[row.name]}"
            if row.name in copied
            else row.reason,
        )
        for row in [*(_row(unit, members, here, now_ms) for unit in units), *joined]
    ]


def _reached(unit: Unit, address: str | None) -> str | None:
    """Where others dial a unit whose host has that `address`: it may listen at every one."""
    if unit.listen is None or address is None:
        return unit.listen
    return f"{address}:{unit.listen.rpartition(':')[2]}"


def _row(status: Observed, members: Sequence[Member] | None, here: str, now_ms: int) -> UnitRow:
    row = UnitRow(name=status.name, role=status.role, host=status.host, state=status.state, pid=status.pid)
    if status.state == "down":
        return msgspec.structs.replace(row, reason=status.reason or None)
    # A word of an earlier process of that name may still be there.
    words = (one for one in members or () if one.unit == status.name and _is_of(one, status))
    word = next(words, None)
    if word is not None:
        row = _with_word(row, word, here)
    if status.state == "draining":
        return msgspec.structs.replace(row, state="draining", drained=False, reason=None)
    if members is None or word is not None or status.state == "ready":
        return row
    if status.role == "broker":
        return msgspec.structs.replace(row, state="ready")  # who asked it for the members got an answer
    if now_ms - status.since <= SILENT_MS:
        return row
    return msgspec.structs.replace(row, state="down", reason=SILENT)


def _is_of(member: Member, status: Observed) -> bool:
    """Whether that very process, or container, said so."""
    if status.hostname:
        return member.about.host == status.hostname
    return member.about.pid == status.pid


def _with_word(row: UnitRow, member: Member, here: str) -> UnitRow:
    """`row`, with what the unit says of itself."""
    about = member.about
    return msgspec.structs.replace(
        row,
        state="ready" if about.state == "ready" else "draining",  # in others, too, it takes no jobs
        pid=row.pid or (about.pid if about.host == here else None),
        slots=about.slots,
        busy=len(member.jobs | set(member.keeps)),
        queues=about.queues,
        labels=about.labels,
        isolation=about.isolation or None,
        version=about.version or None,
        build=about.build or None,
        drained=about.drained,
        reason=about.trouble or ("drained by `mvmci drain`" if about.drained else None),
    )
