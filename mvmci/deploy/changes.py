"""What `up` would do: facts, plan, and what leads from what is there to what the file says.

Only looks, and refuses whatever can be seen to be wrong before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mvmci.cluster import topology
from mvmci.cluster.broker import ANY_PORT, LOOPBACK, BrokerSettings
from mvmci.cluster.deployment import Change, Deployment, diff, during_move, is_url, resolve
from mvmci.cluster.identity import Login
from mvmci.cluster.topology import Topology
from mvmci.config.quantity import format_duration, format_size
from mvmci.deploy.access import accesses, deployment_of
from mvmci.deploy.state import ClusterState, Facts
from mvmci.errors import EXIT_REFUSED, StoreUnavailable, Usage
from mvmci.roles import broker
from mvmci.runtime import Runtime
from mvmci.store import ClusterSettings
from mvmci.system.ports import check_port
from mvmci.trust.authority import Authority, read_credentials

MOVE = "each worker drains and switches; running jobs finish or are resumed, queued ones stay queued"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What `up` would do. Nothing was changed."""

    home: ClusterState
    text: bytes
    topology: Topology
    plan: Deployment  # with every unit's place
    changes: tuple[Change, ...]
    settings: tuple[str, ...]  # what changes beside the units, a line each
    anew: bool  # whether everything that runs has to start anew
    moves: bool  # whether workers that run have to take to another engine
    external: Login | None  # to a broker of the user's own
    front: str | None  # the URL of a balancer of the user's own, where it can be seen from here
    file: Path
    runtime: str

    @property
    def empty(self) -> bool:
        """Whether nothing is to be changed."""
        return not self.changes and not self.settings

    @property
    def disturbs(self) -> bool:
        """Whether something that runs is stopped, if only for a moment."""
        return self.moves or any(change.kind != "start" for change in self.changes)


def propose(root: Path, file: Path, runtime: str | None = None) -> Proposal:
    """What leads from what is there to what `file` says.

    Raises BadTopology, Usage, VersionsDiffer for whatever is wrong and can be seen before a change.
    """
    text, found = read_file(file)
    if len(found.broker.hosts) > 1:
        raise Usage("a replicated broker is not in this version", hint="name one host in `broker.hosts`")
    plan, runtime = deployment_of(found, file), runtime or found.runtime
    home = ClusterState(root, found.cluster)
    home.check_version()
    external = external_of(found, file)
    facts, running = home.facts(), home.runtime(runtime)
    running.check()
    _check_same_broker(home, facts, found, runtime)
    _check_port(facts, found, running)
    front = plan.engine if is_url(plan.engine) and not running.apart else None
    plan = resolve(plan, running.place)
    anew = _anew(home, facts, found, external) if running.planned() else ""
    moves = bool(running.planned()) and home.applied_plan().engine != plan.engine
    return Proposal(
        home=home,
        text=text,
        topology=found,
        plan=plan,
        changes=tuple(_said_when(_changes(facts, found, plan, running, anew), running, plan, moves)),
        settings=tuple(_settings_changes(home, found, plan, runtime)),
        anew=bool(anew),
        moves=moves,
        external=external,
        front=front,
        file=file,
        runtime=runtime,
    )


async def check_external(proposal: Proposal) -> list[str]:
    """See that a broker of the user's own can carry the cluster; warnings, a line each.

    Raises Usage, StoreUnavailable, TicketRefused.
    """
    return [] if proposal.external is None else await check_broker(proposal, proposal.external)


async def check_front(proposal: Proposal) -> None:
    """See that a balancer of the user's own answers. Raises Usage."""
    if proposal.front is not None:
        from mvmci.engines.http import check_executor

        await check_executor(proposal.front)


async def check_broker(proposal: Proposal, login: Login, system: Login | None = None) -> list[str]:
    """The same for the broker of `login`; of ours, `system` tells whether it syncs."""
    synced = proposal.topology.durability == "strict"
    return [f"warning: {text}" for text in await broker.check_broker(login, system, synced=synced)]


def read_file(file: Path) -> tuple[bytes, Topology]:
    """A cluster file, and what it says. Raises BadTopology, Usage."""
    try:
        text = file.read_bytes()
    except OSError as error:
        hint = "`mvmci init` writes one" if isinstance(error, FileNotFoundError) else None
        raise Usage(f"{file} cannot be read: {error.strerror}", hint=hint) from None
    return text, topology.load(text, name=str(file), accesses=accesses())


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


def _check_same_broker(home: ClusterState, facts: Facts | None, found: Topology, runtime: str) -> None:
    """Raises Usage when the jobs of the cluster would stay behind, in another broker."""
    if facts is None:
        return
    was = None if facts.broker is not None else facts.login.urls[0]
    other = "another broker" if was != found.broker.url else ""
    if facts.runtime != runtime:
        other = f"runtime {runtime}, from {facts.runtime}"
    if other:
        raise Usage(
            f"cluster {home.cluster} cannot change to {other}: its jobs lie in the broker that it has",
            hint=f"`mvmci down --cluster {home.cluster} --purge` forgets them",
        )


