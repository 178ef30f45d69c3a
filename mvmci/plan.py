"""A plan: the units of a cluster, in the order in which they start. A topology's only product.

Everything after it (diff, start, wait, stop) is generic: it knows units, not accesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from mvmci.errors import Usage
from mvmci.job import check_id

LOCAL_HOST = "local"  # the host of a topology that names none
UNITS_MAX = 10_000

Role = Literal["broker", "control-plane", "executor", "worker"]
ROLES: tuple[Role, ...] = ("broker", "control-plane", "executor", "worker")  # the order of their start


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a cluster. `options` are those of its verb, without names and secrets."""

    name: str
    role: Role
    host: str
    options: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All units of a cluster."""

    units: tuple[Unit, ...]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What applying a plan does to one unit. `why` completes the line that a user reads."""

    kind: Literal["start", "stop", "restart"]
    unit: Unit
    why: str = ""


def deal(name: str, role: Role, count: int, hosts: Sequence[str], options: tuple[str, ...]) -> Iterator[Unit]:
    """`count` units, dealt round `hosts` in order: `worker-1`, `worker-2`, …"""
    for number in range(count):
        yield Unit(name=f"{name}-{number + 1}", role=role, host=hosts[number % len(hosts)], options=options)


def check(plan: Plan) -> None:
    """Raises Usage when no cluster can come of `plan`: a stranger's topology may have made it."""
    if len(plan.units) > UNITS_MAX:
        raise Usage(f"the plan has {len(plan.units)} units, and may have {UNITS_MAX}")
    names: set[str] = set()
    for unit in plan.units:
        check_id(unit.name, "unit's name")
        if unit.name in names:
            raise Usage(f"the plan has two units named {unit.name}", hint="a name is a unit's identity")
        names.add(unit.name)
    for role in ("control-plane", "worker"):
        if not any(unit.role == role for unit in plan.units):
            raise Usage(f"the plan has no {role}", hint="without one, no job would ever run")


def diff(old: Iterable[Unit], new: Iterable[Unit]) -> list[Change]:
    """What leads from `old` to `new`: stops last, starts and restarts in the order of `new`."""
    before = {unit.name: unit for unit in old}
    after = {unit.name: unit for unit in new}
    changes: list[Change] = []
    for unit in after.values():
        was = before.get(unit.name)
        if was is None:
            changes.append(Change(kind="start", unit=unit))
        elif was != unit:
            changes.append(Change(kind="restart", unit=unit, why=_difference(was, unit)))
    changes += [Change(kind="stop", unit=unit) for name, unit in before.items() if name not in after]
    return changes


def _difference(was: Unit, unit: Unit) -> str:
    if was.role != unit.role:
        return f"was {'an' if was.role == 'executor' else 'a'} {was.role}"
    if was.host != unit.host:
        return f"moves from {was.host} to {unit.host}"
    gone = [f"without {option}" for option in was.options if option not in unit.options]
    come = [f"with {option}" for option in unit.options if option not in was.options]
    return ", ".join([*gone, *come])
