"""What `up` will do: the list of actions that leads from what is there to what the file says.

`mvmci plan` prints that list, and `Up` executes it. Here one only looks, and refuses whatever can be seen
to be wrong before anything is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mvmci.cluster import topology
from mvmci.cluster.broker import ANY_PORT, BrokerSettings
from mvmci.cluster.changes import Action, Observed, changes, next_generation
from mvmci.cluster.deployment import Deployment, UnitConfig, is_url, listening, resolve
from mvmci.cluster.identity import Login
from mvmci.cluster.topology import HostSection, Topology
from mvmci.config.quantity import format_duration, format_size, rough_size
from mvmci.config.strict_yaml import DOCUMENT_BYTES_MAX
from mvmci.deploy.access import accesses, deployment_of
from mvmci.deploy.state import ClusterState, Facts
from mvmci.errors import StoreUnavailable, Usage
from mvmci.roles import broker
from mvmci.roles.disk_watch import ROOM_BYTES
from mvmci.runtime import Runtime
from mvmci.store import ClusterSettings
from mvmci.system.processes import program_digest
from mvmci.trust.authority import Authority, read_credentials
from mvmci.trust.provision import trust_of

_EMPTIED = "is absent: what mvmci keeps there is removed, once its units are stopped"
_EMPTIED_FIRST = "is back: what is there of the time before it was lost is removed first"
MOVE = "each worker drains and switches; running jobs finish or are resumed, queued ones stay queued"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The actions of one `up`, and what they were made from. Nothing was changed."""

    state: ClusterState
    text: bytes
    topology: Topology
    deployment: Deployment  # with every unit's place
    actions: tuple[Action, ...]  # one for each unit, and those that set something
    moves: bool  # whether workers that run have to take to another engine
    external: Login | None  # to a broker of the user's own
    front: str | None  # the URL of a balancer of the user's own, where it can be seen from here
    file: Path
    runtime: str
    notes: tuple[str, ...] = ()  # what else the user is to know

    @property
    def changes(self) -> list[Action]:
        """The actions that do something, in the order in which they are shown."""
        return [action for action in self.actions if action.kind != "keep"]

    @property
    def disturbs(self) -> bool:
        """Whether something that runs is stopped, if only for a moment."""
        return self.moves or any(action.kind in ("stop", "restart") for action in self.actions)


async def make_plan(
    root: Path,
    file: Path,
    runtime: str | None = None,
    *,
    state: ClusterState | None = None,
    accept_new_host_keys: bool = False,
) -> Plan:
    """What leads from what is there to what `file` says. With `state`, over the connections that it has.

    Raises BadTopology, Usage, VersionsDiffer for whatever is wrong and can be seen before a change.
    """
    text, found = read_file(file)
    deployment, runtime = deployment_of(found, file), runtime or found.runtime
    state = state or ClusterState(root, found.cluster)
    state.check_version()
    state.check_keys()
    external = external_of(found, file)
    facts = state.facts()
    running = state.runtime(runtime, hosts_of_file(found, file), accept_new_host_keys=accept_new_host_keys)
    _check_lost(found, running, text, file)
    await running.check()
    _check_same_broker(state, facts, found, runtime)
    _check_store(state, found)
    seen = await running.observe()
    wanted_broker = broker_of(found, facts, running)
    await _check_port(wanted_broker, facts, deployment, seen, running)
    front = deployment.engine if is_url(deployment.engine) and not running.apart else None
    deployment = await placed(deployment, running, tls=running.apart and external is None)
    configs = configs_of(deployment, found, running, seen, external or _authority(state), wanted_broker)
    moves = bool(seen) and state.applied_deployment().engine != deployment.engine
    return Plan(
        state=state,
        text=text,
        topology=found,
        deployment=deployment,
        actions=(
            *(Action(kind="set", why=line) for line in _settings_changes(state, found, deployment)),
            *(Action(kind="set", why=f"host {host} {_EMPTIED}") for host in running.absent()),
            *(Action(kind="set", why=f"host {host} is reached otherwise") for host in running.rerouted()),
            *(Action(kind="set", why=f"host {host} {_EMPTIED_FIRST}") for host in running.returned()),
            *(Action(kind="set", why=_given_up(*lost, external)) for lost in running.lost().items()),
            *changes(configs, seen, deployment.engine, moves=moves, away=running.away),
        ),
        moves=moves,
        external=external,
        front=front,
        file=file,
        runtime=runtime,
        notes=tuple(running.notes),
    )


async def placed(deployment: Deployment, runtime: Runtime, *, tls: bool) -> Deployment:
    """`deployment` where the units listen at the places that `runtime` has for them, over `tls`. Raises
    Usage."""
    places = {unit.name: await runtime.place(unit) for unit in listening(deployment)}
    return resolve(deployment, places, tls=tls)


