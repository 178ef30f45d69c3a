"""From a cluster file to a running cluster, and back.

`propose` gathers facts and says what `up` would do; it changes nothing, and refuses whatever can be
seen to be wrong. `Up` does it: keys, broker, units in their order, settings; then it waits until each
unit is *seen* in presence and a real job has run. When it cannot finish it says how far it came, and
the same again goes on from there.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.metadata
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mvmci import broker, topology
from mvmci.errors import EXIT_REFUSED, LockHeld, MvmciError, NotFound, PartlyApplied, StoreUnavailable, Usage
from mvmci.holder import load
from mvmci.home import VERSION, Facts, Home
from mvmci.job import Limits
from mvmci.journal import Spec, status
from mvmci.plan import Change, Plan, Unit, check, diff
from mvmci.quantity import format_duration, format_size
from mvmci.roster import Roster, Row, rows
from mvmci.runtime import GRACE_S, Runtime
from mvmci.store import Member, Settings, Store
from mvmci.stores import open_cluster
from mvmci.submission import mint_id, submit, until_ended
from mvmci.ticket import Identity, Login, encode
from mvmci.topology import Topology
from mvmci.trust.authority import Authority, read_credentials, write_private

if TYPE_CHECKING:  # the connection takes long to import: units start meanwhile
    from mvmci.stores.nats import Cluster

ACCESSES = "mvmci.topologies"  # the entry points that give plan functions
READY_S = 60.0
LOOK_EVERY_S = 0.03
CRASHES_MAX = 5  # of a unit that was never ready
TICKET_S = 3600.0
PROOF_MS = 30_000
TAIL_BYTES = 4096

# The smallest command: it does nothing. As text:
#
#   (module (memory (export "memory") 1) (func (export "_start")))
NOTHING = bytes.fromhex(
    "0061736d 01000000  01 04 01 60 00 00  03 02 01 00  05 03 01 00 01"
    "07 13 02 06 6d656d6f7279 02 00 06 5f7374617274 00 00  0a 04 01 02 00 0b"
)


# ---- Accesses


@dataclass(frozen=True)
class Access:
    """A way for workers to reach an engine, as some package offers it."""

    name: str
    about: str
    plan: Callable[[Topology], Plan]


@functools.cache
def accesses() -> list[Access]:
    """All that are installed, by name."""
    found = []
    for entry in importlib.metadata.entry_points(group=ACCESSES):
        plan = entry.load()
        about = (importlib.import_module(plan.__module__).__doc__ or "").strip().partition("\n")[0]
        found.append(Access(entry.name, about, plan))
    return sorted(found, key=lambda access: access.name)


def _access(name: str) -> Access:
    known = accesses()
    for access in known:
        if access.name == name:
            return access
    there = ", ".join(access.name for access in known)
    raise Usage(f"access {name} is not in this version", hint=f"there is {there}: `mvmci topologies`")


# ---- What would be done


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What `up` would do. Nothing was changed."""

    home: Home
    text: bytes
    topology: Topology
    plan: Plan
    changes: tuple[Change, ...]
    settings: tuple[str, ...]  # what changes beside the units, a line each
    moves: bool  # whether the broker will answer at another address
    lent: Login | None  # to a broker of the user's own
    file: Path
    runtime: str | None

    @property
    def empty(self) -> bool:
        """Whether nothing is to be changed."""
        return not self.changes and not self.settings

    @property
    def disturbs(self) -> bool:
        """Whether something that runs is stopped, if only for a moment."""
        return any(change.kind != "start" for change in self.changes)


def propose(root: Path, file: Path, runtime: str | None = None) -> Proposal:
    """What leads from what is there to what `file` says.

    Raises BadTopology, Usage, VersionsDiffer for whatever is wrong and can be seen before a change.
    """
    text, found = read_file(file)
    _check_offered(found, runtime or found.runtime)
    plan = _access(found.access).plan(found)
    check(plan)
    home = Home(root, found.cluster)
    home.check_version()
    lent = _lent(found, file)
    facts, running = home.facts(), home.runtime()
    _check_same_broker(home, facts, found)
    if lent is None and not any(unit.role == "broker" for unit in running.planned()):
        wanted = _broker(found, facts)
        broker.check_port(wanted.listen, max(wanted.port, 0))
    return Proposal(
        home=home,
        text=text,
        topology=found,
        plan=plan,
        changes=tuple(_changes(facts, found, plan, running)),
        settings=tuple(_settings_changes(home, found)),
        moves=bool(running.planned()) and lent is None and _moves(facts, found),
        lent=lent,
        file=file,
        runtime=runtime,
    )


