"""What is to be done so that the units that are seen become those that are wanted.

One list, made here and nowhere else: `mvmci plan` prints it, and `mvmci up` executes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from mvmci.cluster.deployment import BROKER, EMBEDDED, ROLES, SERVING, RoleName, Unit, UnitConfig
from mvmci.config.quantity import format_size
from mvmci.errors import EXIT_REFUSED, EXIT_VERSIONS

UnitState = Literal["starting", "ready", "draining", "down"]
AFTER_MOVE = "once no worker uses it"


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """A unit as its runtime sees it. A process that runs is `starting`, until presence knows better.

    A balancer has no presence: it is `ready` when its runtime sees that its port answers.
    """

    name: str
    role: RoleName
    host: str
    state: UnitState = "down"
    config: UnitConfig | None = None  # what it was started with; None: that is not known
    pid: int | None = None
    restarts: int = 0  # after a crash, since it was started
    last_exit: int | None = None  # the code of its last process, negative for a signal
    reason: str = ""  # why it is down, as far as it said
    since: int = 0  # when it came into this state, ms since 1970
    hostname: str = ""  # what it tells others as its host, where it has one of its own: `pid` is then ours
    given_up: bool = False  # it is down, and its runtime does not start it again

    @property
    def refused(self) -> bool:
        """Whether it is down because its credential was not taken: it would not be under the same again."""
        return self.state == "down" and self.last_exit == EXIT_REFUSED

    @property
    def outdated(self) -> bool:
        """Whether it is down because the cluster speaks at a level that its program does not understand."""
        return self.state == "down" and self.last_exit == EXIT_VERSIONS


class HostRow(msgspec.Struct, frozen=True, kw_only=True):
    """A host as it was last seen from here, as `ps --json` prints it. One that is away says only why."""

    name: str
    address: str  # where it is dialled
    away: str | None = None
    skew_s: float | None = None  # how far its clock is ahead of ours
    skew_error_s: float | None = None  # and how exactly that is known
    python: str | None = None
    system: str | None = None  # kernel and architecture
    directory: str | None = None  # what mvmci keeps there
    programs: tuple[str, ...] = ()  # the digests of those that are there, the last used first


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that `up` does: to a unit, or for `set` to what the cluster is and allows.

    `why` completes the line that a user reads, and of `set` is all of it. `wait`: nothing can be done to it,
    as its host is away. `after_move`: when workers have left the engine that this unit is.
    """

    kind: Literal["start", "stop", "restart", "keep", "wait", "set"]
    unit: Unit | None = None
    why: str = ""
    after_move: bool = False

    @property
    def touches(self) -> bool:
        """Whether something is done to a unit."""
        return self.kind in ("start", "stop", "restart")


def steps(actions: Sequence[Action], share: float) -> list[list[Action]]:
    """`actions` in the order in which they are done, each step once the one before has come to be well.

    First whatever nobody has to wait for. Then what runs is started again: control planes, executors, and
    workers, of each role first on one host, and then on `share` of its hosts at a time. When the broker is
    started again, all are interrupted, and do it at once.
    """
    restarts = [action for action in actions if action.kind == "restart" and action.unit is not None]
    if any(action.unit.role == "broker" for action in restarts if action.unit is not None):
        return [[*actions]]
    found = [[action for action in actions if action.kind != "restart"]]
    for role in ROLES:
        by_host: dict[str, list[Action]] = {}
        for action in restarts:
            if action.unit is not None and action.unit.role == role:
                by_host.setdefault(action.unit.host, []).append(action)
        hosts = list(by_host)
        many = max(1, math.ceil(len(hosts) * share))
        for group in (hosts[:1], *(hosts[at : at + many] for at in range(1, len(hosts), many))):
            if group:
                found.append([action for host in group for action in by_host[host]])
    return [step for step in found if step] or [[]]


def next_generation(seen: Observed | None) -> int:
    """Of the key under which a unit is to run: another one than that which was refused."""
    if seen is None or seen.config is None:
        return 0
    return seen.config.generation + seen.refused