def configs_of(
    deployment: Deployment,
    found: Topology,
    runtime: Runtime,
    seen: Sequence[Observed],
    who: Authority | Login | None,
    settings: BrokerSettings | None,
) -> list[UnitConfig]:
    """What each unit is to be started with. It believes `who`: nobody, as long as the cluster has no keys, or
    the login to a broker of the user's own; else `settings` are those of ours. A new build of mvmci with the
    same server leaves a broker alone.
    """
    if isinstance(who, Login):
        dial, settings = who.urls, None
    else:
        assert settings is not None
        dial = tuple(runtime.dial(unit, settings) for unit in deployment.units if unit.role == "broker")
    trust = trust_of(who) if who is not None else ""
    program, by_name = program_digest(), {one.name: one for one in seen}
    return [
        UnitConfig(
            unit=unit,
            program=broker.server_digest() if unit.role == "broker" else program,
            dial=() if unit.role in ("broker", "balancer") else dial,
            trust="" if unit.role == "balancer" else trust,
            broker=settings if unit.role == "broker" else None,
            runtime=runtime.adds(found, unit),
            generation=next_generation(by_name.get(unit.name)),
        )
        for unit in deployment.units
    ]


def _authority(state: ClusterState) -> Authority | None:
    try:
        return Authority.load(state.folder)
    except StoreUnavailable:
        return None


async def check_external(plan: Plan) -> list[str]:
    """See that a broker of the user's own can carry the cluster; warnings, a line each.

    Raises Usage, StoreUnavailable, TicketRefused.
    """
    notes = [f"warning: {note}" for note in plan.notes]
    if plan.external is None:
        return [*notes, *_disk_warnings(plan)]
    return [*notes, *await broker_warnings(plan, plan.external)]


def _disk_warnings(plan: Plan) -> list[str]:
    """Compare the store with what is free where it lies, if that is this machine. Raises Usage."""
    folder = plan.state.folder / broker.FOLDER
    if plan.runtime != "local":
        return []
    there = next(one for one in (folder, *folder.parents) if one.exists())
    disk = os.statvfs(there)
    free, wanted = disk.f_bavail * disk.f_frsize, plan.topology.broker.store_bytes
    if free < ROOM_BYTES and not plan.state.applied_deployment().units:
        raise Usage(f"{there} has {rough_size(free)} free: no broker can begin there", hint="make room")
    free += sum(file.stat().st_blocks * 512 for file in folder.glob("store/**/*.blk"))
    if free >= wanted:
        return []
    return [
        f"warning: broker.store is {rough_size(wanted)}, and {there} has {rough_size(free)} for it: once "
        "that is full nothing is accepted or ended until there is room"
    ]


async def check_front(plan: Plan) -> None:
    """See that a balancer of the user's own answers. Raises Usage."""
    if plan.front is not None:
        from mvmci.engines.http import check_executor

        await check_executor(plan.front)


async def broker_warnings(plan: Plan, login: Login, system: Login | None = None) -> list[str]:
    """The same for the broker of `login`; of ours, `system` tells whether it syncs."""
    synced = plan.topology.durability == "strict"
    return [f"warning: {text}" for text in await broker.check_broker(login, system, synced=synced)]


def read_file(file: Path) -> tuple[bytes, Topology]:
    """A cluster file, and what it says. Raises BadTopology, Usage."""
    try:
        with file.open("rb") as opened:
            text = opened.read(DOCUMENT_BYTES_MAX + 1)  # so that a wrong file, of any size, takes no memory
    except OSError as error:
        hint = "`mvmci init` writes one" if isinstance(error, FileNotFoundError) else None
        raise Usage(f"{file} cannot be read: {error.strerror}", hint=hint) from None
    return text, topology.read_topology(text, name=str(file), accesses=accesses())


def external_of(found: Topology, file: Path) -> Login | None:
    """The login to a broker of the user's own; None where `up` starts one. Raises Usage."""
    url, credentials = found.broker.url, found.broker.credentials
    if url is None:
        return None
    if credentials is None:
        return Login(urls=(url,))
    path = file.parent / Path(credentials).expanduser()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise Usage(f"{path}, which `broker.credentials` names, cannot be read: {why}") from None
    jwt, seed = read_credentials(text, str(path))
    return Login(urls=(url,), jwt=jwt, seed=seed)


def _given_up(host: str, units: Collection[str], external: Login | None) -> str:
    if not units:
        return f"host {host} is lost: no unit was there"
    revoked = ", and its keys are revoked" if external is None else ""
    return f"host {host} is lost: what ran there is given up ({', '.join(units)}){revoked}"