def read_file(file: Path) -> tuple[bytes, Topology]:
    """A cluster file, and what it says. Raises BadTopology, Usage."""
    try:
        text = file.read_bytes()
    except OSError as error:
        hint = "`mvmci init` writes one" if isinstance(error, FileNotFoundError) else None
        raise Usage(f"{file} cannot be read: {error.strerror}", hint=hint) from None
    return text, topology.load(text, name=str(file))


def _check_offered(found: Topology, runtime: str) -> None:
    """Raises Usage for what a later version will do."""
    if runtime != "local":
        raise Usage(
            f"runtime {runtime} is not in this version", hint="`runtime: local` starts units on this machine"
        )
    if len(found.broker.hosts) > 1:
        raise Usage("a replicated broker is not in this version", hint="name one host in `broker.hosts`")


def _lent(found: Topology, file: Path) -> Login | None:
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


def _check_same_broker(home: Home, facts: Facts | None, found: Topology) -> None:
    """Raises Usage when the jobs of the cluster would stay behind, in another broker."""
    if facts is None:
        return
    was = None if facts.broker is not None else facts.login.urls[0]
    if was != found.broker.url:
        raise Usage(
            f"cluster {home.cluster} cannot change to another broker: its jobs lie in the one that it has",
            hint=f"`mvmci down --cluster {home.cluster} --purge` forgets them",
        )


def _broker(found: Topology, facts: Facts | None) -> broker.Settings:
    """What the broker is to be. Its port is as the file says, else the one that it had, else any."""
    kept = facts.broker.port if facts is not None and facts.broker is not None else broker.ANY_PORT
    return broker.Settings(
        name=found.cluster,
        listen=found.broker.address or broker.LOOPBACK,
        port=found.broker.port or kept,
        store_bytes=found.broker.store_bytes,
        synced=found.durability == "strict",
    )


def _changes(facts: Facts | None, found: Topology, plan: Plan, running: Runtime) -> Iterator[Change]:
    """What happens to each unit, in the order of the plan; what is stopped comes last."""
    before = running.planned()
    by_name = {change.unit.name: change for change in diff(before, plan.units)}
    refused = {one.name: one.reason for one in running.units() if one.last_exit == EXIT_REFUSED}
    why = _broker_change(facts, found) if before else ""
    for unit in plan.units:
        if unit.name in by_name:
            yield by_name.pop(unit.name)
        elif why and (unit.role == "broker" or _moves(facts, found)):
            yield Change(kind="restart", unit=unit, why=why)
        elif unit.name in refused:
            yield Change(kind="start", unit=unit, why=f"is down: {refused[unit.name]}")
    yield from by_name.values()


def _broker_change(facts: Facts | None, found: Topology) -> str:
    """How a broker of ours differs from what it is to be; empty if it does not."""
    was = facts.broker if facts is not None else None
    becomes = _broker(found, facts)
    if was is None or found.broker.url is not None or was == becomes:
        return ""
    if _moves(facts, found):
        return f"the broker moves to {becomes.listen}, port {becomes.port}"
    if was.synced != becomes.synced:
        return f"durability becomes {found.durability}"
    return f"its store becomes {found.broker.store}"


def _moves(facts: Facts | None, found: Topology) -> bool:
    """Whether the broker will answer at another address."""
    was, becomes = facts.broker if facts is not None else None, _broker(found, facts)
    return was is not None and (was.listen, was.port) != (becomes.listen, becomes.port)


def settings_of(found: Topology) -> Settings:
    """What the units of the cluster read in CONFIG."""
    return Settings(
        allow_http=found.allow.http,
        allow_exec=found.allow.exec,
        jobs_ms=found.retain.jobs_ms,
        logs_ms=found.retain.logs_ms,
        store_bytes=found.broker.store_bytes,
        queues=found.workers.queues,
        min_isolation=found.min_isolation,
        isolation=found.isolation,
    )


def _settings_changes(home: Home, found: Topology) -> Iterator[str]:
    applied = home.applied()
    if applied is None:
        yield f"the cluster {home.cluster} is made in {home.folder}"
        return
    was, becomes = settings_of(applied), settings_of(found)
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
}