def changes(
    wanted: Sequence[UnitConfig],
    seen: Iterable[Observed],
    engine: str,
    *,
    moves: bool,
    away: Mapping[str, str] = {},
) -> list[Action]:
    """What leads from the units that are `seen` to `wanted`: in its order, and what is only stopped last.

    Hosts that are `away`, each with the reason, are left as they are, and so is a unit that is to leave one:
    it may still run there. `moves`: workers that run go to another `engine`. What they leave then stays until
    they have left it, unless it has to start again with everybody else.
    """
    by_name = {one.name: one for one in seen}
    pairs = [(config, by_name.pop(config.unit.name, None)) for config in wanted]
    keeps_old = moves and not any(_surroundings_differ(config, there) for config, there in pairs)
    actions = [_action(config, there, wanted, away) for config, there in pairs]
    for one in by_name.values():
        unit = Unit(name=one.name, role=one.role, host=one.host) if one.config is None else one.config.unit
        gone = away.get(one.host)
        actions.append(Action(kind="wait", unit=unit, why=gone) if gone else Action(kind="stop", unit=unit))
    return [_timed(action, engine) if keeps_old else action for action in actions]


def _timed(action: Action, engine: str) -> Action:
    """Every executor takes work from the broker. So one that changes can do so when its last HTTP worker has
    left it, unless it is over HTTP that workers are to reach it."""
    unit = action.unit
    late = action.kind == "stop" or (action.kind == "restart" and engine in (EMBEDDED, BROKER))
    if unit is None or unit.role not in SERVING or not late:
        return action
    why = ", ".join(filter(None, (action.why, AFTER_MOVE)))
    return msgspec.structs.replace(action, why=why, after_move=True)


def _action(
    config: UnitConfig, seen: Observed | None, wanted: Sequence[UnitConfig], away: Mapping[str, str]
) -> Action:
    unit = config.unit
    for host in (unit.host, *((seen.host,) if seen is not None else ())):
        if host in away:
            return Action(kind="wait", unit=unit, why=away[host])
    if seen is None:
        return Action(kind="start", unit=unit)
    if seen.given_up:
        return Action(kind="start", unit=unit, why=f"is down: {seen.reason}")
    if seen.config is None:
        return Action(kind="restart", unit=unit, why="it was not started by `mvmci up`")
    if seen.config != config:
        return Action(kind="restart", unit=unit, why=", ".join(_differences(seen.config, config, wanted)))
    if seen.state == "draining":  # whoever stopped it did not come as far as to start it
        return Action(kind="restart", unit=unit, why="it is being stopped")
    return Action(kind="keep", unit=unit)


def _surroundings_differ(config: UnitConfig, seen: Observed | None) -> bool:
    """Whether the broker, its keys or its runtime are to be others for a unit."""
    was, now = seen.config if seen is not None else None, config
    return was is not None and (was.dial, was.trust, was.runtime) != (now.dial, now.trust, now.runtime)


def _differences(was: UnitConfig, config: UnitConfig, wanted: Sequence[UnitConfig]) -> Iterator[str]:
    yield from _unit_differences(was.unit, config.unit)
    brokers = [one.broker for one in wanted if one.broker is not None]
    settings = (was.broker, config.broker)
    if was.dial != config.dial or len({one and (one.listen, one.port) for one in settings}) > 1:
        yield (
            f"the broker moves to {brokers[0].listen}, port {brokers[0].port}"
            if brokers
            else "the broker's address changes"
        )
    if was.trust != config.trust:
        yield "the cluster's keys change" if brokers else "the broker's credentials change"
    if was.broker is not None and config.broker is not None:
        if was.broker.synced != config.broker.synced:
            yield f"durability becomes {'strict' if config.broker.synced else 'relaxed'}"
        if was.broker.store_bytes != config.broker.store_bytes:
            yield f"its store becomes {format_size(config.broker.store_bytes)}"
    if was.program != config.program:
        yield "the program changes"
    for key in dict.fromkeys([*dict(was.runtime), *dict(config.runtime)]):
        if dict(was.runtime).get(key) != dict(config.runtime).get(key):
            yield f"{key} changes"
    if was.generation != config.generation:
        yield "it gets another key"


def _unit_differences(was: Unit, unit: Unit) -> Iterator[str]:
    if was.role != unit.role:
        yield f"was {'an' if was.role == 'executor' else 'a'} {was.role}"
        return
    if was.host != unit.host:
        yield f"moves from {was.host} to {unit.host}"
    yield from (f"without {option}" for option in was.options if option not in unit.options)
    yield from (f"with {option}" for option in unit.options if option not in was.options)


def in_stopping_order(roles: Iterable[RoleName]) -> list[RoleName]:
    """Workers first and the broker last: what others let go must be written down."""
    return sorted(set(roles), key=ROLES.index, reverse=True)