def _check_lost(found: Topology, running: Runtime, text: bytes, file: Path) -> None:
    """Raises BadTopology where a host is given up that has the streams of the cluster, or all are."""
    for host, units in running.lost().items():
        if "broker" in units.values():
            path, message = ("hosts", host, "state"), f"the broker is on `{host}`, and all jobs with it"
            hint = (
                "Bring it back, or its disk in another machine; or end the cluster, with `mvmci down FILE "
                "--purge`: `mvmci restore` makes one of a back-up."
            )
            raise topology.refused(text, path, message, hint, name=str(file))
    if found.hosts and all(host.state != "present" for host in found.hosts.values()):
        hint = "`mvmci down FILE --purge` ends the cluster."
        raise topology.refused(text, ("hosts",), "no host is left", hint, name=str(file))


def _check_same_broker(state: ClusterState, facts: Facts | None, found: Topology, runtime: str) -> None:
    """Raises Usage when the jobs of the cluster would stay behind, in another broker."""
    if facts is None:
        return
    was = None if facts.broker is not None else facts.login.urls[0]
    other = "another broker" if was != found.broker.url else ""
    if facts.runtime != runtime:
        other = f"runtime {runtime}, from {facts.runtime}"
    if other:
        raise Usage(
            f"cluster {state.cluster} cannot change to {other}: its jobs lie in the broker that it has",
            hint=f"`mvmci down --cluster {state.cluster} --purge` forgets them",
        )


def _check_store(state: ClusterState, found: Topology) -> None:
    """Raises Usage for a broker of ours that would come back with less than its streams reserve."""
    applied = state.applied()
    if applied is None or found.broker.url is not None:
        return
    was, becomes = applied.broker.store_bytes, found.broker.store_bytes
    if becomes < was:
        raise Usage(
            f"broker.store of {state.cluster} can only grow: it is {format_size(was)}, "
            f"which its streams reserve, and the file says {format_size(becomes)}",
            hint=f"write `store: {format_size(was)}` or more; a cluster with less is made anew: "
            f"`mvmci down --cluster {state.cluster} --purge` forgets its jobs",
        )


def broker_of(found: Topology, facts: Facts | None, runtime: Runtime) -> BrokerSettings:
    """What the broker is to be. Its port is as the file says, or the one that it had, or its runtime's."""
    kept = facts.broker.port if facts is not None and facts.broker is not None else runtime.broker_port
    return BrokerSettings(
        name=found.cluster,
        listen=found.broker.address or runtime.broker_listen,
        port=found.broker.port or kept,
        store_bytes=found.broker.store_bytes,
        synced=found.durability == "strict",
    )


async def _check_port(
    wanted: BrokerSettings,
    facts: Facts | None,
    deployment: Deployment,
    seen: Sequence[Observed],
    runtime: Runtime,
) -> None:
    """Raises Usage when a broker that is started, or moves to another port, could not listen there."""
    was = facts.broker.port if facts is not None and facts.broker is not None else ANY_PORT
    for unit in deployment.units:
        if unit.role == "broker" and (wanted.port != was or all(one.role != "broker" for one in seen)):
            await runtime.check_port(unit, wanted.listen, wanted.port)


def hosts_of_file(found: Topology, file: Path) -> dict[str, HostSection]:
    """The hosts of a file, whose keys lie where the file does."""
    return {
        name: msgspec.structs.replace(
            host, key=str(file.absolute().parent / Path(host.key).expanduser()) if host.key else None
        )
        for name, host in found.hosts.items()
    }


def settings_of(found: Topology, engine: str) -> ClusterSettings:
    """What the units of the cluster read in CONFIG."""
    return ClusterSettings(
        allow_http=found.allow.http,
        allow_exec=found.allow.exec,
        jobs_ms=found.retain.jobs_ms,
        logs_ms=found.retain.logs_ms,
        store_bytes=found.broker.store_bytes,
        queues=found.queues,
        min_isolation=found.min_isolation,
        isolation=found.isolation,
        engine=engine,
        public_engine=found.executors is not None and found.executors.url is not None,
    )


def _settings_changes(state: ClusterState, found: Topology, deployment: Deployment) -> Iterator[str]:
    applied = state.applied()
    if applied is None:
        yield f"the cluster {state.cluster} is made in {state.folder}"
        return
    was = settings_of(applied, state.applied_deployment().engine)
    becomes = settings_of(found, deployment.engine)
    if applied.broker.advertised != found.broker.advertised:
        yield f"broker.advertise becomes {_list(found.broker.advertised)}"
    for field, (label, shown) in _SETTINGS.items():
        if getattr(was, field) != getattr(becomes, field):
            yield f"{label} becomes {shown(getattr(becomes, field))}"


def _list(values: Sequence[str]) -> str:
    return f"[{', '.join(values)}]"


_SETTINGS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "allow_http": ("allow.http", _list),
    "allow_exec": ("allow.exec", _list),
    "jobs_ms": ("retain.jobs", format_duration),
    "logs_ms": ("retain.logs", format_duration),
    "store_bytes": ("broker.store", format_size),
    "queues": ("queues", _list),
    "min_isolation": ("min_isolation", str),
    "isolation": ("isolation", str),
    "engine": ("engine", lambda engine: f"{engine}: {MOVE}"),
}