# ---- Doing it


class Up:
    """One `up`: what it does, and whom it tells."""

    def __init__(
        self,
        proposal: Proposal,
        *,
        say: Callable[[str], None],
        show: Callable[[Sequence[Row]], None],
        attached: bool = False,
        within_s: float = READY_S,
    ) -> None:
        self._proposal = proposal
        self._home = proposal.home
        self._runtime = proposal.home.runtime()
        self._say = say
        self._show = show  # the units, whenever they were looked at
        self.begun = False  # whether something may have been changed
        self._attached = attached  # what it starts is stopped when this process dies
        self._within_s = within_s
        self._crashed_before: dict[str, int] = {}
        self._rows: Sequence[Row] = ()

    async def run(self) -> Roster:
        """Do it. Raises LockHeld, Usage, StoreUnavailable, TicketRefused, and later on PartlyApplied."""
        proposal, home = self._proposal, self._home
        if proposal.lent is not None:
            await self._check_broker(proposal.lent)
        with home.lock():
            if propose(home.root, proposal.file, proposal.runtime) != proposal:
                raise LockHeld(f"{home.cluster} was changed by somebody else just now", hint="try again")
            self.begun = True
            try:
                async with asyncio.timeout(self._within_s):
                    await self._apply()
            except TimeoutError:
                raise self._partly(f"this is so after {self._within_s:g} s") from None
            except PartlyApplied:
                raise
            except MvmciError as error:
                raise self._partly(error.message, error.hint) from error
            home.keep_applied(proposal.text)
        found = proposal.topology
        return Roster(
            cluster=home.cluster, access=found.access, runtime=found.runtime, units=list(self._rows)
        )

    async def _apply(self) -> None:
        authority, facts = self._lay_down()
        self._crashed_before = {one.name: one.restarts for one in self._runtime.units()}
        await self._start()
        async with self._joined(authority.admin(facts.login)) as cluster:
            if self._proposal.lent is None:
                await self._check_broker(cluster.link.login, authority.system_login(facts.login))
            await self._make(cluster)
            proving = asyncio.create_task(self._prove(cluster.store), name="prove")
            try:
                await self._until_ready(cluster)
                await proving
            finally:
                proving.cancel()
                await asyncio.gather(proving, return_exceptions=True)
            facts = self._reached(facts)
            self._home.keep_facts(facts)
            await self._write_ticket(authority, facts, cluster)

    def _lay_down(self) -> tuple[Authority, Facts]:
        """Everything that units find in the cluster's folder."""
        proposal, home = self._proposal, self._home
        write_private(home.folder / "version", VERSION.encode())
        if proposal.lent is not None:
            authority = Authority.lend(home.folder, proposal.lent)
            facts = Facts(login=Login(urls=proposal.lent.urls))
        else:
            authority = Authority.create(home.folder)
            settings = _broker(proposal.topology, home.facts())
            if settings.port == broker.ANY_PORT:
                settings = msgspec.structs.replace(settings, port=broker.free_port(settings.listen))
            broker.lay_down(home.folder, settings)
            tls = not broker.is_loopback(settings.listen)
            facts = Facts(login=authority.login([_url(settings)], tls=tls), broker=settings)
        home.keep_facts(facts)
        for unit in proposal.plan.units:
            if unit.role != "broker":
                path = home.unit(unit.name) / "identity.json"
                authority.identity(unit.name, unit.role, _queues(unit), facts.login, path)
        return authority, facts

    async def _start(self) -> None:
        """Give the runtime the plan; what is the same and must start anew is stopped first."""
        units, runtime = self._proposal.plan.units, self._runtime
        before = runtime.planned()
        again = {one.unit for one in self._proposal.changes if one.kind == "restart" and one.unit in before}
        if self._proposal.moves:
            await runtime.stop()  # the broker last: what others let go must be written down
        elif again:
            await runtime.apply([unit for unit in units if unit not in again])
            names = {unit.name for unit in again}
            while names & {one.name for one in runtime.units()}:  # noqa: ASYNC110 (told by a file)
                await asyncio.sleep(LOOK_EVERY_S)
        await runtime.apply(units, attached=self._attached)

    @asynccontextmanager
    async def _joined(self, identity: Identity) -> AsyncIterator[Cluster]:
        """The cluster, as soon as its broker answers."""
        cluster = None
        while cluster is None:
            try:
                cluster = await open_cluster(identity, announce=False)
            except StoreUnavailable:
                self._look(None)
                await asyncio.sleep(LOOK_EVERY_S)
        try:
            yield cluster
        finally:
            await cluster.close()

    async def _check_broker(self, login: Login, system: Login | None = None) -> None:
        synced = self._proposal.topology.durability == "strict"
        for warning in await broker.check_broker(login, system, synced=synced):
            self._say(f"warning: {warning}")

    async def _make(self, cluster: Cluster) -> None:
        """The streams, and what the cluster is and allows."""
        from mvmci.stores.nats import maintain

        settings = settings_of(self._proposal.topology)
        await maintain(cluster.link, cluster.layout, settings.store_bytes, settings.logs_ms, settings.queues)
        there = await cluster.config.get("settings")
        data = msgspec.json.encode(settings)
        if there is None or there.value != data:
            await cluster.config.put("settings", data)

    async def _until_ready(self, cluster: Cluster) -> None:
        """Until every unit of the plan is seen at work, and no other is left."""
        planned = {unit.name for unit in self._proposal.plan.units}
        while True:
            self._look(await cluster.store.presence.members())
            ours = [row for row in self._rows if row.name in planned]
            leaving = {one.name for one in self._runtime.units()} - planned
            if not leaving and all(row.state == "ready" for row in ours):
                return
            await asyncio.sleep(LOOK_EVERY_S)

    def _look(self, members: Sequence[Member] | None) -> None:
        """See how the units are. Raises PartlyApplied when one of them will not come."""
        statuses = self._runtime.units()
        self._rows = rows(
            self._proposal.plan.units, statuses, members, here=socket.gethostname(), now_ms=_now_ms()
        )
        self._show(self._rows)
        for one in statuses:
            crashes = one.restarts - self._crashed_before.get(one.name, 0)
            if one.state == "down" and one.last_exit == EXIT_REFUSED:
                raise self._partly(f"{one.name} was refused: {one.reason}")
            if one.state == "down" and crashes >= CRASHES_MAX:
                raise self._partly(f"{one.name} went down {crashes} times: {one.reason}")

    async def _prove(self, store: Store) -> None:
        """Run a job that does nothing. Raises MvmciError when it did not."""
        spec = Spec(
            at=_now_ms(),
            id=mint_id(),
            queue=self._proposal.topology.workers.queues[0],
            kind="command",
            module=await store.blobs.put(NOTHING),
            name="nothing.wasm",
            component=False,
            limits=Limits(timeout_ms=PROOF_MS),
            seed=0,
            by="up",
        )
        await submit(store, spec)
        journal = await load(store, spec.id)
        await until_ended(store, journal)
        name, reason = status(journal.state)
        if name != "succeeded":
            raise MvmciError(f"a job that does nothing, {spec.id}, {name}: {reason}")

    def _reached(self, facts: Facts) -> Facts:
        """`facts`, with where other machines reach the broker."""
        if facts.broker is None or broker.is_loopback(facts.broker.listen):
            return facts
        pids = [one.pid for one in self._runtime.units() if one.role == "broker" and one.pid]
        urls = [
            url
            for pid in pids
            for url in broker.read_ports(self._home.folder / broker.FOLDER, pid).get("nats", ())
        ]
        return msgspec.structs.replace(facts, urls=tuple(urls))

    async def _write_ticket(self, authority: Authority, facts: Facts, cluster: Cluster) -> None:
        from mvmci.trust.registry import make_ticket

        queues = self._proposal.topology.workers.queues
        ticket = await make_ticket(
            cluster.config, authority, facts.outside, role="worker", queues=queues, ttl_s=TICKET_S
        )
        write_private(self._home.ticket, f"{encode(ticket)}\n".encode())

    def _partly(self, why: str, hint: str | None = None) -> PartlyApplied:
        """How far it came, and why not further."""
        self._rows = self._rows or rows(
            self._proposal.plan.units, self._runtime.units(), None, here="", now_ms=_now_ms()
        )
        ready = ", ".join(row.name for row in self._rows if row.state == "ready")
        missing = [row for row in self._rows if row.state != "ready"]
        not_ready = ", ".join(f"{row.name} is {row.state}" for row in missing)
        words = _last_line(self._home.unit(missing[0].name) / "log") if missing else ""
        said = f"; {missing[0].name} said last: {words}" if words else ""
        return PartlyApplied(
            f"{self._home.cluster} is up in part: {ready or 'nothing'} is ready"
            f"{f', {not_ready}' if not_ready else ''}; {why}",
            hint=f"{hint or 'the same command goes on from here'}{said}",
        )