def broker_of(found: Topology, facts: Facts | None) -> BrokerSettings:
    """What the broker is to be. Its port is as the file says, else the one that it had, else any."""
    kept = facts.broker.port if facts is not None and facts.broker is not None else ANY_PORT
    return BrokerSettings(
        name=found.cluster,
        listen=found.broker.address or LOOPBACK,
        port=found.broker.port or kept,
        store_bytes=found.broker.store_bytes,
        synced=found.durability == "strict",
    )


def url_of(settings: BrokerSettings, *, tls: bool) -> str:
    """Where this machine dials a broker of ours."""
    any_address = settings.listen in ("0.0.0.0", "::")  # noqa: S104 (it is only compared)
    address = LOOPBACK if any_address else settings.listen
    return f"{'tls' if tls else 'nats'}://{f'[{address}]' if ':' in address else address}:{settings.port}"


def _check_port(facts: Facts | None, found: Topology, running: Runtime) -> None:
    """Raises Usage when a broker that is started, or moves to another port, could not listen there."""
    if found.broker.url is not None:
        return
    wanted = broker_of(found, facts)
    was = facts.broker.port if facts is not None and facts.broker is not None else ANY_PORT
    if wanted.port != was or not any(unit.role == "broker" for unit in running.planned()):
        check_port(wanted.listen, max(wanted.port, 0))


def _anew(home: ClusterState, facts: Facts | None, found: Topology, external: Login | None) -> str:
    """Why everything that runs has to start anew: units know the broker from when they started."""
    if external is not None:
        return "the broker's credentials change" if _external_before(home) != external else ""
    was, becomes = facts.broker if facts is not None else None, broker_of(found, facts)
    if was is None or (was.listen, was.port) == (becomes.listen, becomes.port):
        return ""
    return f"the broker moves to {becomes.listen}, port {becomes.port}"


def _external_before(home: ClusterState) -> Login | None:
    try:
        return Authority.load(home.folder).external
    except StoreUnavailable:
        return None


def _changes(
    facts: Facts | None, found: Topology, plan: Deployment, running: Runtime, anew: str
) -> Iterator[Change]:
    """What happens to each unit, in the order of the plan; what is stopped comes last."""
    before = running.planned()
    by_name = {change.unit.name: change for change in diff(before, plan.units)}
    refused = {one.name: one.reason for one in running.units() if one.last_exit == EXIT_REFUSED}
    broker_changes = _broker_changes(facts, found) if before else ""
    for unit in plan.units:
        why = anew or (broker_changes if unit.role == "broker" else "")
        if unit.name in by_name:
            yield by_name.pop(unit.name)
        elif why:
            yield Change(kind="restart", unit=unit, why=why)
        elif unit.name in refused:
            yield Change(kind="start", unit=unit, why=f"is down: {refused[unit.name]}")
    yield from by_name.values()


def _said_when(
    changes: Iterable[Change], running: Runtime, plan: Deployment, moves: bool
) -> Iterator[Change]:
    """`changes`, where workers move with what is said of units that are kept until these have left them."""
    kept = {unit.name for unit in during_move(running.planned(), plan) if moves and unit not in plan.units}
    for change in changes:
        if change.unit.name in kept:
            why = ", ".join(filter(None, (change.why, "once no worker uses it")))
            yield msgspec.structs.replace(change, why=why)
        else:
            yield change


def _broker_changes(facts: Facts | None, found: Topology) -> str:
    """How a broker of ours is to differ from what it is, wherever it listens; empty if it is not."""
    was, becomes = facts.broker if facts is not None else None, broker_of(found, facts)
    if was is None or was == becomes:
        return ""
    if was.synced != becomes.synced:
        return f"durability becomes {found.durability}"
    return f"its store becomes {found.broker.store}"


def settings_of(found: Topology, engine: str) -> ClusterSettings:
    """What the units of the cluster read in CONFIG."""
    return ClusterSettings(
        allow_http=found.allow.http,
        allow_exec=found.allow.exec,
        jobs_ms=found.retain.jobs_ms,
        logs_ms=found.retain.logs_ms,
        store_bytes=found.broker.store_bytes,
        queues=found.workers.queues,
        min_isolation=found.min_isolation,
        isolation=found.isolation,
        engine=engine,
    )


def _settings_changes(home: ClusterState, found: Topology, plan: Deployment, runtime: str) -> Iterator[str]:
    applied = home.applied()
    if applied is None:
        yield f"the cluster {home.cluster} is made in {home.folder}"
        return
    was, becomes = settings_of(applied, home.applied_plan().engine), settings_of(found, plan.engine)
    for field, (label, shown) in _SETTINGS.items():
        if getattr(was, field) != getattr(becomes, field):
            yield f"{label} becomes {shown(getattr(becomes, field))}"
    for key in found.compose.__struct_fields__ if runtime == "compose" else ():
        if getattr(applied.compose, key) != getattr(found.compose, key):
            yield f"compose.{key} changes: containers are made anew"


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
