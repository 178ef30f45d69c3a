"""Whom `mvmci revoke NAME` means: a unit, or all the units of a host."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mvmci.cluster.deployment import Unit
from mvmci.errors import NotFound, Usage
from mvmci.store import Member
from mvmci.trust.enrol.client import host_label
from mvmci.trust.registry import UnitRecord

Kind = Literal["unit", "host"]


@dataclass(frozen=True)
class Named:
    """The units that are meant, and those of a host that have no credential that could be revoked: its broker
    and balancer, and whoever never asked for one."""

    kind: Kind
    units: tuple[str, ...]
    others: tuple[str, ...] = ()


def named(
    name: str,
    deployed: Sequence[Unit],
    records: Mapping[str, UnitRecord],
    members: Iterable[Member],
    planes: Collection[str],
    kind: Kind | None = None,
) -> Named:
    """What `name` means, or means as that `kind`. A host is one of the file, or what a machine calls itself.

    Raises NotFound, Usage where it is both.
    """
    known = {*records, *planes}
    there = _on_host(name, deployed, {one: it for one, it in records.items() if not it.revoked}, members)
    host = Named("host", tuple(sorted(there & known)), tuple(sorted(there - known)))
    is_unit = name in known
    # A machine that joined without a name is called as its host is.
    if kind is None and is_unit and host.units and {*host.units, *host.others} != {name}:
        raise Usage(
            f"{name} is a unit, and a host with {', '.join((*host.units, *host.others))}",
            hint=f"`mvmci revoke {name} --unit`, or `--host` for all of them",
        )
    if is_unit and kind != "host":
        return Named("unit", (name,))
    if host.units and kind != "unit":
        return host
    what = kind or "unit or host"
    raise NotFound(f"there is no {what} {name[:80]} with a credential", hint="`mvmci ps` lists them")


def know_token(units: Collection[str], deployed: Sequence[Unit]) -> bool:
    """Whether some of `units` know what executors ask for over HTTP, one for the whole cluster."""
    members = {unit.name for unit in deployed if unit.role in ("worker", "executor")}
    return not members.isdisjoint(units) and any(unit.listen for unit in deployed)


def _on_host(
    name: str, deployed: Sequence[Unit], records: Mapping[str, UnitRecord], members: Iterable[Member]
) -> set[str]:
    """The units that the file puts on the host `name`; else those whose machine calls itself so. On a machine
    of the file there are those that came with a ticket too, unless another one calls itself as it does."""
    calls = {unit: {record.host} - {""} for unit, record in records.items()}
    for one in members:
        calls.setdefault(one.unit, set()).add(host_label(one.about.host))
    of_file = {unit.name for unit in deployed if unit.host == name}
    itself = {host_label(name)}
    if of_file:
        itself = {host for unit in of_file for host in calls.get(unit, ())}
        itself -= {host for unit in deployed if unit.name not in of_file for host in calls.get(unit.name, ())}
    return of_file | {unit for unit, hosts in calls.items() if hosts & itself}