def _url(settings: broker.Settings) -> str:
    """Where units of this machine dial."""
    any_address = settings.listen in ("0.0.0.0", "::")  # noqa: S104 (it is only compared)
    address = broker.LOOPBACK if any_address else settings.listen
    scheme = "nats" if broker.is_loopback(settings.listen) else "tls"
    return f"{scheme}://{f'[{address}]' if ':' in address else address}:{settings.port}"


def _queues(unit: Unit) -> list[str]:
    """Those that a worker or an executor is told to take jobs from."""
    prefix = "--queue="
    return [option.removeprefix(prefix) for option in unit.options if option.startswith(prefix)]


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


# ---- Looking, and taking it down


async def look(home: Home, identity: Callable[[], Identity]) -> Roster:
    """How the cluster's units are. Where it is not run from this machine, presence is all there is.

    Raises StoreUnavailable, TicketRefused when there is nothing at all to tell.
    """
    applied, runtime = home.applied(), home.runtime()
    planned, statuses = runtime.planned(), runtime.units()
    if not planned and applied is not None:
        planned = _access(applied.access).plan(applied).units
    members: Sequence[Member] | None = None
    if applied is None or statuses or applied.broker.url is not None:
        try:
            cluster = await open_cluster(identity(), announce=False)
            try:
                members = await cluster.store.presence.members()
            finally:
                await cluster.close()
        except StoreUnavailable:
            if not planned:
                raise
    return Roster(
        cluster=home.cluster,
        access=applied.access if applied is not None else None,
        runtime=applied.runtime if applied is not None else None,
        units=rows(planned, statuses, members, here=socket.gethostname(), now_ms=_now_ms()),
    )


