"""A cluster as its file says, and no cluster again: what `up`, `ps`, `drain` and `down` do.

`Up` does what was proposed: keys, broker, units in their order, settings; then it waits until each unit
is *seen* in presence and a real job has run. When it cannot finish it says how far it came, and the same
again goes on from there.

Where workers move to another engine, that one comes first, then its name in the settings, which each
worker follows when it has drained; what they left goes last. So there is always an engine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from mvmci.cluster.broker import ANY_PORT
from mvmci.cluster.deployment import EMBEDDED, SERVING, Unit, during_move
from mvmci.cluster.identity import Identity, Login, encode
from mvmci.deploy.changes import Proposal, broker_of, check_broker, propose, settings_of, url_of
from mvmci.deploy.state import VERSION, ClusterState, Facts
from mvmci.deploy.status import ClusterStatus, UnitRow, rows
from mvmci.errors import EXIT_REFUSED, LockHeld, MvmciError, NotFound, PartlyApplied, StoreUnavailable, Usage
from mvmci.jobs.job import Limits
from mvmci.jobs.journal import Spec, status
from mvmci.journals.client import mint_id, submit, until_ended
from mvmci.journals.reader import load
from mvmci.roles import broker
from mvmci.runtime import GRACE_S, Ground
from mvmci.store import ClusterSettings, Member, Store
from mvmci.stores import open_cluster
from mvmci.system.files import write_private
from mvmci.system.ports import choose_port, is_loopback
from mvmci.trust.authority import Authority

if TYPE_CHECKING:  # the connection takes long to import: units start meanwhile
    from mvmci.stores.nats import Cluster

READY_S = 60.0
LOOK_EVERY_S = 0.03
DRAIN = ("worker", "executor")  # roles that can be told to
CRASHES_MAX = 5  # of a unit that was never ready
TICKET_S = 3600.0
PROOF_MS = 30_000
FULL_FOR_S = 1.0  # a cluster is busy and well that is so at two looks
TAIL_BYTES = 4096

# The smallest command: it does nothing. As text:
#
#   (module (memory (export "memory") 1) (func (export "_start")))
NOTHING = bytes.fromhex(
    "0061736d 01000000  01 04 01 60 00 00  03 02 01 00  05 03 01 00 01"
    "07 13 02 06 6d656d6f7279 02 00 06 5f7374617274 00 00  0a 04 01 02 00 0b"
)


class Up:
    """One `up`: what it does, and whom it tells."""

    def __init__(
        self,
        proposal: Proposal,
        *,
        say: Callable[[str], None],
        show: Callable[[Sequence[UnitRow]], None],
        attached: bool = False,
        within_s: float = READY_S,
    ) -> None:
        self._proposal = proposal
        self._home = proposal.home
        self._runtime = proposal.home.runtime(proposal.runtime)
        self._say = say
        self._show = show  # the units, whenever they were looked at
        self.begun = False  # whether something may have been changed
        self._attached = attached  # what it starts is stopped when this process dies
        self._within_s = within_s
        self._crashed_before: dict[str, int] = {}
        self._going: set[str] = set()  # units that run as they were for as long as workers use them
        self._waits = ""  # why the job that is to prove it has not run yet
        self._rows: Sequence[UnitRow] = ()

    async def run(self) -> ClusterStatus:
        """Do it. Raises LockHeld, Usage, StoreUnavailable, TicketRefused, and later on PartlyApplied."""
        proposal, home = self._proposal, self._home
        with home.lock():
            if propose(home.root, proposal.file, proposal.runtime) != proposal:
                raise LockHeld(f"{home.cluster} was changed by somebody else just now", hint="try again")
            self.begun = True
            try:
                async with asyncio.timeout(self._within_s) as self._limit:
                    await self._apply()
            except TimeoutError:
                waits = f", and {self._waits}" if self._waits else ""
                raise self._partly(f"this is so after {self._within_s:g} s{waits}") from None
            except PartlyApplied:
                raise
            except MvmciError as error:
                raise self._partly(error.message, error.hint) from error
            home.keep_applied(proposal.text, proposal.plan)
        return ClusterStatus(
            cluster=home.cluster,
            access=proposal.topology.access,
            runtime=proposal.runtime,
            units=list(self._rows),
        )

    async def _apply(self) -> None:
        await self._stop_what_starts_anew()
        authority, facts = self._lay_down()
        await self._settle(authority, facts)
        self._crashed_before = {one.name: one.restarts for one in self._runtime.units()}
        plan, before = self._proposal.plan, self._runtime.planned()
        meanwhile = during_move(before, plan)
        self._going = {unit.name for unit in meanwhile if unit not in plan.units}
        await self._runtime.apply(meanwhile, attached=self._attached)
        async with self._joined(authority.admin(facts.login)) as cluster:
            if self._proposal.external is None:
                system = authority.system_login(facts.login)
                for warning in await check_broker(self._proposal, cluster.link.login, system):
                    self._say(warning)
            await self._make(cluster, moves=bool(before))
            await self._move(cluster)
            job = mint_id()
            proving = asyncio.create_task(self._prove(cluster.store, job), name="prove")
            try:
                await self._until_ready(cluster)
                await self._until_proved(cluster, proving, job)
            finally:
                proving.cancel()
                await asyncio.gather(proving, return_exceptions=True)
            facts = self._reached(facts)
            self._home.keep_facts(facts)
            await self._write_ticket(authority, facts, cluster)

    async def _stop_what_starts_anew(self) -> None:
        """Units that stay the same for the runtime, and yet must be started again.

        Before anything is laid down: whoever goes on after a crash then finds them stopped.
        """
        proposal, runtime = self._proposal, self._runtime
        before = runtime.planned()
        again = {one.unit for one in proposal.changes if one.kind == "restart" and one.unit in before}
        if proposal.anew:
            await runtime.stop()  # the broker last: what others let go must be written down
        elif again:
            await runtime.apply([unit for unit in before if unit not in again], attached=self._attached)
            names = {unit.name for unit in again}
            while names & {one.name for one in runtime.units()}:  # noqa: ASYNC110 (told by a file)
                await asyncio.sleep(LOOK_EVERY_S)

    def _lay_down(self) -> tuple[Authority, Facts]:
        """The keys of the cluster, and where its broker is."""
        proposal, home = self._proposal, self._home
        write_private(home.folder / "version", VERSION.encode())
        if proposal.external is not None:
            authority = Authority.of_external(home.folder, proposal.external)
            facts = Facts(login=Login(urls=proposal.external.urls), runtime=proposal.runtime)
        else:
            authority = Authority.create(home.folder)
            settings = broker_of(proposal.topology, home.facts())
            if settings.port == ANY_PORT:
                settings = msgspec.structs.replace(settings, port=self._port(settings.listen))
            tls = self._runtime.apart or not is_loopback(settings.listen)
            login = authority.login([url_of(settings, tls=tls)], tls=tls)
            facts = Facts(login=login, broker=settings, runtime=proposal.runtime)
        home.keep_facts(facts)
        return authority, facts

    def _port(self, address: str) -> int:
        """One for the broker, which no unit of the plan is to have."""
        listens = [unit.listen.rpartition(":")[2] for unit in self._proposal.plan.units if unit.listen]
        taken = [int(port) for port in listens if port.isdecimal()]
        return choose_port(f"{self._home.folder}/{broker.FOLDER}", address, taken=taken)

    async def _settle(self, authority: Authority, facts: Facts) -> None:
        """What the runtime puts down for its units: `within` counts anew from then on, for it may build."""
        refused = {one.name for one in self._runtime.units() if one.last_exit == EXIT_REFUSED}
        ground = Ground(
            authority=authority,
            login=facts.login,
            broker=facts.broker,
            topology=self._proposal.topology,
            plan=self._proposal.plan,
            refused=frozenset(refused),
        )
        self._limit.reschedule(None)
        await self._runtime.lay_down(ground)
        self._limit.reschedule(asyncio.get_running_loop().time() + self._within_s)

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

    async def _make(self, cluster: Cluster, *, moves: bool) -> None:
        """The streams, and what the cluster is and allows; all but its engine, where workers `moves`."""
        from mvmci.stores.nats import maintain

        settings = settings_of(self._proposal.topology, self._proposal.plan.engine)
        await maintain(cluster.link, cluster.layout, settings.store_bytes, settings.logs_ms, settings.queues)
        there = await cluster.config.get("settings")
        if moves and there is not None:
            engine = msgspec.json.decode(there.value, type=ClusterSettings).engine
            settings = msgspec.structs.replace(settings, engine=engine)
        await _put(cluster, settings)

    async def _move(self, cluster: Cluster) -> None:
        """Bring the workers to the engine of the plan, and let go of what they used before."""
        plan = self._proposal.plan
        serving = {unit.name for unit in plan.units if unit.role in SERVING} - self._going
        workers = {unit.name for unit in plan.units if unit.role == "worker"}
        while not serving <= {row.name for row in self._rows if row.state == "ready"}:
            await asyncio.sleep(LOOK_EVERY_S)
            self._look(await cluster.store.presence.members())
        await _put(cluster, settings_of(self._proposal.topology, plan.engine))
        there: set[str] = set()
        while not workers <= there:
            await asyncio.sleep(LOOK_EVERY_S)
            members = await cluster.store.presence.members()
            self._look(members)
            there = {one.unit for one in members if (one.about.engine or EMBEDDED) == plan.engine}
        if self._going:
            self._going = set()
            await self._runtime.apply(plan.units, attached=self._attached)

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
            if one.name in self._going:
                continue
            crashes = one.restarts - self._crashed_before.get(one.name, 0)
            if one.state == "down" and one.last_exit == EXIT_REFUSED:
                raise self._partly(f"{one.name} was refused: {one.reason}")
            if one.state == "down" and crashes >= CRASHES_MAX:
                raise self._partly(f"{one.name} went down {crashes} times: {one.reason}")

    async def _until_proved(self, cluster: Cluster, proving: asyncio.Task[None], job: str) -> None:
        """Until the job has run, or waits behind others that fill every engine: those prove it as well."""
        full = False
        while not proving.done():
            await asyncio.wait((proving,), timeout=FULL_FOR_S)
            members = [] if proving.done() else await cluster.store.presence.members()
            for why in (member.waits[job] for member in members if job in member.waits):
                self._waits = f"a job that does nothing waits: {why}"
            was_full, full = full, _is_full(members, self._proposal.plan.engine, job)
            if was_full and full:
                self._say(f"every slot is taken: {job}, which does nothing, waits behind other jobs")
                return
        await proving

    async def _prove(self, store: Store, job: str) -> None:
        """Run a job that does nothing. Raises MvmciError when it did not."""
        spec = Spec(
            at=_now_ms(),
            id=job,
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
        if facts.broker is None or is_loopback(facts.broker.listen):
            return facts
        folder = self._home.folder / broker.FOLDER
        pids = [one.pid for one in self._runtime.units() if one.role == "broker" and one.pid]
        told = [url for pid in pids for url in broker.read_ports(folder, pid).get("nats", ())]
        far = [url for url in told if _is_far(url)]
        return msgspec.structs.replace(facts, urls=tuple(far or told))

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


def _is_full(members: Sequence[Member], engine: str, job: str) -> bool:
    """Whether every engine that workers use has its slots full of jobs other than `job`."""
    role = "worker" if engine == EMBEDDED else "executor"
    engines = [one for one in members if one.about.role == role]
    return bool(engines) and all(
        len({held.partition("@")[0] for held in one.holds} - {job}) >= one.about.slots for one in engines
    )


async def _put(cluster: Cluster, settings: ClusterSettings) -> None:
    """Say what the cluster is and allows, if that is news."""
    there, data = await cluster.config.get("settings"), msgspec.json.encode(settings)
    if there is None or there.value != data:
        await cluster.config.put("settings", data)


def _is_far(url: str) -> bool:
    """Whether other machines can dial it: some addresses mean something on this one only."""
    try:
        address = ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return True  # a name
    return not (address.is_loopback or address.is_link_local)


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


async def look(home: ClusterState, identity: Callable[[], Identity]) -> ClusterStatus:
    """How the cluster's units are. Where it is not run from this machine, presence is all there is.

    Raises StoreUnavailable, TicketRefused when there is nothing at all to tell.
    """
    applied, facts, runtime = home.applied(), home.facts(), home.runtime()
    planned, statuses = runtime.planned() or home.applied_plan().units, runtime.units()
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
    return ClusterStatus(
        cluster=home.cluster,
        access=applied.access if applied is not None else None,
        runtime=facts.runtime if facts is not None else None,
        units=rows(planned, statuses, members, here=socket.gethostname(), now_ms=_now_ms()),
    )


async def drain(home: ClusterState, name: str, *, undo: bool) -> None:
    """Let a worker or executor take no more jobs and wait until it has none; `undo`: let it take jobs again.

    Raises NotFound, Usage, StoreUnavailable, TicketRefused.
    """
    authority, facts = Authority.load(home.folder), home.facts()
    if facts is None:
        raise StoreUnavailable(f"cluster {home.cluster} was never brought up here", hint="`mvmci up FILE`")
    cluster = await open_cluster(authority.admin(facts.login), announce=False)
    try:
        roles = _roles(await cluster.store.presence.members(), home.runtime().planned())
        if name not in roles:
            known = sorted(unit for unit, role in roles.items() if role in DRAIN)
            raise NotFound(
                f"no unit {name} of {home.cluster} is there", hint=f"there are {', '.join(known) or 'none'}"
            )
        if roles[name] not in DRAIN:
            raise Usage(f"{name} is a {roles[name]}", hint="only workers and executors take jobs")
        key = f"drain.{name}"
        if undo:
            await cluster.config.delete(key)
        else:
            await cluster.config.put(key, b"{}")
        while not _has_heard(await cluster.store.presence.members(), name, undo):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_EVERY_S)
    finally:
        await cluster.close()


def _roles(members: Sequence[Member], planned: Sequence[Unit]) -> dict[str, str]:
    """Of each unit that is there or is to be: one that has just started has not said yet what it is."""
    said = {member.unit: member.about.role for member in members if member.about.role}
    return {unit.name: str(unit.role) for unit in planned} | said


def _has_heard(members: Sequence[Member], name: str, undo: bool) -> bool:
    """Whether the worker is as it was told to be; one that left has no jobs either."""
    for member in members:
        if member.unit == name:
            return member.about.state == "ready" if undo else _is_drained(member)
    return True


def _is_drained(member: Member) -> bool:
    return member.about.state == "draining" and not member.holds and not member.keeps


async def down(home: ClusterState, *, grace_s: float = GRACE_S, purge: bool = False) -> bool:
    """Stop all that `up` started; with `purge`, forget the cluster too. False: nothing was running.

    Raises LockHeld, StoreUnavailable.
    """
    home.check_version()
    with home.lock():
        ran = await home.runtime().stop(0 if purge else grace_s)
        if purge:
            await home.runtime().forget()
            facts = home.facts()
            if facts is not None and facts.broker is None:
                from mvmci.stores.nats import remove

                authority = Authority.load(home.folder)
                await remove(authority.admin(facts.login).login, home.cluster)
            home.remove()
    return ran
