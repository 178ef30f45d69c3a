"""A deployment: the units of a cluster, in the order of their start, and how workers reach an engine.

A topology's only product. Everything after it (changes, start, wait, stop) is generic: it knows units, not
accesses. A deployment does not know where units will be: `{listen}` in an option of a unit stands for what
that unit binds, and `{address:UNIT}`, there or in `engine`, for where others reach it. `resolve` fills them
in, and a `UnitConfig` then says of each unit all that it is started with.

Accesses, ours as anybody's, are built of `central`, `executors`, `balancer` and `workers`.
"""

from __future__ import annotations

import graphlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from mvmci.cluster.broker import BrokerSettings
from mvmci.errors import Usage
from mvmci.jobs.job import check_id

if TYPE_CHECKING:
    from mvmci.cluster.topology import ExecutorsSection, Topology

LOCAL_HOST = "local"  # the host of a topology that names none
UNITS_MAX = 10_000
EMBEDDED, BROKER = "embedded", "broker"
LISTENS = "--listen={listen}"  # the option of a unit that others dial

RoleName = Literal["broker", "control-plane", "executor", "balancer", "worker"]
# The order of their start.
ROLES: tuple[RoleName, ...] = ("broker", "control-plane", "executor", "balancer", "worker")
SERVING: tuple[RoleName, ...] = ("executor", "balancer")  # those that workers may be in the middle of using

_HOLE = re.compile(r"\{(?:listen|address:([^{}]+))\}")
_PLAIN = re.compile(r"\bhttp://\{address:")
_URL = re.compile(r"https?://[^@\s{}]+")


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a cluster. `options` are those of its verb, without names and secrets."""

    name: str
    role: RoleName
    host: str
    options: tuple[str, ...] = ()

    @property
    def listen(self) -> str | None:
        """What it binds; None where nobody dials it."""
        return next((one.partition("=")[2] for one in self.options if one.startswith("--listen=")), None)


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """All units of a cluster, and how workers reach an engine: "embedded", "broker", or a URL."""

    units: tuple[Unit, ...]
    engine: str = EMBEDDED


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a unit is: the host:port that it binds, and the one at which others reach it."""

    listen: str
    address: str


class UnitConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a unit is started with, as far as it means something. It holds no secret and may be shown.

    Two that are equal need no restart. What is minted anew each time, such as tokens, is not in it.
    """

    unit: Unit
    program: str = ""  # the digest of the file that mvmci is
    dial: tuple[str, ...] = ()  # the URLs of the broker; none for who does not dial it
    trust: str = ""  # a digest of whom it believes: the cluster's public keys, or its one credential
    broker: BrokerSettings | None = None  # what the broker is to be, where this is it
    runtime: tuple[tuple[str, str], ...] = ()  # what its runtime adds: a key of the file, and its value
    generation: int = 0  # of its own key: a unit that was refused comes back under the next one


# ---- What deployments are built of


def deal(
    name: str, role: RoleName, count: int, hosts: Sequence[str], options: tuple[str, ...]
) -> Iterator[Unit]:
    """`count` units, dealt round `hosts` in order: `worker-1`, `worker-2`, …"""
    for number in range(count):
        yield Unit(name=f"{name}-{number + 1}", role=role, host=hosts[number % len(hosts)], options=options)


def hosts_of(topology: Topology) -> list[str]:
    """The hosts that are present, in the order of the file; else the one that stands for this machine."""
    return [name for name, host in topology.hosts.items() if host.state == "present"] or [LOCAL_HOST]


def planes(topology: Topology) -> Sequence[str]:
    """The hosts of control planes."""
    return topology.control_plane.hosts or hosts_of(topology)[:1]


def central(topology: Topology) -> Iterator[Unit]:
    """What every cluster has: a broker, unless there is one, and a control plane."""
    if topology.broker.url is None:
        brokers = topology.broker.hosts or hosts_of(topology)[:1]
        yield from deal("broker", "broker", len(brokers), brokers, ())
    hosts = planes(topology)
    yield from deal("control-plane", "control-plane", len(hosts), hosts, ())


def executors(topology: Topology, *options: str, hosts: Sequence[str] = ()) -> Iterator[Unit]:
    """The executors of the file, each with `options` too. They are on `hosts` where the file names none."""
    found = _executors(topology)
    told = (*executor_options(topology), *options)
    yield from deal("executor", "executor", found.count, found.hosts or hosts or hosts_of(topology), told)


def executor_options(topology: Topology) -> tuple[str, ...]:
    """What every executor is told: its slots, and the isolation without which it may run nothing."""
    found = _executors(topology)
    slots = (f"--slots={found.slots}",) if found.slots is not None else ()
    return (*slots, *_isolation(topology))


def _executors(topology: Topology) -> ExecutorsSection:
    """That section of the file, or what it says where there is none."""
    from mvmci.cluster.topology import ExecutorsSection  # here, and not above: every unit loads this module

    return topology.executors or ExecutorsSection()


def balancer(topology: Topology, behind: Iterable[Unit]) -> Unit:
    """A balancer, beside the control plane, in front of the executors `behind`."""
    backends = (f"--backend={unit.name}={{address:{unit.name}}}" for unit in behind)
    return Unit(name="balancer-1", role="balancer", host=planes(topology)[0], options=(LISTENS, *backends))


def workers(topology: Topology) -> Iterator[Unit]:
    """The workers of the file. They are always told of isolation: one day, the engine may be in them."""
    for group in topology.groups:
        slots = (f"--slots={group.slots}",) if group.slots is not None else ()
        queues = [f"--queue={queue}" for queue in group.queues]
        for unit in deal(group.name, "worker", group.count, group.hosts or hosts_of(topology), ()):
            host = topology.hosts.get(unit.host)
            own = host.labels if host is not None else {}  # a host knows better what it is than a group
            labels = (f"--label={key}={value}" for key, value in sorted((group.labels | own).items()))
            told = (*slots, *queues, *labels, *_isolation(topology))
            yield msgspec.structs.replace(unit, options=told)


def _isolation(topology: Topology) -> Iterator[str]:
    if topology.min_isolation != "process":
        yield f"--min-isolation={topology.min_isolation}"
    if topology.isolation != "reuse":
        yield f"--isolation={topology.isolation}"


# ---- Whether a cluster can come of one: a stranger's topology may have made it


def check_deployment(deployment: Deployment, hosts: Collection[str]) -> None:
    """Raises Usage when no cluster on `hosts` can come of `deployment`."""
    _check_form(deployment)
    by_name: dict[str, Unit] = {}
    for unit in deployment.units:
        check_id(unit.name, "unit's name")
        if unit.name in by_name:
            raise Usage(f"the plan has two units named {unit.name}", hint="a name is a unit's identity")
        if unit.host not in hosts:
            raise Usage(
                f"{unit.name} is to be on {unit.host}, which is no host of the file",
                hint=f"there is {', '.join(hosts)}",
            )
        by_name[unit.name] = unit
    for role in ("control-plane", "worker"):
        if not any(unit.role == role for unit in deployment.units):
            raise Usage(f"the plan has no {role}", hint="without one, no job would ever run")
    _check_addresses(deployment, by_name)
    _check_engine(deployment, by_name)


def _check_form(deployment: Deployment) -> None:
    """That it holds what it says it holds: Python does not look."""
    try:
        msgspec.convert(msgspec.to_builtins(deployment), Deployment)
    except (msgspec.ValidationError, TypeError) as error:
        raise Usage(
            f"the plan is malformed: {error}",
            hint="see `Deployment` and `Unit` in mvmci/cluster/deployment.py",
        ) from None
    if len(deployment.units) > UNITS_MAX:
        raise Usage(f"the plan has {len(deployment.units)} units, and may have {UNITS_MAX}")
    for unit in deployment.units:
        if not all(option.isprintable() for option in unit.options):
            raise Usage(f"an option of {unit.name} has a line break or a control character")


def _check_addresses(deployment: Deployment, by_name: Mapping[str, Unit]) -> None:
    """That whoever is dialled is there and listens, and that nobody waits for itself."""
    dials = {unit.name: sorted(_dialled(unit.options)) for unit in deployment.units}
    for who, names in (*dials.items(), ("the workers", sorted(_dialled([deployment.engine])))):
        for name in names:
            if name not in by_name:
                raise Usage(
                    f"{who} would dial {name}, which is no unit of the plan",
                    hint="`{address:NAME}` names a unit of the same plan",
                )
            if not _listens(by_name[name]):
                raise Usage(
                    f"{who} would dial {name}, which does not listen", hint=f"give it the option {LISTENS}"
                )
    try:
        graphlib.TopologicalSorter(dials).prepare()
    except graphlib.CycleError as error:
        circle = " → ".join(reversed(error.args[1]))
        raise Usage(
            f"the addresses of the plan go in a circle: {circle}", hint="one of them must not need the next"
        ) from None


def _check_engine(deployment: Deployment, by_name: Mapping[str, Unit]) -> None:
    """That somebody is behind what workers are told to use."""
    there = [unit for unit in deployment.units if unit.role == "executor"]
    for unit in deployment.units:
        if unit.role == "balancer" and not any(by_name[name] in there for name in _dialled(unit.options)):
            raise Usage(
                f"{unit.name} has no executor behind it", hint="--backend=NAME={address:NAME} names one"
            )
    if deployment.engine == EMBEDDED:
        return
    if deployment.engine == BROKER:
        if not there:
            raise Usage(
                "workers would look for an engine at the broker, and the plan has no executor",
                hint="add one, or leave the engine in the workers: `embedded`",
            )
        return
    if not is_url(_HOLE.sub("x", deployment.engine)):
        raise Usage(
            f"the plan's engine is {deployment.engine!r}",
            hint=f"it is `{EMBEDDED}`, `{BROKER}`, or an http:// URL",
        )
    served = [by_name[name] for name in _dialled([deployment.engine])] or [
        unit for unit in there if _listens(unit)
    ]
    if not served or any(unit.role not in SERVING for unit in served):
        who = f"{served[0].name} is a {served[0].role}" if served else "no executor of the plan listens"
        raise Usage(
            f"nobody serves the engine {deployment.engine}: {who}",
            hint=f"an executor that is given the option {LISTENS} does",
        )


def _dialled(texts: Iterable[str]) -> set[str]:
    """The units whose addresses `texts` hold."""
    return {name for text in texts for name in _HOLE.findall(text) if name}


def _listens(unit: Unit) -> bool:
    return any("{listen}" in option for option in unit.options)


# ---- What comes of one


def is_url(engine: str) -> bool:
    """Whether workers reach that engine over HTTP, at a place that is known."""
    return _URL.fullmatch(engine) is not None


def listening(deployment: Deployment) -> list[Unit]:
    """The units that need a place."""
    return [unit for unit in deployment.units if _listens(unit)]


def resolve(deployment: Deployment, places: Mapping[str, Place], *, tls: bool = False) -> Deployment:
    """A checked `deployment` with all placeholders filled in; `places` has each unit that listens. Over
    `tls`, a URL of one of them is https."""

    def filled(text: str, name: str = "") -> str:
        text = _PLAIN.sub("https://{address:", text) if tls else text
        return _HOLE.sub(lambda hole: places[hole[1]].address if hole[1] else places[name].listen, text)

    units = (
        msgspec.structs.replace(unit, options=tuple(filled(option, unit.name) for option in unit.options))
        for unit in deployment.units
    )
    return Deployment(units=tuple(units), engine=filled(deployment.engine))


def queues_of(unit: Unit) -> list[str]:
    """Those that a worker or an executor is told to take jobs from."""
    prefix = "--queue="
    return [option.removeprefix(prefix) for option in unit.options if option.startswith(prefix)]