async def drain(home: Home, name: str, *, undo: bool) -> None:
    """Let worker `name` take no more jobs and wait until it has none; `undo`: let it take jobs again.

    Raises NotFound, Usage, StoreUnavailable, TicketRefused.
    """
    authority, facts = Authority.load(home.folder), home.facts()
    if facts is None:
        raise StoreUnavailable(f"cluster {home.cluster} was never brought up here", hint="`mvmci up FILE`")
    cluster = await open_cluster(authority.admin(facts.login), announce=False)
    try:
        there = {member.unit: member for member in await cluster.store.presence.members()}
        if name not in there:
            workers = sorted(unit for unit, member in there.items() if member.about.role == "worker")
            raise NotFound(
                f"no worker {name} of {home.cluster} is there", hint=f"there are {', '.join(workers) or 'none'}"
            )
        if there[name].about.role != "worker":
            raise Usage(f"{name} is a {there[name].about.role}", hint="only workers take jobs")
        key = f"drain.{name}"
        if undo:
            await cluster.config.delete(key)
        else:
            await cluster.config.put(key, b"{}")
        while not _has_heard(await cluster.store.presence.members(), name, undo):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_EVERY_S)
    finally:
        await cluster.close()


def _has_heard(members: Sequence[Member], name: str, undo: bool) -> bool:
    """Whether the worker is as it was told to be; one that left has no jobs either."""
    for member in members:
        if member.unit == name:
            return member.about.state == "ready" if undo else _is_drained(member)
    return True


def _is_drained(member: Member) -> bool:
    return member.about.state == "draining" and not member.holds and not member.keeps


async def down(home: Home, *, grace_s: float = GRACE_S, purge: bool = False) -> bool:
    """Stop all that `up` started; with `purge`, forget the cluster too. False: nothing was running.

    Raises LockHeld, StoreUnavailable.
    """
    home.check_version()
    with home.lock():
        ran = await home.runtime().stop(0 if purge else grace_s)
        if purge:
            facts = home.facts()
            if facts is not None and facts.broker is None:
                from mvmci.stores.nats import remove

                authority = Authority.load(home.folder)
                await remove(authority.admin(facts.login).login, home.cluster)
            home.remove()
    return ran
